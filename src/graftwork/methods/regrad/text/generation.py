"""PromptBuilder of unequal length generated from together, each row drawing for itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.methods.regrad.text.sampling import Sampling, TokenSampler
from graftwork.surgery.sites import pretrained


def pad_left(rows: Sequence[Sequence[int]], padding: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens [rows tokens] that end together, and 1 where they are no padding."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[padding] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def model_stop_tokens(model: nn.Module) -> set[int]:
    """Tokens that end a text by the model's own settings."""
    own = getattr(pretrained(model).generation_config, "eos_token_id", None)
    return {int(token) for token in (own if isinstance(own, list) else [own]) if token is not None}


@torch.no_grad()
def generate_tokens(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sequence[Sampling | None],
    *,
    padding: int,
    ends: Sequence[int],
    max_new_tokens: int,
    stopping: Sequence[Any] = (),
) -> list[list[int]]:
    """What is generated behind every prompt, as the model stands; rows that ended early are padded.

    Args:
        model: A decoder, whatever is applied to it.
        prompts: Tokens of each row.
        sampling: How each row draws; None takes the likeliest token.
        padding: Token to fill rows up with.
        ends: Tokens that end a row.
        max_new_tokens: Tokens generated at most.
        stopping: Further criteria that may end rows.
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
    found = inner.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=settings,
        logits_processor=LogitsProcessorList([sampler] if sampler.rows else []),
        stopping_criteria=StoppingCriteriaList(list(stopping)),
    )
    return found[:, ids.shape[1] :].tolist()
