"""Sparsity, recall and precision of predicted attention graphs, and Pareto frontiers of settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

Packed = NDArray[np.uint8]
"""Graph with eight keys per byte [... queries ⌈keys/8⌉]."""


@dataclass(frozen=True, slots=True, eq=False)
class GraphCounts:
    """Edge and row counts of a graph per sentence and head, from which all ratios are computed."""

    pairs: Float[Tensor, "sentences heads"]
    """Number of query-key pairs that the mask allows."""
    predicted: Float[Tensor, "sentences heads"]
    """Number of predicted edges."""
    gold: Float[Tensor, "sentences heads"]
    """Number of gold edges."""
    hit: Float[Tensor, "sentences heads"]
    """Number of predicted gold edges."""
    rows: Float[Tensor, "sentences heads"]
    """Number of queries with at least one allowed key."""
    exact_rows: Float[Tensor, "sentences heads"]
    """Number of rows whose gold edges are all predicted."""
    empty_rows: Float[Tensor, "sentences heads"]
    """Number of rows without predicted edges."""

    def ratios(self, *, micro: bool = False) -> dict[str, Float[Tensor, " heads"]]:
        """Ratios per head: sparsity, gold sparsity, recall, precision, exact rows and empty rows.

        With P predicted edges, G gold edges, H predicted gold edges, N allowed pairs and R rows: sparsity = 1 − P/N,
        gold sparsity = 1 − G/N, recall = H/G, precision = H/P, exact = exact rows/R, empty_rows = empty rows/R.

        Args:
            micro: Divide sums over sentences instead of averaging the ratios of sentences.
        """
        part = GraphCounts(*(getattr(self, f.name).sum(0, keepdim=True) for f in fields(self))) if micro else self
        ratios = {
            "sparsity": 1 - _ratio(part.predicted, part.pairs, 1.0),
            "gold_sparsity": 1 - _ratio(part.gold, part.pairs, 1.0),
            "recall": _ratio(part.hit, part.gold, 1.0),
            "precision": _ratio(part.hit, part.predicted, 0.0),
            "exact": _ratio(part.exact_rows, part.rows, 1.0),
            "empty_rows": _ratio(part.empty_rows, part.rows, 0.0),
        }
        return {name: value.mean(0) for name, value in ratios.items()}

    @staticmethod
    def join(parts: Sequence[GraphCounts]) -> GraphCounts:
        """Concatenate the counts of several batches."""
        return GraphCounts(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(GraphCounts)))


def graph_counts(
    predicted: Bool[Tensor, "sentences heads queries keys"],
    gold: Bool[Tensor, "sentences heads queries keys"],
    allowed: Bool[Tensor, "sentences 1 queries keys"],
) -> GraphCounts:
    """Count the edges among the allowed pairs.

    Args:
        predicted: Predicted graph.
        gold: Graph of the true attention.
        allowed: Pairs of real queries and real keys, lower triangular if attention is causal.

    Source: section 3.12 of the Sparsefinder specification.
    """
    predicted, gold = predicted & allowed, gold & allowed
    rows = allowed.any(-1).expand(predicted.shape[:3])  # [sentences 1 queries] → [sentences heads queries]

    def total(flags: Tensor) -> Tensor:
        # [sentences heads queries keys] or [sentences heads queries] → [sentences heads]
        return flags.sum((-2, -1)).double() if flags.ndim == 4 else flags.sum(-1).double()

    return GraphCounts(
        total(allowed.expand_as(predicted)),
        total(predicted),
        total(gold),
        total(predicted & gold),
        total(rows),
        total(~(gold & ~predicted).any(-1) & rows),
        total(~predicted.any(-1) & rows),
    )


def pack_edges(edges: Bool[Tensor, "... queries keys"]) -> Packed:
    """Pack a graph into bits along the keys, [... queries keys] → [... queries ⌈keys/8⌉]: an eighth of the memory."""
    return np.packbits(edges.cpu().numpy(), axis=-1)


def packed_counts(predicted: Packed, gold: Packed, allowed: Packed) -> GraphCounts:
    """`graph_counts` on graphs packed by `pack_edges`; gold must be a subset of allowed."""
    predicted = predicted & allowed
    # [sentences 1 queries] → [sentences heads queries]
    rows = np.broadcast_to(allowed.any(-1), predicted.shape[:3])

    def bits(packed: Packed) -> Tensor:
        # [sentences heads queries bytes] → [sentences heads]; allowed has one head and is broadcast
        counted = np.bitwise_count(packed).sum((-2, -1), dtype=np.float64)
        return torch.as_tensor(np.broadcast_to(counted, predicted.shape[:2]).copy())

    def flags(found: NDArray[np.bool_]) -> Tensor:
        # [sentences heads queries] → [sentences heads]
        return torch.as_tensor((found & rows).sum(-1, dtype=np.float64))

    return GraphCounts(
        bits(allowed),
        bits(predicted),
        bits(gold),
        bits(predicted & gold),
        flags(np.ones_like(rows)),
        flags(np.logical_not((gold & ~predicted).any(-1))),
        flags(np.logical_not(predicted.any(-1))),
    )


def pareto_frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Pareto-optimal points (both coordinates: higher is better), sorted by the first coordinate.

    Example:
        >>> pareto_frontier([(0.9, 0.5), (0.8, 0.7), (0.8, 0.6)])
        [(0.8, 0.7), (0.9, 0.5)]
    """
    best: list[tuple[float, float]] = []
    for x, y in sorted(set(points), key=lambda point: (-point[0], -point[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best[::-1]


def hypervolume(points: Sequence[tuple[float, float]], low: float, high: float) -> float:
    """Area under the Pareto frontier as a step function, for first coordinates in [low, high]."""
    area, at = 0.0, low
    for x, y in pareto_frontier(points):
        if x > at:
            upper = min(x, high)
            area += max(upper - at, 0.0) * y
            at = max(at, upper)
    return area


def _ratio(part: Tensor, whole: Tensor, otherwise: float) -> Tensor:
    """Elementwise part / whole; `otherwise` where whole is 0."""
    return torch.where(whole > 0, part / whole.clamp_min(1), torch.full_like(part, otherwise))
