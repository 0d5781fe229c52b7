"""Reference implementation of Sparsefinder: literal, slow definitions that the tests compare against.

Numbers in parentheses are sections of the specification.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def entmax(z: Float[Tensor, " keys"], alpha: float = 1.5, steps: int = 200) -> Float[Tensor, " keys"]:
    """p_j = [(α−1) z_j − τ]₊^{1/(α−1)} with Σ p = 1, τ by bisection; zeros if every z is −∞ (3.1).

    The limit α → 1 is softmax.
    """
    if bool((z == -torch.inf).all()):
        return torch.zeros_like(z)
    if alpha == 1.0:
        return torch.softmax(z, dim=0)
    x = (alpha - 1) * z
    low, high = float(x.max()) - 1.0, float(x.max())
    for _ in range(steps):
        tau = (low + high) / 2
        total = float(((x - tau).clamp_min(0.0) ** (1 / (alpha - 1))).sum())
        low, high = (tau, high) if total >= 1 else (low, tau)
    return (x - low).clamp_min(0.0) ** (1 / (alpha - 1))


def attention(
    q: Float[Tensor, "queries width"],
    k: Float[Tensor, "keys width"],
    v: Float[Tensor, "keys value_width"],
    graph: Bool[Tensor, "queries keys"],
    *,
    scale: float,
    alpha: float = 1.5,
) -> Float[Tensor, "queries value_width"]:
    """Σ_j entmax_α(scale · q_i·k_j)_j v_j over the connected keys j of each query i; zeros without a key (5, 8.3).

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        graph: True for connected pairs.
        scale: Factor on query·key.
        alpha: α of entmax.
    """
    rows: list[Tensor] = []
    for i in range(len(q)):
        z = torch.tensor([float(q[i] @ k[j]) * scale if graph[i, j] else -math.inf for j in range(len(k))])
        rows.append(entmax(z.to(q.dtype), alpha).to(v.dtype) @ v)
    return torch.stack(rows)


def gold_graph(
    q: Float[Tensor, "queries width"], k: Float[Tensor, "keys width"], *, scale: float, causal: bool = False
) -> Bool[Tensor, "queries keys"]:
    """Pairs with a positive entmax probability (3.2)."""
    z = scale * q @ k.T
    if causal:
        z = z.masked_fill(torch.ones_like(z, dtype=torch.bool).triu(1), -math.inf)
    return torch.stack([entmax(row) for row in z]) > 1e-12


def sum_hinge(
    distance: Float[Tensor, "queries keys"],
    gold: Bool[Tensor, "queries keys"],
    negative: Bool[Tensor, "queries keys"],
    margin: float = 1.0,
) -> float:
    """Mean of max(0, ω + Σ_P D − Σ_N D) over the queries that have both P and N (3.4)."""
    losses: list[float] = []
    for i in range(len(distance)):
        if gold[i].any() and negative[i].any():
            near = sum(float(distance[i, j]) for j in range(len(gold[i])) if gold[i, j])
            far = sum(float(distance[i, j]) for j in range(len(gold[i])) if negative[i, j])
            losses.append(max(0.0, margin + near - far))
    return sum(losses) / len(losses) if losses else 0.0


def fixed_bins(x: Float[Tensor, " tokens"], size: int) -> list[int]:
    """⌊rank / size⌋ of each value (3.7)."""
    order = sorted(range(len(x)), key=lambda i: (float(x[i]), i))
    return [order.index(i) // size for i in range(len(x))]


def dynamic_bins(x: Float[Tensor, " tokens"], size: int, temperature: float = 1.0) -> list[int]:
    """Number of boundaries −1 + 2i/β below tanh(temperature · x), β = ⌈tokens / size⌉ (3.7)."""
    beta = math.ceil(len(x) / size)
    return [sum(-1 + 2 * i / beta < math.tanh(temperature * float(value)) for i in range(1, beta)) for value in x]


def nearest_clusters(x: Float[Tensor, " width"], centres: Float[Tensor, "clusters width"], top: int) -> set[int]:
    """The `top` nearest centroids by squared distance, ties to the lower number (3.8)."""
    squared = [(float((x - centre).square().sum()), c) for c, centre in enumerate(centres)]
    return {c for _, c in sorted(squared)[:top]}


def final_graph(
    predicted: Bool[Tensor, "queries keys"],
    *,
    window: int = 0,
    first: bool = False,
    last: bool = False,
    causal: bool = False,
) -> Bool[Tensor, "queries keys"]:
    """(predicted ∪ band ∪ global) ∩ causal, for one sentence without padding (3.9).

    Args:
        predicted: True for predicted pairs.
        window: Width of the band.
        first: Connect the first token with all tokens.
        last: Connect the last token with all tokens.
        causal: Remove pairs with a later key.
    """
    n, m = predicted.shape
    graph = predicted.clone()
    for i in range(n):
        for j in range(m):
            band = window > 0 and -(math.ceil(window / 2) - 1) <= j - i <= window // 2
            star = (first and (i == 0 or j == 0)) or (last and (i == n - 1 or j == m - 1))
            graph[i, j] = bool((graph[i, j] or band or star) and not (causal and j > i))
    return graph


def graph_metrics(
    predicted: Bool[Tensor, "queries keys"], gold: Bool[Tensor, "queries keys"], *, causal: bool = False
) -> dict[str, float]:
    """Sparsity, gold sparsity, recall, precision and share of exact rows of one sentence and head (3.12)."""
    n, m = gold.shape
    pairs = n * (n + 1) / 2 if causal else n * m
    hit = int((predicted & gold).sum())
    return {
        "sparsity": 1 - int(predicted.sum()) / pairs,
        "gold_sparsity": 1 - int(gold.sum()) / pairs,
        "recall": hit / int(gold.sum()),
        "precision": hit / int(predicted.sum()) if predicted.any() else 0.0,
        "exact": sum(bool((gold[i] & ~predicted[i]).sum() == 0) for i in range(n)) / n,
    }
