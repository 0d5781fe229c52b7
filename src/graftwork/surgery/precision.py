"""Precision of attention: float32 scores of half-precision queries and keys, without a float32 copy of all keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

CONVERTED_AT_ONCE = 1 << 20
"""Numbers of a half-precision tensor that are converted to float32 at a time."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of scores, softmax and sums: float32 for half precision, else the input dtype."""
    return torch.promote_types(dtype, torch.float32)


def tests_convergence(tensor: Tensor) -> bool:
    """True if an iteration on `tensor` [...] may read its progress: on the CPU, unless torch.compile traces it."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def attention_scores(
    query: Float[Tensor, "*batch heads queries width"],
    key: Float[Tensor, "*batch groups keys width"],
    scale: float | Float[Tensor, " heads"],
    *,
    centred: bool = False,
) -> Float[Tensor, "*batch heads queries keys"]:
    """Scores scale · q·k, accumulated and returned in at least float32.

    Half-precision scores would be rounded to 8 or 11 bits, an error of up to 8 at a score of 3,000 in bfloat16.

    Args:
        query: Queries.
        key: Keys; the number of heads is a multiple of the number of groups.
        scale: Factor on q·k, one number or one per head.
        centred: Subtract the mean key from keys in half precision, which changes every score of a query by the same
            number. Scores of thousands, which float32 would round to 1e-4, become small. Softmax and entmax of
            the scores do not change; the gradients are those for such a function.
    """
    if isinstance(scale, Tensor):
        # [*batch heads queries keys] · [heads 1 1]
        return attention_scores(query, key, 1.0, centred=centred) * scale[:, None, None]
    heads, groups, queries = query.shape[-3], key.shape[-3], query.shape[-2]
    if heads != groups:
        # [*batch heads queries width] → [*batch groups repeats·queries width]
        query = query.reshape(*query.shape[:-3], groups, heads // groups * queries, query.shape[-1])
    if query.dtype == compute_dtype(query.dtype):
        scores = (query * scale) @ key.mT
    else:
        apply = cast("Callable[..., Tensor]", _WideScores.apply)  # pyright: ignore[reportUnknownMemberType]
        scores = apply(query, key, scale, centred)
    # [*batch groups repeats·queries keys] → [*batch heads queries keys]
    return scores if heads == groups else scores.reshape(*scores.shape[:-3], heads, queries, scores.shape[-1])


def weighted_values(
    weights: Float[Tensor, "*batch heads queries keys"], value: Float[Tensor, "*batch groups keys width"]
) -> Float[Tensor, "*batch heads queries width"]:
    """Weighted sum of the values, accumulated in at least float32, in the dtype of the values.

    On an accelerator, weights are rounded to the dtype of the values, as fused attention does.

    Args:
        weights: Attention weights in at least float32.
        value: Values; the number of heads is a multiple of the number of groups.
    """
    heads, groups, queries = weights.shape[-3], value.shape[-3], weights.shape[-2]
    if heads != groups:
        # [*batch heads queries keys] → [*batch groups repeats·queries keys]
        weights = weights.reshape(*weights.shape[:-3], groups, heads // groups * queries, weights.shape[-1])
    if weights.dtype == value.dtype or value.device.type != "cpu":
        sums = weights.to(value.dtype) @ value
    else:
        sums = cast(Tensor, _WideSums.apply(weights, value))  # pyright: ignore[reportUnknownMemberType]
    return sums if heads == groups else sums.reshape(*sums.shape[:-3], heads, queries, sums.shape[-1])


class _WideScores(torch.autograd.Function):
    """scale · q kᵀ in float32 of half-precision q and k, of which only the originals are saved."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, scale: float, centred: bool) -> Tensor:
        ctx.save_for_backward(query, key)
        ctx.scale, ctx.centred = scale, centred
        return _wide(query, key.mT, scale, mean_of=-1 if centred else None)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        query, key = ctx.saved_tensors
        if torch.is_grad_enabled():
            # differentiated again: plain operations
            wide = upstream[0] * ctx.scale
            return (wide @ key.float()).to(query.dtype), (wide.mT @ query.float()).to(key.dtype), None, None
        by_query = _wide(upstream[0], key, ctx.scale, mean_of=-2 if ctx.centred else None)
        by_key = _wide(upstream[0].mT, query, ctx.scale)
        return by_query.to(query.dtype), by_key.to(key.dtype), None, None


class _WideSums(torch.autograd.Function):
    """Product of float32 weights and half-precision values, accumulated in float32."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(weights, value)
        return _wide(weights, value).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        weights, value = ctx.saved_tensors
        if torch.is_grad_enabled():
            wide = upstream[0].float()
            return wide @ value.float().mT, (weights.mT @ wide).to(value.dtype)
        return _wide(upstream[0], value.mT), _wide(weights.mT, upstream[0]).to(value.dtype)


def _wide(left: Tensor, right: Tensor, scale: float = 1.0, mean_of: int | None = None) -> Tensor:
    """Scale · left @ right [*batch rows columns] in float32, converted in parts of the batch.

    Args:
        left: [*batch rows inner].
        right: [*batch inner columns].
        scale: Factor.
        mean_of: Dimension of `right` whose mean is subtracted from it.
    """
    shape = (*left.shape[:-1], right.shape[-1])
    left, right = left.reshape(-1, *left.shape[-2:]), right.reshape(-1, *right.shape[-2:])  # [parts …]
    at_once = max(1, CONVERTED_AT_ONCE // max(1, right.shape[-2] * right.shape[-1]))

    def factors(part: slice) -> tuple[Tensor, Tensor]:
        wide = right[part].float()
        if mean_of is not None:
            wide = wide - wide.mean(mean_of, keepdim=True)
        return left[part].float() * scale if scale != 1.0 else left[part].float(), wide

    if torch.compiler.is_compiling() or left.shape[0] <= at_once:
        return torch.bmm(*factors(slice(None))).reshape(shape)
    product = left.new_empty((left.shape[0], *shape[-2:]), dtype=torch.float32)
    for start in range(0, left.shape[0], at_once):
        part = slice(start, start + at_once)
        torch.bmm(*factors(part), out=product[part])
    return product.reshape(shape)
