"""Episodes of meta-training: a question, its answer and its passages, encoded and collated."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from graftwork.core.example import Example
from graftwork.errors import DataError
from graftwork.methods.regrad.config import ReGradConfig
from graftwork.methods.regrad.functional import IGNORED_LABEL
from graftwork.methods.regrad.text.prompting import answer_ids, document_ids, family_for, question_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Episode(TypedDict):
    """Token ids of one question."""

    documents: list[list[int]]
    """Passages."""
    input_ids: list[int]
    """Prompt and answer."""
    labels: list[int]
    """Answer; `IGNORED_LABEL` at the positions of the prompt."""


class Episodes(Dataset[Episode]):
    """Dataset of episodes, encoded on access.

    Args:
        rows: Examples with `passages` in their metadata, as in augmented questions; others are left out.
        tokenizer: The model's tokenizer.
        config: Prompt family, document template and lengths.
        max_input_tokens: Maximum number of prompt tokens; passages are dropped first, then the prompt's beginning.
        max_target_tokens: Maximum number of answer tokens; longer answers are truncated.

    Raises:
        DataError: If no question has a passage.
    """

    def __init__(
        self,
        rows: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
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

    def __getitem__(self, index: int) -> Episode:
        row = self.rows[index]
        shown = passages_of(row, self.config)
        documents = [document_ids(self.tokenizer, self.config, title, text)[0] for title, text in shown]
        prompt = prompt_ids(self.tokenizer, self.config, row, shown, self.max_input_tokens)
        answer = answer_ids(self.tokenizer, self.config, row.target)[: self.max_target_tokens]
        labels = [IGNORED_LABEL] * len(prompt) + answer
        return {"documents": documents, "input_ids": prompt + answer, "labels": labels}


def passages_of(row: Example, config: ReGradConfig) -> list[tuple[str, str]]:
    """Return (title, text) of a question's distinct passages, at most `config.passages`."""
    texts = row.metadata.get("passages", ())
    titles = row.metadata.get("titles") or ("",) * len(texts)
    pairs: list[tuple[str, str]] = [pair for pair in zip(titles, texts, strict=True) if pair[1].strip()]
    return list(dict.fromkeys(pairs))[: config.passages]


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    config: ReGradConfig,
    row: Example,
    passages: Sequence[tuple[str, str]],
    limit: int,
) -> list[int]:
    """Return the prompt of one question within a number of tokens.

    Args:
        tokenizer: The model's tokenizer.
        config: Prompt family, and `blind`, which leaves the passages out of the prompt.
        row: The example.
        passages: (title, text) of its passages; dropped from the end until the prompt fits.
        limit: Maximum number of tokens; a longer prompt without passages loses its beginning, after the first token.
    """
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
    """Collates episodes into questions [tasks tokens], passages [passages tokens], and the task of each passage."""

    padding_id: int

    def __call__(self, rows: Sequence[Episode]) -> dict[str, Tensor]:
        """Pad on the right; return ids, masks, labels, and the index of each passage's question [passages]."""
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

    def pad(
        self, rows: Sequence[Sequence[int]], *, left: bool = False
    ) -> tuple[Int[Tensor, "rows tokens"], Int[Tensor, "rows tokens"]]:
        """Pad rows of unequal length; return token ids and attention mask."""
        return _padded(rows, self.padding_id, left=left), _padded([[1] * len(row) for row in rows], 0, left=left)


def _padded(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> Int[Tensor, "rows tokens"]:
    tensors = [torch.tensor(row) for row in rows]
    side = "left" if left else "right"
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)
