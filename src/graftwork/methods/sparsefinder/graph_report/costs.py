"""Measured time of one attention layer along the run's graph, compared with SDPA, dense entmax and other graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice

import torch
from torch import Tensor
from torch.nn import functional as F

from graftwork.core.progress import Progress
from graftwork.errors import ConfigError
from graftwork.methods.sparsefinder.clustering import open_pairs
from graftwork.methods.sparsefinder.config import SparsefinderConfig
from graftwork.methods.sparsefinder.entmax import entmax
from graftwork.methods.sparsefinder.executors import (
    chosen_executor,
    folded_scale,
    gathered_attention,
    masked_attention,
    sparse_attention,
)
from graftwork.methods.sparsefinder.extraction import HeadBatch, QueriesKeys, pad_heads, plain_numbers
from graftwork.methods.sparsefinder.flex import flex_attention
from graftwork.methods.sparsefinder.graph_report.quality import graph_quality, kept_blocks, sorted_kept_blocks
from graftwork.methods.sparsefinder.graphs import Graph
from graftwork.methods.sparsefinder.modules import AttentionCall, SparsefinderAttention
from graftwork.methods.sparsefinder.predictor import Learned, predict_graph
from graftwork.methods.sparsefinder.sorting import is_sortable
from graftwork.metrics.cost import Candidate, compare_costs
from graftwork.surgery.masks import LazyMask

KEPT = 0.125
"""Target share of key blocks in the graphs that are not the run's own."""
BLOCK = 64
"""Tokens per block of the graphs that are not the run's own."""
DENSE_LIMIT = 2048
"""Maximal length of dense entmax; SDPA and blocks run at every length."""
SLOW_LIMIT = 1024
"""Maximal length of the executors that skip no work: masked, and uncompiled FlexAttention."""
ROUNDS = 3
"""Number of measured rounds."""

SDPA = "SDPA (softmax)"
DENSE = "dense entmax"
OWN = "own graph"
"""Start of the label of the run's own graph, predicted in the measured call."""


@dataclass(frozen=True)
class ExecutorCost:
    """Measured time and memory of one attention layer at one length, with the quality of its graph."""

    label: str
    """Graph and executor."""
    length: int
    """Number of queries, equal to the number of keys."""
    backward: bool
    """True if the backward pass is included."""
    seconds: float
    """Median over the rounds."""
    time_ratio: float
    """Median over the rounds of the time divided by that of SDPA."""
    peak_bytes: int
    """Peak memory in bytes."""
    kept: float | None = None
    """Share of the allowed key blocks that are computed, at the block size of the executor; null if all are."""
    device: str = "cpu"
    low: float | None = None
    """Shortest time over the rounds."""
    high: float | None = None
    """Longest time over the rounds."""
    rounds: int = 0
    """Number of rounds."""
    graph: str | None = None
    """Graph of the measured attention; null for all scores."""
    executor: str | None = None
    """Executor of the graph: dense (all scores are computed), blocks or flex; null without a graph."""
    sparsity: float | None = None
    """Share of allowed pairs outside the graph, on the measured queries and keys; null without a graph."""
    recall: float | None = None
    """Share of the gold pairs in the graph, on the measured queries and keys; null without a graph."""
    mass: float | None = None
    """Attention probability of the pairs in the graph, on the measured queries and keys; null without a graph."""
    kept_64: float | None = None
    """Share of the allowed blocks of 64 tokens that contain an edge; null without a graph."""
    kept_16: float | None = None
    """Share of the allowed blocks of 16 tokens that contain an edge; null without a graph."""
    sorted_64: float | None = None
    """Blocks of 64 tokens that contain an edge after sorting by bucket, divided by those allowed before; null for
    graphs without buckets of single tokens."""
    sorted_16: float | None = None
    """The same for blocks of 16 tokens."""


@dataclass(frozen=True, slots=True)
class _Run:
    """One measured call, and the graph that it uses."""

    forward: Callable[[], Tensor]
    graph: str | None = None
    size: int | None = None
    """Tokens per gathered block; None if all scores are computed."""
    executor: str | None = None
    sort: bool = False
    """True if tokens are sorted by bucket before blocks are gathered."""


