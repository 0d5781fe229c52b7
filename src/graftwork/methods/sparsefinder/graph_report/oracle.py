"""Attention that a budget of key blocks keeps: gold, predicted, window, pooled and best possible choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.errors import ConfigError
from graftwork.methods.sparsefinder.block_scores import mean_scores, page_scores, pool_keys, pool_queries
from graftwork.methods.sparsefinder.config import BLOCKWISE
from graftwork.methods.sparsefinder.entmax import entmax
from graftwork.methods.sparsefinder.executors import per_head
from graftwork.methods.sparsefinder.extraction import has_labelled_decoder, real_queries
from graftwork.methods.sparsefinder.graphs import Graph, gold_pairs
from graftwork.methods.sparsefinder.modules import (
    AttentionCall,
    Rule,
    SparsefinderAttention,
    observe_calls,
    override_rules,
    sparsefinder_modules,
)
from graftwork.methods.sparsefinder.tensors import numbers, unflatten
from graftwork.surgery.masks import LazyMask, PositionBias
from graftwork.surgery.precision import attention_scores

BUDGETS = (0.125, 0.25)
"""Shares of the allowed key blocks that the choices may keep."""
BLOCK = 16
"""Tokens per block."""
ROWS_AT_ONCE = 256
"""Number of queries whose scores are in memory at a time."""

GOLD, WINDOW, MEAN_POOLED, PAGES = "gold graph", "window", "mean-pooled q·k", "pages (bounds of keys)"
BEST = "best possible"
PREDICTED = "predicted"
"""Start of the name of the model's own graph."""


@dataclass(frozen=True)
class Choice:
    """Attention that one choice of key blocks keeps in one module, by head; averages over sequences."""

    module: str
    """Path of the attention module."""
    name: str
    """Rule by which blocks are chosen."""
    budget: float | None
    """Share of the allowed blocks that may be kept; null for the gold graph, which keeps every block it needs."""
    recall: tuple[float, ...]
    """Share of the gold pairs in the kept blocks."""
    mass: tuple[float, ...]
    """Attention probability in the kept blocks, averaged over queries."""
    kept: tuple[float, ...]
    """Share of the allowed blocks that are kept."""


@dataclass(frozen=True, slots=True, eq=False)
class BlockSums:
    """Gold pairs and attention mass of every block of one sequence, with the number of queries."""

    gold: Tensor
    """Number of gold pairs [heads rows columns]."""
    mass: Tensor
    """Sum of the attention probabilities [heads rows columns]."""
    pairs: Tensor
    """Number of allowed pairs [rows columns]."""
    queries: int
    """Number of queries with an allowed key."""

    @property
    def allowed(self) -> Tensor:
        """True for blocks with an allowed pair [rows columns]."""
        return self.pairs > 0


@torch.no_grad()
def measure_choices(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    budgets: Sequence[float] = BUDGETS,
    block_size: int = BLOCK,
) -> list[Choice]:
    """Measure all choices in every Sparsefinder module during one forward pass, which computes all scores.

    Every choice keeps the same number of blocks of a head: the budget times the allowed blocks, rounded down, at least
    one. The best possible recall and the best possible mass belong to two different choices.

    Args:
        model: Converted model; with α = 1 its attention is the original softmax.
        batch: Inputs of the model.
        budgets: Shares of the allowed blocks.
        block_size: Tokens per block.

    Raises:
        ConfigError: If a budget is no share, or the model has no Sparsefinder module.
    """
    for budget in budgets:
        if not 0 < budget <= 1:
            raise ConfigError(f"budget is {budget}. Expected a share of the key blocks above 0, up to 1.")
    grafts = sparsefinder_modules(model)
    paths = {id(graft): path for path, graft in grafts.items()}
    if not paths:
        raise ConfigError("Found no sparsefinder on the model. Convert it first.")
    # the pass computes all scores, so that every choice has the same queries and keys
    own = {id(graft): graft.rule if graft.predicts else None for graft in grafts.values()}
    whole = {path: Rule(replace(graft.config, grouping=None), graft.learned()) for path, graft in grafts.items()}
    found: dict[str, list[Choice]] = {}
    labelled = has_labelled_decoder(model)

    def observe(graft: SparsefinderAttention, call: AttentionCall) -> None:
        path = paths[id(graft)]
        real = real_queries(path, call, batch, graft.cross, labelled=labelled)
        rule = own[id(graft)]
        graphs = [None if rule is None else _graph_within(graft, rule, call, real, budget) for budget in budgets]
        name = f"{PREDICTED} ({'' if rule is None else rule.config.grouping})"
        single = [_sequence(call, row, real) for row in range(len(call.query))]
        parts = [
            _choices(path, one, real[row], (name, graphs, row), budgets, block_size) for row, one in enumerate(single)
        ]
        found[path] = [_average([part[number] for part in parts]) for number in range(len(parts[0]))]

    training = model.training
    model.eval()
    with override_rules(model, whole), observe_calls(model, observe):
        model(**batch)
    model.train(training)
    return [choice for path in paths.values() for choice in found[path]]


