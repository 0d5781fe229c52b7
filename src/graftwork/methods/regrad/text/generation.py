"""Batched generation for prompts of unequal length, with sampling parameters per row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn

from graftwork.evaluation.sampling import Sampling, TokenSampler
from graftwork.surgery.sites import pretrained

StoppingCriterion = Callable[..., Tensor]
"""Stopping criterion of transformers: (input_ids, scores) to True for every row that must stop."""


def pad_left(
    rows: Sequence[Sequence[int]], padding: int, device: torch.device
) -> tuple[Int[Tensor, "rows tokens"], Int[Tensor, "rows tokens"]]:
    """Pad rows on the left to equal length; return token ids and attention mask."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[padding] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def model_stop_tokens(model: nn.Module) -> set[int]:
    """Return the end-of-text tokens of the model's generation settings."""
    found: Any = getattr(pretrained(model).generation_config, "eos_token_id", None)
    tokens = cast("list[int | None]", found if isinstance(found, list) else [found])
    return {int(token) for token in tokens if token is not None}


def default_processors(model: nn.Module) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """Return the logits processors of the model's generation settings that apply to greedy decoding and sampling.

    `generate_tokens` applies them as well: repetition penalty, forbidden n-grams and suppressed tokens.
    """
    from transformers import (
        NoRepeatNGramLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        SuppressTokensLogitsProcessor,
    )

    settings: Any = pretrained(model).generation_config
    penalty: float | None = getattr(settings, "repetition_penalty", None)
    ngram: int | None = getattr(settings, "no_repeat_ngram_size", None)
    suppressed: list[int] | None = getattr(settings, "suppress_tokens", None)
    found: list[Any] = []
    if penalty is not None and penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(penalty))
    if ngram:
        found.append(NoRepeatNGramLogitsProcessor(ngram))
    if suppressed:
        found.append(SuppressTokensLogitsProcessor(suppressed, device=str(pretrained(model).device)))
    return found


@torch.no_grad()
def generate_tokens(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sequence[Sampling | None],
    *,
    padding: int,
    ends: Sequence[int],
    max_new_tokens: int,
    stopping: Sequence[StoppingCriterion] = (),
) -> list[list[int]]:
    """Generate a continuation of every prompt; rows that stop early are padded.

    Args:
        model: A decoder; adapters and updates that are active stay active.
        prompts: Token ids of each row.
        sampling: Sampling of each row; None for greedy decoding.
        padding: Padding token.
        ends: Stop tokens.
        max_new_tokens: Maximum number of new tokens.
        stopping: Further stopping criteria.
    """
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    inner: Any = pretrained(model)
    ids, mask = pad_left(prompts, padding, inner.device)
    sampler = TokenSampler(sampling)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        pad_token_id=padding,
        eos_token_id=sorted(ends) or None,
    )
    processors: list[Any] = [sampler] if sampler.rows else []
    found: Tensor = inner.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=settings,
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=StoppingCriteriaList(list[Any](stopping)),
    )
    new: Any = found[:, ids.shape[1] :]  # [rows new_tokens]
    return cast("list[list[int]]", new.tolist())
