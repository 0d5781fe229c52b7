"""How a predicted attention graph compares with the true one, and which settings of many are worth having."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class GraphCounts:
    """What is counted of a graph per sentence and head; every ratio follows from these, macro or micro."""

    pairs: Float[Tensor, "sentences heads"]
    """Pairs that the mask allows."""
    predicted: Float[Tensor, "sentences heads"]
    gold: Float[Tensor, "sentences heads"]
    hit: Float[Tensor, "sentences heads"]
    """Gold edges that are predicted."""
    rows: Float[Tensor, "sentences heads"]
    """Real queries that may see a key."""
    exact_rows: Float[Tensor, "sentences heads"]
    """Rows whose gold edges are all predicted."""
    empty_rows: Float[Tensor, "sentences heads"]
    """Rows without any predicted edge."""

    def ratios(self, *, micro: bool = False) -> dict[str, Float[Tensor, " heads"]]:
        """Sparsity, gold sparsity, recall, precision, exact fraction and share of empty rows, per head.

        Args:
            micro: Divide sums over sentences; else average the ratios of sentences.
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
        """The counts of several batches of sentences as one."""
        return GraphCounts(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(GraphCounts)))


def graph_counts(
    predicted: Bool[Tensor, "sentences heads queries keys"],
    gold: Bool[Tensor, "sentences heads queries keys"],
    allowed: Bool[Tensor, "sentences 1 queries keys"],
) -> GraphCounts:
    """Count edges inside what is allowed: real queries × real keys, and causal where that holds.

    Source: section 3.12 of the Sparsefinder specification.
    """
    predicted, gold = predicted & allowed, gold & allowed
    rows = allowed.any(-1).expand(predicted.shape[:3])

    def total(flags: Tensor) -> Tensor:
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


def pack_edges(edges: Bool[Tensor, "... queries keys"]) -> np.ndarray:
    """A graph as bits, eight keys a byte: what `packed_counts` works on, and an eighth of the memory."""
    return np.packbits(edges.cpu().numpy(), axis=-1)


def packed_counts(predicted: np.ndarray, gold: np.ndarray, allowed: np.ndarray) -> GraphCounts:
    """`graph_counts` on packed graphs; the gold graph lies inside what is allowed already."""
    predicted = predicted & allowed
    rows = np.broadcast_to(allowed.any(-1), predicted.shape[:3])

    def bits(packed: np.ndarray) -> Tensor:
        counted = np.bitwise_count(packed).sum((-2, -1), dtype=np.float64)
        return torch.from_numpy(np.broadcast_to(counted, predicted.shape[:2]).copy())

    def flags(found: Any) -> Tensor:
        return torch.from_numpy((found & rows).sum(-1, dtype=np.float64))

    return GraphCounts(
        bits(allowed),
        bits(predicted),
        bits(gold),
        bits(predicted & gold),
        flags(np.ones_like(rows)),
        flags(~(gold & ~predicted).any(-1)),
        flags(~predicted.any(-1)),
    )


def bucket_entropy(
    flags: Bool[Tensor, "sentences heads tokens buckets"], real: Bool[Tensor, "sentences tokens"], clusters: int
) -> Float[Tensor, " heads"]:
    """Entropy of bucket use over real tokens, divided by its largest value log C; 0 for a single bucket."""
    counts = (flags & real[:, None, :, None]).sum((0, 2)).double()
    share = counts / counts.sum(-1, keepdim=True).clamp_min(1)
    entropy = -(share * share.clamp_min(1e-300).log()).sum(-1)
    return entropy / torch.tensor(float(clusters)).log() if clusters > 1 else torch.zeros_like(entropy)


def pareto_frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both coordinates, by the first.

    Example:
        >>> pareto_frontier([(0.9, 0.5), (0.8, 0.7), (0.8, 0.6)])
        [(0.8, 0.7), (0.9, 0.5)]
    """
    best: list[tuple[float, float]] = []
    for x, y in sorted(set(points), key=lambda point: (-point[0], -point[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best[::-1]


def value_at(points: Sequence[tuple[float, float]], least: float) -> float | None:
    """The best second coordinate among points whose first is at least `least`; None if there is none."""
    reached = [y for x, y in points if x >= least]
    return max(reached) if reached else None


def hypervolume(points: Sequence[tuple[float, float]], low: float, high: float) -> float:
    """Area under the frontier, as steps, between two values of the first coordinate; zero where nothing reaches."""
    area, at = 0.0, low
    for x, y in pareto_frontier(points):
        if x > at:
            upper = min(x, high)
            area += max(upper - at, 0.0) * y
            at = max(at, upper)
    return area


def _ratio(part: Tensor, whole: Tensor, otherwise: float) -> Tensor:
    return torch.where(whole > 0, part / whole.clamp_min(1), torch.full_like(part, otherwise))