def _graph_within(graft: SparsefinderAttention, rule: Rule, call: AttentionCall, real: Tensor, budget: float) -> Graph:
    """Graph of the module by its own rule, with the given budget if it chooses key blocks."""
    before = graft.override
    blocks = rule.config.grouping in BLOCKWISE
    graft.override = Rule(replace(rule.config, block_budget=budget), rule.learned) if blocks else rule
    try:
        return graft.current_graph(call, real)
    finally:
        graft.override = before


def block_sums(call: AttentionCall, real: Tensor, size: int) -> BlockSums:
    """Sum gold pairs and probabilities of one sequence over blocks, a few queries at a time.

    Args:
        call: Call with one sequence.
        real: True for non-padding queries [queries].
        size: Tokens per block.
    """
    queries, keys = call.query.shape[2], call.key.shape[2]
    columns = -(-keys // size)
    alpha = per_head(call.alpha)
    softmax = not isinstance(alpha, Tensor) and alpha == 1.0
    step = max(size, ROWS_AT_ONCE // size * size)
    sums: list[list[Tensor]] = [[], [], []]
    counted = 0
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        scores = attention_scores(call.query[:, :, start:stop], call.key, call.scale, centred=True)
        if isinstance(call.bias, PositionBias):
            scores = scores + call.bias.block(start, stop, keys)
        elif call.bias is not None:
            scores = scores + call.bias[:, :, start:stop]
        block = call.mask.block(start, stop, device=scores.device)
        allowed = torch.ones_like(scores[:, :1], dtype=torch.bool) if block is None else block.expand_as(scores[:, :1])
        allowed = allowed & real[start:stop, None]  # [1 1 rows keys] & [rows 1]
        weights = entmax(scores.masked_fill(~allowed, -torch.inf), alpha)[0]  # [heads rows keys]
        counted += int(allowed.any(-1).sum())
        for place, each in enumerate((gold_pairs(weights, softmax=softmax), weights, allowed[0])):
            sums[place].append(_by_block(each.float(), size, columns))
    gold, mass, pairs = (torch.cat(own, 1) for own in sums)
    return BlockSums(gold, mass, pairs[0], counted)


def _by_block(values: Tensor, size: int, columns: int) -> Tensor:
    """Sums over blocks [heads rows/size columns] of values [heads rows keys]."""
    missing = -values.shape[1] % size, columns * size - values.shape[2]
    padded = nn.functional.pad(values, (0, missing[1], 0, missing[0]))
    return unflatten(unflatten(padded, 2, (columns, size)), 1, (-1, size)).sum((2, 4))


def _choices(
    path: str,
    call: AttentionCall,
    real: Tensor,
    predicted: tuple[str, Sequence[Graph | None], int],
    budgets: Sequence[float],
    size: int,
) -> list[Choice]:
    """All choices of one sequence in one module; `predicted` has one graph for each budget."""
    sums = block_sums(call, real, size)
    allowed = sums.allowed
    total = max(1, int(allowed.sum()))
    orders = _orders(call, real, sums, size)
    name, graphs, row = predicted
    gold = sums.gold > 0
    choices = [_choice(path, GOLD, None, gold, sums, total)]
    for budget, graph in zip(budgets, graphs, strict=True):
        count = max(1, int(budget * total))
        if graph is not None:
            orders[name] = _graph_order(graph, row, sums, size) - _distance(allowed, size, call) * 1e-6
        for each, order in orders.items():
            choices.append(_choice(path, each, budget, _largest(order, allowed, count), sums, total))
        best = [_largest(values, allowed, count) for values in (sums.gold, sums.mass)]
        recall, mass = (_choice(path, BEST, budget, each, sums, total) for each in best)
        choices.append(Choice(path, BEST, budget, recall.recall, mass.mass, mass.kept))
    return choices


def _graph_order(graph: Graph, row: int, sums: BlockSums, size: int) -> Tensor:
    """Share of the allowed pairs of every block that are edges [heads rows columns]; −∞ for blocks without an edge.

    A share, because the own block of a decoder has about half of the allowed pairs of a past block.
    """
    parts = [
        _by_block(graph.rows(start, min(start + size, graph.mask.queries))[row].float(), size, sums.pairs.shape[1])
        for start in range(0, graph.mask.queries, size)
    ]
    edges = torch.cat(parts, 1)
    return (edges / sums.pairs.clamp_min(1)).masked_fill(edges == 0, -torch.inf)


def _orders(call: AttentionCall, real: Tensor, sums: BlockSums, size: int) -> dict[str, Tensor]:
    """Estimates of every block by rule [heads rows columns]; larger is better."""
    heads = call.query.shape[1]
    keys_real = (
        torch.ones(1, call.key.shape[2], dtype=torch.bool, device=call.key.device)
        if call.mask.padding is None
        else call.mask.padding.to(call.key.device)
    )
    pooled = pool_keys(call.key, keys_real, size)
    query = pool_queries(call.query, real[None], size)
    near = -_distance(sums.allowed, size, call)
    return {
        WINDOW: near.expand(heads, -1, -1),
        MEAN_POOLED: mean_scores(query, pooled)[0],
        PAGES: page_scores(query, pooled)[0],
    }


def _distance(allowed: Tensor, size: int, call: AttentionCall) -> Tensor:
    """Distance of every query block to every key block, in blocks [rows columns]."""
    rows, columns = (torch.arange(count, device=allowed.device) for count in allowed.shape)
    offset = (call.mask.query_offset - call.mask.key_offset) // size
    return (rows[:, None] + offset - columns).abs().float()


def _largest(order: Tensor, allowed: Tensor, count: int) -> Tensor:
    """True for the `count` allowed blocks of every head with the largest values [heads rows columns]."""
    flat = order.masked_fill(~allowed, -torch.inf).flatten(1)  # [heads rows·columns]
    # stable: among equal values the earlier block
    chosen = flat.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, chosen, True) & (flat > -torch.inf)
    return kept.view_as(order)


def _choice(path: str, name: str, budget: float | None, kept: Tensor, sums: BlockSums, total: int) -> Choice:
    gold = sums.gold.sum((1, 2)).clamp_min(1)
    return Choice(
        path,
        name,
        budget,
        tuple(numbers((sums.gold * kept).sum((1, 2)) / gold)),
        tuple(numbers((sums.mass * kept).sum((1, 2)) / max(1, sums.queries))),
        tuple(numbers(kept.sum((1, 2)) / total)),
    )


def _average(choices: Sequence[Choice]) -> Choice:
    """Average one choice over sequences."""

    def mean(field: str) -> tuple[float, ...]:
        return tuple(numbers(torch.tensor([getattr(choice, field) for choice in choices]).mean(0)))

    first = choices[0]
    return Choice(first.module, first.name, first.budget, mean("recall"), mean("mass"), mean("kept"))


def _sequence(call: AttentionCall, row: int, real: Tensor) -> AttentionCall:
    """One sequence of a call."""
    mask, bias = call.mask, call.bias
    whole = mask.predicate

    def predicate(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return None if whole is None else whole(batch + row, head, query, key)

    one = LazyMask(
        1,
        mask.queries,
        mask.keys,
        causal=mask.causal,
        query_offset=mask.query_offset,
        key_offset=mask.key_offset,
        padding=None if mask.padding is None else mask.padding[row : row + 1],
        predicate=None if whole is None else predicate,
        vectorised=mask.vectorised,
    )
    if isinstance(bias, Tensor) and bias.shape[0] > 1:
        bias = bias[row : row + 1]
    return AttentionCall(call.query[row : row + 1], call.key[row : row + 1], one, call.scale, call.alpha, bias)
