"""Examples as token batches: texts to write, for encoder–decoders and decoders; classes, for encoders with a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from graftwork.core.example import Example
from graftwork.errors import ConfigError, DataError
from graftwork.surgery.sites import is_classifier, pretrained

IGNORED_LABEL = -100
"""Label of positions that the loss leaves out."""


class EncodedExamples(Dataset[dict[str, list[int]]]):
    """Examples as token ids, encoded when they are asked for.

    Args:
        rows: What to encode.
        tokenizer: The model's tokenizer.
        encoder_decoder: Whether input and target go to different stacks; else the target follows the input in one row,
            and only the target has labels.
        max_input_tokens: Longer inputs are cut.
        max_target_tokens: Longer targets are cut; the end-of-sequence token is kept.
    """

    def __init__(
        self,
        rows: Sequence[Example],
        tokenizer: Any,
        *,
        encoder_decoder: bool,
        max_input_tokens: int,
        max_target_tokens: int,
    ) -> None:
        self.rows = rows
        self.tokenizer = tokenizer
        self.encoder_decoder = encoder_decoder
        self.max_input_tokens = max_input_tokens
        self.max_target_tokens = max_target_tokens

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self.rows[index]
        target = self._target(row.target)
        source: list[int] = self.tokenizer(
            row.text, truncation=True, max_length=self.max_input_tokens, add_special_tokens=self.encoder_decoder
        )["input_ids"]  # type: ignore[assignment]
        if self.encoder_decoder:
            return {"input_ids": source, "labels": target}
        start = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        prompt = start + source
        return {"input_ids": prompt + target, "labels": [IGNORED_LABEL] * len(prompt) + target}

    def lengths(self, batch: int = 1000) -> list[tuple[int, int]]:
        """(tokens of the input, tokens of the target) of every example."""
        found: list[tuple[int, int]] = []
        for start in range(0, len(self.rows), batch):
            rows = self.rows[start : start + batch]
            inputs = self.tokenizer(
                [row.input for row in rows],
                truncation=True,
                max_length=self.max_input_tokens,
                add_special_tokens=self.encoder_decoder,
            )["input_ids"]
            found += [(len(ids), len(self._target(row.target))) for ids, row in zip(inputs, rows, strict=True)]
        return found

    def _target(self, text: str) -> list[int]:
        end = self.tokenizer.eos_token_id
        if not self.encoder_decoder:
            # a decoder reads on in one line, so a space parts the answer from the question
            text = " " + text
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
        return ids[: self.max_target_tokens - 1] + ([] if end is None else [int(end)])


class LabelledExamples(Dataset[dict[str, Any]]):
    """Examples as token ids with the number of their class, encoded when they are asked for.

    Args:
        rows: What to encode.
        tokenizer: The model's tokenizer.
        label2id: Number of each class, as the model's config has it.
        max_input_tokens: Longer inputs are cut, of a pair the longer text first.
    """

    def __init__(
        self, rows: Sequence[Example], tokenizer: Any, *, label2id: Mapping[str, int], max_input_tokens: int
    ) -> None:
        unknown = [row for row in rows if row.target not in label2id]
        if unknown:
            raise DataError(
                f"Found the class {unknown[0].target!r} in example {unknown[0].key}; the model's head knows "
                f"{', '.join(label2id)}. Convert a model for this task (graftwork convert … --task), or check the data."
            )
        self.rows = rows
        self.tokenizer = tokenizer
        self.label2id = label2id
        self.max_input_tokens = max_input_tokens

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        encoded = self.tokenizer(row.input, row.pair, truncation=True, max_length=self.max_input_tokens)
        columns = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
        return {**columns, "labels": self.label2id[row.target]}


def encode(
    rows: Sequence[Example], tokenizer: Any, model: Any, *, max_input_tokens: int, max_target_tokens: int
) -> EncodedExamples | LabelledExamples:
    """Encode examples for what a model learns: classes if it has a head for them, else text.

    Raises:
        ConfigError: If the model can do neither.
        DataError: If an example has a class that the head does not know.
    """
    inner = pretrained(model)
    if is_classifier(inner):
        label2id: Any = inner.config.label2id
        return LabelledExamples(rows, tokenizer, label2id=label2id, max_input_tokens=max_input_tokens)
    if not inner.can_generate():
        raise ConfigError(
            f"{type(inner).__name__} can neither write text nor tell classes apart. Convert it for a task "
            "(graftwork convert … --task NAME), which gives it a classification head."
        )
    return EncodedExamples(
        rows,
        tokenizer,
        encoder_decoder=bool(inner.config.is_encoder_decoder),
        max_input_tokens=max_input_tokens,
        max_target_tokens=max_target_tokens,
    )


@dataclass(frozen=True)
class PadBatch:
    """Collate encoded rows of unequal length into tensors [batch tokens]."""

    padding_id: int
    side: str = "right"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Pad `input_ids` and `labels`, each to its longest row, and mark the real tokens; classes are only stacked."""
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        batch = {
            "input_ids": self._pad(ids, self.padding_id),
            "attention_mask": self._pad([torch.ones_like(row) for row in ids], 0),
        }
        if "token_type_ids" in rows[0]:
            batch["token_type_ids"] = self._pad([torch.tensor(row["token_type_ids"]) for row in rows], 0)
        if "labels" in rows[0] and isinstance(rows[0]["labels"], int):
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        elif "labels" in rows[0]:
            batch["labels"] = self._pad([torch.tensor(row["labels"]) for row in rows], IGNORED_LABEL)
        return batch

    def _pad(self, rows: list[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=value, padding_side="left" if self.side == "left" else "right"
        )


def padding_id(tokenizer: Any) -> int:
    """The id to pad with: the padding token, else end of sequence, else 0; masked either way."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
