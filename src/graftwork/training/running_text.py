"""Running text: token chunks for causal and masked language modelling, and unlabelled sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from graftwork.core.example import Example
from graftwork.errors import ConfigError, DataError
from graftwork.surgery.sites import pretrained
from graftwork.training.encoding import IGNORED_LABEL, padding_id, special_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MASKED_SHARE = 0.15
"""Share of tokens that a masked language model predicts."""

_AFTER_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm")
"""Model types whose first position is that after the padding index."""

Objective = Literal["causal", "masked"]


def objective_of(model: nn.Module) -> Objective:
    """Return the language-modelling objective of a model.

    Raises:
        ConfigError: If the model has no language-model head, or is an encoder–decoder.
    """
    inner = pretrained(model)
    if inner.config.is_encoder_decoder:
        raise ConfigError(
            f"{type(inner).__name__} is an encoder–decoder, and running text has no input that is separate from its "
            "target. Use a decoder, a masked language model, or a text-to-text task."
        )
    if inner.can_generate():
        return "causal"
    if inner.get_output_embeddings() is None:
        raise ConfigError(
            f"{type(inner).__name__} has no language-model head, so it has no perplexity. Load it with a head "
            "(…ForMaskedLM, …ForCausalLM), or train without a loss (method.finetune=false)."
        )
    return "masked"


class TextChunks(Dataset[dict[str, Any]]):
    """Data set of equally long token chunks: all rows tokenised, concatenated and split, with special tokens.

    Args:
        rows: Lines of text.
        tokenizer: Tokenizer of the model.
        max_tokens: Number of tokens of a chunk, including special tokens.
        causal: True for a decoder, whose chunks have a start token and no end token.

    Raises:
        DataError: If the text has fewer than two tokens.
    """

    def __init__(
        self, rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int, causal: bool
    ) -> None:
        texts = [row.input + "\n" if causal else row.input for row in rows]
        encoded: list[list[int]] = []
        if texts:
            encoded = cast("list[list[int]]", tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
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
        self.seed: int | None = None
        """Seed of the masks of an epoch; None draws them from the global random state."""

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.chunks[index], "index": index, "seed": self.seed}

    def begin_epoch(self, seed: int, epoch: int) -> None:
        """Derive the masks of an epoch from a seed, so that a resumed training has those of an uninterrupted one."""
        self.seed = seed * 1_000_003 + epoch + 1


class Sentences(Dataset[dict[str, Any]]):
    """Data set of single rows with special tokens and without targets."""

    def __init__(self, rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> None:
        self.rows, self.tokenizer, self.max_tokens = rows, tokenizer, max_tokens

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self.tokenizer(self.rows[index].input, truncation=True, max_length=self.max_tokens)["input_ids"]
        return {"input_ids": ids, "index": index}


@dataclass(frozen=True)
class TextBatch:
    """Collator of chunks into tensors [batch tokens], with labels for the objective.

    Args:
        tokenizer: Tokenizer with padding, mask and special tokens.
        objective: "causal", "masked", or None for batches without labels.
        seed: Seed of the masks. A number fixes the mask of every chunk, so that variants of a model are scored on equal
            inputs; None takes the seed of the epoch from the rows, which is better for training.
    """

    tokenizer: PreTrainedTokenizerBase
    objective: Objective | None
    seed: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Pad to the longest chunk and add the labels [batch tokens]."""
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        batch = {
            "input_ids": _pad(ids, padding_id(self.tokenizer)),
            "attention_mask": _pad([torch.ones_like(row) for row in ids], 0),
        }
        if self.objective == "causal":
            batch["labels"] = _pad(ids, IGNORED_LABEL)
        elif self.objective == "masked":
            pairs = [self._masked(row, rows[number]) for number, row in enumerate(ids)]
            batch["input_ids"] = _pad([pair[0] for pair in pairs], padding_id(self.tokenizer))
            batch["labels"] = _pad([pair[1] for pair in pairs], IGNORED_LABEL)
        return batch

    def _masked(self, ids: Tensor, row: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Select 15 % of the tokens [tokens] as labels: 80 % become the mask, 10 % a random token, 10 % are unchanged.

        Source: Devlin et al. 2019, section 3.1.
        """
        mask = special_token(self.tokenizer, "mask_token_id")
        if mask is None:
            raise ConfigError("Found a tokenizer without a mask token. A masked language model needs one.")
        seed = row.get("seed") if self.seed is None else self.seed
        generator = None if seed is None else torch.Generator().manual_seed(int(seed) * 1_000_003 + int(row["index"]))
        draw = torch.rand(3, len(ids), generator=generator)  # [3 tokens]: selection, replacement, random token
        special_ids: list[int] = sorted(set(self.tokenizer.all_special_ids))
        special = torch.isin(ids, torch.tensor(special_ids))
        chosen = (draw[0] < MASKED_SHARE) & ~special
        if not bool(chosen.any()) and not bool(special.all()):
            # a short chunk may have no selected token, and the loss of a batch without labels is undefined
            chosen[draw[0].masked_fill(special, 2.0).argmin()] = True
        others = (draw[2] * len(self.tokenizer)).long()
        hidden = torch.where(draw[1] < 0.8, mask, torch.where(draw[1] < 0.9, others, ids))
        return torch.where(chosen, hidden, ids), torch.where(chosen, ids, IGNORED_LABEL)


def text_data(
    rows: Sequence[Example],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int,
    seed: int | None = None,
) -> tuple[TextChunks, TextBatch]:
    """Return chunks of running text and their collator; a model without a head gets no labels.

    Args:
        rows: Lines of text.
        model: Model, which determines the objective.
        tokenizer: Tokenizer of the model.
        max_tokens: Maximum number of tokens of a chunk; reduced to the model's number of positions.
        seed: Seed of the masks; None masks randomly.
    """
    inner = pretrained(model)
    headless = not inner.config.is_encoder_decoder and not inner.can_generate()
    objective = None if headless and inner.get_output_embeddings() is None else objective_of(model)
    chunks = TextChunks(rows, tokenizer, max_tokens=min(max_tokens, positions_of(inner)), causal=objective == "causal")
    return chunks, TextBatch(tokenizer, objective, seed)


def positions_of(model: PreTrainedModel) -> int:
    """Return the number of token positions of a model; 2³⁰ if its config does not define it."""
    config: Any = model.config
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1 << 30
    # positions of RoBERTa and its kin start after the padding index
    return limit - (config.pad_token_id or 0) - 1 if config.model_type in _AFTER_PADDING else limit


def _frame(tokenizer: PreTrainedTokenizerBase, causal: bool) -> tuple[list[int], list[int]]:
    """Return the special tokens before and after a chunk."""
    bos, cls, sep, eos = (special_token(tokenizer, f"{name}_token_id") for name in ("bos", "cls", "sep", "eos"))
    if causal:
        return [] if bos is None else [bos], []
    start = bos if cls is None else cls
    end = eos if sep is None else sep
    return [] if start is None else [start], [] if end is None else [end]


def _pad(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
