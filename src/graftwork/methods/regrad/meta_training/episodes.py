"""Questions with their passages, as the batches that meta-training takes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from graftwork.core.example import Example
from graftwork.errors import DataError
from graftwork.methods.regrad.config import ReGradConfig
from graftwork.methods.regrad.functional import IGNORED_LABEL
from graftwork.methods.regrad.text.prompting import answer_ids, document_ids, family_for, question_ids

logger = logging.getLogger(__name__)


class Episodes(Dataset[dict[str, Any]]):
    """One question, its answer and its passages each, encoded when they are asked for.

    Args:
        rows: Examples whose metadata holds `passages`, as augmented questions do; those without any are left out.
        tokenizer: The model's tokenizer.
        config: Wording and lengths.
        max_input_tokens: Longer prompts lose passages first, then their beginning.
        max_target_tokens: Longer answers are cut.

    Raises:
        DataError: If no question has a passage.
    """

    def __init__(
        self,
        rows: Sequence[Example],
        tokenizer: Any,
        config: ReGradConfig,
        *,
        max_input_tokens: int,
        max_target_tokens: int,
    ) -> None:
        self.rows = [row for row in rows if any(text.strip() for text in row.metadata.get("passages", ()))]
        if not self.rows:
            raise DataError(
                f"Found no passage with any of {len(rows)} questions; expected augmented questions. Index a corpus "
                "(graftwork index) and find passages for them (graftwork prepare … --index), then train on that file."
            )
        if len(self.rows) < len(rows):
            logger.warning(
                "%d of %d questions have no passage and are left out.", len(rows) - len(self.rows), len(rows)
            )
        self.tokenizer, self.config = tokenizer, config
        self.max_input_tokens, self.max_target_tokens = max_input_tokens, max_target_tokens

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        shown = passages_of(row, self.config)
        documents = [document_ids(self.tokenizer, self.config, title, text)[0] for title, text in shown]
        prompt = prompt_ids(self.tokenizer, self.config, row, shown, self.max_input_tokens)
        answer = answer_ids(self.tokenizer, self.config, row.target)[: self.max_target_tokens]
        labels = [IGNORED_LABEL] * len(prompt) + answer
        return {"documents": documents, "input_ids": prompt + answer, "labels": labels}


def passages_of(row: Example, config: ReGradConfig) -> list[tuple[str, str]]:
    """(title, text) of a question's passages, each once, as many as the settings want."""
    texts = row.metadata.get("passages", ())
    titles = row.metadata.get("titles") or ("",) * len(texts)
    pairs: list[tuple[str, str]] = [pair for pair in zip(titles, texts, strict=True) if pair[1].strip()]
    return list(dict.fromkeys(pairs))[: config.passages]


def prompt_ids(
    tokenizer: Any, config: ReGradConfig, row: Example, passages: Sequence[tuple[str, str]], limit: int
) -> list[int]:
    """The prompt of one question, with its passages unless it is asked blindly, within a number of tokens."""
    kind = row.metadata.get("kind") or ("choice" if row.metadata.get("choices") else "open")
    family = family_for(config, kind)
    shown = [] if config.blind else list(passages)
    while True:
        ids = question_ids(
            tokenizer,
            family,
            row.metadata.get("question", row.input),
            choices=row.metadata.get("choices", ()),
            passages=shown,
        )
        if len(ids) <= limit or not shown:
            break
        shown.pop()
    return ids if len(ids) <= limit else [ids[0], *ids[len(ids) - limit + 1 :]]


@dataclass(frozen=True)
class EpisodeCollator:
    """Collate episodes: questions [tasks tokens], all their passages [passages tokens], and which task each is of."""

    padding_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Pad on the right and mark the real tokens."""
        documents = [ids for row in rows for ids in row["documents"]]
        owners = [number for number, row in enumerate(rows) for _ in row["documents"]]
        input_ids, attention_mask = self.pad([row["input_ids"] for row in rows])
        document_ids, document_mask = self.pad(documents)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": _padded([row["labels"] for row in rows], IGNORED_LABEL),
            "document_ids": document_ids,
            "document_mask": document_mask,
            "document_task": torch.tensor(owners),
        }

    def pad(self, rows: Sequence[Sequence[int]], *, left: bool = False) -> tuple[Tensor, Tensor]:
        """Ids and mask of rows of unequal length."""
        return _padded(rows, self.padding_id, left=left), _padded([[1] * len(row) for row in rows], 0, left=left)


def _padded(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> Tensor:
    tensors = [torch.tensor(row) for row in rows]
    side = "left" if left else "right"
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)