def executor_costs(
    graft: SparsefinderAttention, train: QueriesKeys | None, held_out: QueriesKeys, site: int, lengths: Sequence[int]
) -> list[ExecutorCost]:
    """Measure one attention module on its queries and keys of held-out text, concatenated to each length.

    The first row of a length is the module's own graph, predicted in the measured call and executed as configured. The
    others are SDPA, dense entmax, and a graph for comparison, named by its rule: for encoders, blocks at a distance
    below a threshold calibrated on the training text, with a band of three blocks; for decoders and modules that
    choose key blocks, a band.

    Args:
        graft: Attention module.
        train: Stored queries and keys for the calibration of thresholds; None for modules that choose key blocks.
        held_out: Stored queries and keys to measure on.
        site: Index of the module in both.
        lengths: Numbers of tokens.

    Raises:
        ConfigError: If the module is a cross-attention.
    """
    if graft.cross:
        raise ConfigError("Found a cross-attention. Expected a self-attention for the times of executors.")
    rows: list[ExecutorCost] = []
    with Progress("time of executors", total=len(lengths)) as progress:
        for length in lengths:
            rows += _at_length(graft, train, held_out, site, length)
            progress.advance(1)
    return rows


def sorting_findings(costs: Sequence[ExecutorCost]) -> list[str]:
    """Sentences about the kept blocks of the run's own graph before and after sorting, one per length."""
    found = {
        cost.length: f"At {cost.length} tokens the {cost.graph} keeps {cost.kept_64:.3f} of the 64-token blocks, and "
        f"{cost.sorted_64:.3f} if tokens are sorted by bucket (16-token blocks: {cost.kept_16:.3f}, "
        f"{cost.sorted_16:.3f})."
        for cost in costs
        if cost.graph is not None and cost.graph.startswith(OWN) and cost.sorted_64 is not None
    }
    return [found[length] for length in sorted(found)]


def _at_length(
    graft: SparsefinderAttention, train: QueriesKeys | None, held_out: QueriesKeys, site: int, length: int
) -> list[ExecutorCost]:
    data = _joined(held_out, site, length)
    causal, alpha = graft.causal, _alpha(graft, data)
    repeats = data.query.shape[1] // data.key.shape[1]
    query, key = data.query, data.key.repeat_interleave(repeats, 1)
    query, scale = folded_scale(query, data.scale)
    value = torch.randn(key.shape, generator=torch.Generator().manual_seed(length))
    q, k, v = leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    # one complete sequence: without padding, blocks need no mask
    mask = replace(data.mask, padding=None)
    allowed = mask.block(0, length) if causal else None
    graphs: dict[str, Graph] = {}
    runs: dict[str, _Run] = {}
    if graft.predicts:
        runs.update(_own(graft, data, mask, (q, k, v), graphs))
    runs[SDPA] = _Run(lambda: F.scaled_dot_product_attention(q, k, v, scale=scale, is_causal=causal))
    if length <= DENSE_LIMIT:
        runs[DENSE] = _Run(lambda: _dense_entmax(q, k, v, scale, allowed))
    name, predict = _other(graft, train, site, data, mask)
    graph = graphs[name] = predict()
    if length <= SLOW_LIMIT:
        runs[f"{name}, dense, masked"] = _Run(
            lambda: masked_attention(q, k, v, graph, scale=scale), name, executor="dense"
        )
    runs[f"{name}, blocks"] = _Run(
        lambda: gathered_attention(q, k, v, graph, scale=scale, size=BLOCK), name, BLOCK, "blocks"
    )
    runs[f"{name}, blocks, prediction included"] = _Run(
        lambda: gathered_attention(q, k, v, predict(), scale=scale, size=BLOCK), name, BLOCK, "blocks"
    )
    if length <= SLOW_LIMIT:
        runs[f"{name}, flex, not compiled"] = _Run(
            lambda: flex_attention(q, k, v, graph, scale=scale, alpha=1.5, size=BLOCK), name, executor="flex"
        )
    gold_alpha = data.site.gold_alpha(0, 1.0) if alpha == 1.0 else None
    quality = {
        each: graph_quality(data.query, data.key, found, scale=data.scale, alpha=alpha, gold_alpha=gold_alpha)
        for each, found in graphs.items()
    }
    rows: list[ExecutorCost] = []
    for backward in (False, True):
        candidates = {
            label: Candidate(run.forward, torch.ones_like(value), leaves)
            if backward
            else Candidate(torch.no_grad()(run.forward))
            for label, run in runs.items()
            if run.executor != "flex" or not backward
        }
        for label, cost in compare_costs(candidates, SDPA, rounds=ROUNDS).items():
            run = runs[label]
            own = None if run.graph is None else quality[run.graph]
            found = None if run.graph is None else graphs[run.graph]
            rows.append(
                ExecutorCost(
                    label,
                    length,
                    backward,
                    cost.seconds,
                    cost.time_ratio,
                    cost.peak_bytes,
                    None if found is None or run.size is None else _computed(found, run.size, run.sort),
                    low=cost.low,
                    high=cost.high,
                    rounds=ROUNDS,
                    graph=run.graph,
                    executor=run.executor,
                    sparsity=None if own is None else own.sparsity,
                    recall=None if own is None else own.recall,
                    mass=None if own is None else own.mass,
                    kept_64=None if own is None else own.kept_blocks[64],
                    kept_16=None if own is None else own.kept_blocks[16],
                    sorted_64=None if found is None else sorted_kept_blocks(found, 64),
                    sorted_16=None if found is None else sorted_kept_blocks(found, 16),
                )
            )
    return rows


