"""FlexAttention along a graph: its softmax becomes 1.5-entmax once every row's threshold is known. Forward only."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

from graftwork.errors import ConfigError
from graftwork.methods.sparsefinder.gathering import gathered_threshold
from graftwork.methods.sparsefinder.graphs import Graph

TILE = 128
"""Tokens per tile of the block lists, and what lengths are padded to."""


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    graph: Graph,
    *,
    scale: float,
    alpha: float | Tensor,
    size: int,
    compiled: bool | None = None,
) -> Tensor:
    """Masked entmax by FlexAttention: scores become 2·log(s/2 − τ), whose softmax is (s/2 − τ)₊² exactly.

    Source: section 8.3 of the specification. With τ held constant the gradient would be wrong, so there is none.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        graph: Which pairs are connected.
        scale: Factor on query·key.
        alpha: 1.5, or 1 for softmax.
        size: Tokens per block of the pass that finds τ.
        compiled: Compile the kernel; None does so on accelerators only. Uncompiled, block lists are ignored and only
            the mask function acts, so nothing is saved.

    Raises:
        ConfigError: If α is neither 1 nor 1.5, or a gradient is asked for.
    """
    if isinstance(alpha, Tensor) or alpha not in (1.0, 1.5):
        raise ConfigError(f"alpha is {alpha}. Expected 1.5 or 1 for executor flex; use blocks for any other.")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise ConfigError("executor flex has no gradient. Train with executor blocks, or run under torch.no_grad().")
    if compiled is None:
        compiled = query.is_cuda
    queries, keys = query.shape[2], key.shape[2]
    tau = gathered_threshold(query, key, graph, scale=scale, size=size) if alpha == 1.5 else None
    # lengths that tiles do not divide are padded, because masked tails of tiles gave NaN elsewhere
    padded = [torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % TILE)) for x in (query, key, value)]
    allowed = torch.nn.functional.pad(graph.dense(query.device), (0, -keys % TILE, 0, -queries % TILE))
    empty = ~allowed.any(-1)
    allowed_or_first = allowed.clone()
    # a row without any key is NaN in a softmax; it gets one key here and zeros below
    allowed_or_first[..., 0] |= empty
    if tau is not None:
        tau = torch.nn.functional.pad(tau, (0, -queries % TILE), value=torch.inf).masked_fill(empty, 0.0)

    def score(scores: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        if tau is None:
            return scores
        rest = scores / 2 - tau[batch, head, row]
        return torch.where(rest > 0, 2 * torch.log(rest.clamp_min(torch.finfo(torch.float32).tiny)), -torch.inf)

    def permitted(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return allowed_or_first[batch, head, row, column]

    output = _kernel(compiled)(
        *padded,
        score_mod=score,
        block_mask=_block_mask(allowed_or_first, permitted),
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    output = output.masked_fill(empty[..., None], 0.0)
    return output[:, :, :queries].nan_to_num(0.0)


def _block_mask(allowed: Tensor, permitted: Any) -> BlockMask:
    tiles = allowed.unflatten(3, (-1, TILE)).unflatten(2, (-1, TILE)).any(3).any(-1)
    counts = tiles.sum(-1, dtype=torch.int32)
    order = tiles.byte().sort(dim=-1, descending=True, stable=True).indices.int()
    return BlockMask.from_kv_blocks(
        counts,
        order,
        None,
        None,
        BLOCK_SIZE=TILE,
        mask_mod=permitted,
        seq_lengths=(allowed.shape[2], allowed.shape[3]),
    )


@cache
def _kernel(compiled: bool) -> Any:
    if compiled:
        return torch.compile(torch_flex_attention, dynamic=False)

    def uncompiled(*arguments: Any, **options: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            return torch_flex_attention(*arguments, **options)

    return uncompiled
