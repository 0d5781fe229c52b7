"""Running text as token chunks: causal and masked language modelling, and sentences without any target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from graftwork.core.example import Example
from graftwork.errors import ConfigError, DataError
from graftwork.surgery.sites import pretrained
from graftwork.training.encoding import IGNORED_LABEL, padding_id

MASKED_SHARE = 0.15
"""Share of tokens that a masked language model has to guess."""

Objective = Literal["causal", "masked"]


def objective_of(model: Any) -> Objective:
    """How a model is trained on running text.

    Raises:
        ConfigError: If it has no language-model head, or two stacks.
    """
    inner = pretrained(model)
    if inner.config.is_encoder_decoder:
        raise ConfigError(
            f"{type(inner).__name__} reads and writes with two stacks, and running text has no input apart from what "
            "is to be written. Use a decoder, a masked language model, or a task of text to text."
        )
    if inner.can_generate():
        return "causal"
    if inner.get_output_embeddings() is None:
        raise ConfigError(
            f"{type(inner).__name__} has no language-model head, so it has no perplexity. Load it with a head "
            "(…ForMaskedLM, …ForCausalLM), or train what needs no loss (method.finetune=false)."
        )
    return "masked"


class TextChunks(Dataset[dict[str, Any]]):
    """All rows tokenised in order, joined, and cut into chunks of one length with the model's special tokens.

    Args:
        rows: Lines of text.
        tokenizer: The model's tokenizer.
        max_tokens: Tokens of a chunk, special ones included.
        causal: A decoder: a chunk begins with the start token and has no end.

    Raises:
        DataError: If the text has fewer than two tokens.
    """

    def __init__(self, rows: Sequence[Example], tokenizer: Any, *, max_tokens: int, causal: bool) -> None:
        texts = [row.input + "\n" if causal else row.input for row in rows]
        encoded: list[list[int]] = (
            tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        )
        tokens = [token for ids in encoded for token in ids]
        before, after = _frame(tokenizer, causal)
        room = max_tokens - len(before) - len(after)
        if len(tokens) < 2 or room < 2:
            raise DataError(
                f"Found {len(tokens)} tokens of text for chunks of {max_tokens}. Expected at least two tokens in each; "
                "give more text or a larger max_input_tokens."
            )
        pieces = [tokens[start : start + room] for start in range(0, len(tokens), room)]
        self.chunks = [[*before, *piece, *after] for piece in pieces if len(piece) > 1]

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.chunks[index], "index": index}


class Sentences(Dataset[dict[str, Any]]):
    """Each row by itself, with the special tokens of the model and without any target."""

    def __init__(self, rows: Sequence[Example], tokenizer: Any, *, max_tokens: int) -> None:
        self.rows, self.tokenizer, self.max_tokens = rows, tokenizer, max_tokens

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self.tokenizer(self.rows[index].input, truncation=True, max_length=self.max_tokens)["input_ids"]
        return {"input_ids": ids, "index": index}


@dataclass(frozen=True)
class TextBatch:
    """Collate chunks into tensors [batch tokens], with labels for the objective.

    Args:
        tokenizer: For its padding, mask and special tokens.
        objective: "causal", "masked", or None for no labels.
        seed: Draws the masks of a chunk from the seed and its number, so that every variant of a model sees the same;
            None draws anew each time.
    """

    tokenizer: Any
    objective: Objective | None
    seed: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Pad, and make the labels."""
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        batch = {
            "input_ids": _pad(ids, padding_id(self.tokenizer)),
            "attention_mask": _pad([torch.ones_like(row) for row in ids], 0),
        }
        if self.objective == "causal":
            batch["labels"] = _pad(ids, IGNORED_LABEL)
        elif self.objective == "masked":
            pairs = [self._masked(row, int(rows[number]["index"])) for number, row in enumerate(ids)]
            batch["input_ids"] = _pad([pair[0] for pair in pairs], padding_id(self.tokenizer))
            batch["labels"] = _pad([pair[1] for pair in pairs], IGNORED_LABEL)
        return batch

    def _masked(self, ids: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Hide 15 % of the tokens: four in five behind the mask, one in ten behind a random token, one in the open."""
        if self.tokenizer.mask_token_id is None:
            raise ConfigError("Found a tokenizer without a mask token. A masked language model needs one.")
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        draw = torch.rand(3, len(ids), generator=generator)
        special = torch.isin(ids, torch.tensor(sorted(set(self.tokenizer.all_special_ids))))
        chosen = (draw[0] < MASKED_SHARE) & ~special
        if not bool(chosen.any()) and not bool(special.all()):
            # a short chunk may draw nothing, and a batch without any label has no loss
            chosen[draw[0].masked_fill(special, 2.0).argmin()] = True
        others = (draw[2] * len(self.tokenizer)).long()
        hidden = torch.where(draw[1] < 0.8, self.tokenizer.mask_token_id, torch.where(draw[1] < 0.9, others, ids))
        return torch.where(chosen, hidden, ids), torch.where(chosen, ids, IGNORED_LABEL)


def text_data(
    rows: Sequence[Example], model: Any, tokenizer: Any, *, max_tokens: int, seed: int | None = None
) -> tuple[TextChunks, TextBatch]:
    """Chunks and collate function of running text for a model; a model without a head gets no labels.

    Args:
        rows: Lines of text.
        model: Decides between causal and masked.
        tokenizer: Its tokenizer.
        max_tokens: Tokens of a chunk at most; cut to what the model has positions for.
        seed: Fixes the masks.
    """
    inner = pretrained(model)
    headless = not inner.config.is_encoder_decoder and not inner.can_generate()
    objective = None if headless and inner.get_output_embeddings() is None else objective_of(model)
    chunks = TextChunks(rows, tokenizer, max_tokens=min(max_tokens, positions_of(inner)), causal=objective == "causal")
    return chunks, TextBatch(tokenizer, objective, seed)


def positions_of(model: Any) -> int:
    """Tokens that a model has positions for; a large number if it does not say."""
    config = model.config
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1 << 30
    # the first positions of RoBERTa are taken by padding
    return limit - config.pad_token_id - 1 if config.model_type in ("roberta", "xlm-roberta") else limit


def _frame(tokenizer: Any, causal: bool) -> tuple[list[int], list[int]]:
    if causal:
        return ([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]), []
    start = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    end = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    return [start] if start is not None else [], [end] if end is not None else []


def _pad(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