def _own(
    graft: SparsefinderAttention,
    data: HeadBatch,
    mask: LazyMask,
    tensors: tuple[Tensor, Tensor, Tensor],
    graphs: dict[str, Graph],
) -> dict[str, _Run]:
    """The module's own attention, prediction included, as a forward pass of the model computes it.

    `tensors` are the measured query, key and value; a scale per head is part of the query.
    """
    config, scale, alpha = graft.config, data.scale, graft.current_alpha()
    call = AttentionCall(data.query, data.key, mask, scale, alpha, None)
    folded = 1.0 if isinstance(scale, Tensor) else scale
    name = f"{OWN} ({config.grouping})"
    graph = graphs[name] = graft.current_graph(call)
    block_size = graph.gathered_size(config.attention_block_size)
    sortable = is_sortable(graph)
    q, k, v = tensors

    def forward(executor: str, sort: bool) -> Tensor:
        return sparse_attention(
            q,
            k,
            v,
            graft.current_graph(call),
            scale=folded,
            alpha=alpha,
            executor=executor,
            block_size=config.attention_block_size,
            exact=config.exact_blocks,
            sort=sort,
        )

    own = config.sort_tokens and sortable
    executor = chosen_executor(graph, config.executor, size=block_size, sort=own)
    size = block_size if executor == "blocks" else None
    runs = {
        f"{name}, prediction included": _Run(
            partial(forward, config.executor, own), name, size, executor, own and size is not None
        )
    }
    if sortable:
        # both orders beside each other, whatever the settings
        for sort in (False, True):
            order = "sorted" if sort else "given"
            runs[f"{name}, blocks in {order} order, prediction included"] = _Run(
                partial(forward, "blocks", sort), name, block_size, "blocks", sort
            )
    return runs


def _computed(graph: Graph, size: int, sort: bool) -> float | None:
    """Share of the allowed key blocks that are computed."""
    return sorted_kept_blocks(graph, size) if sort else kept_blocks(graph, size)


def _alpha(graft: SparsefinderAttention, data: HeadBatch) -> float | Tensor:
    """α of every head of the measured attention, a number or [heads 1 1]."""
    known = plain_numbers(graft.current_alpha()) if data.site.alpha is None else data.site.alpha
    return data.query.new_tensor(known)[:, None, None] if isinstance(known, tuple) else known


def _joined(stored: QueriesKeys, site: int, length: int) -> HeadBatch:
    """Concatenate the queries and keys of consecutive sentences to one sequence, cyclically if there are too few."""
    parts: list[tuple[Tensor, Tensor]] = []
    found = 0
    for sentence in islice(cycle(range(len(stored))), length):
        parts.append(stored.read(sentence, site))
        found += parts[-1][0].shape[1]
        if found >= length:
            break
    query, key = (torch.cat([part[place] for part in parts], 1)[:, :length] for place in (0, 1))  # [heads length width]
    return pad_heads([(query, key)], stored.sites[site])


def _other(
    graft: SparsefinderAttention, train: QueriesKeys | None, site: int, data: HeadBatch, mask: LazyMask
) -> tuple[str, Callable[[], Graph]]:
    """Name and predictor of a graph with few blocks, for comparison with the module's own."""
    clean = SparsefinderConfig()
    length = data.query.shape[2]
    if graft.causal or train is None:
        width = max(3, round(KEPT * length))
        band = replace(clean, grouping="window", window_size=width)
        return f"band of {KEPT:.1%} of the keys", lambda: predict_graph(band, data.query, data.key, mask, Learned())
    config = replace(
        clean, grouping="distance", distance="l2", target_sparsity=1 - KEPT, window_size=3, block_size=BLOCK
    )
    with torch.no_grad():
        thresholds = open_pairs(config, graft, [_joined(train, site, length)]).thresholds(1 - KEPT)

    @torch.no_grad()
    def predict() -> Graph:
        query, key = graft.project(data.query, data.key)
        return predict_graph(config, query, key, mask, Learned(thresholds=thresholds))

    return f"distance of {BLOCK}-token blocks", predict


def _dense_entmax(query: Tensor, key: Tensor, value: Tensor, scale: float, allowed: Tensor | None) -> Tensor:
    scores = (query * scale) @ key.mT  # [batch heads queries keys]
    scores = scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)
    # same solver as for gathered blocks
    return entmax(scores, solver="newton") @ value
