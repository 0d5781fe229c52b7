"""Accuracy of half-precision attention beside SDPA, and accuracy and time of entmax solvers.

The first table shows the largest error against float64 of the same inputs, for scores of a given level. "Rounding" is
the error of the exact result in the type, which no implementation avoids. The second table compares solvers of
1.5-entmax on the same rows: this package; `entmax` by sorting, by partial sorting with its best k, by bisection; and
the Halley bisection of AdaSplash (Gonçalves et al. 2025), written in torch. Rows sum to 1 up to "sum error". Times are
processor times, medians of rounds in which all solvers take turns; the last line names the worst ratio of this package
to the fastest other solver, whose best k is chosen by these times.

    python benchmarks/sparsefinder_numerics.py --threads 1
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import entmax as package
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from common import parser, prepare, processor_times
from graftwork.methods.sparsefinder.entmax import entmax
from graftwork.methods.sparsefinder.executors import sparse_attention
from graftwork.methods.sparsefinder.graphs import Graph, Pattern
from graftwork.surgery.masks import LazyMask

PARTIAL = (16, 32, 64, 128, 256, 512)
"""Numbers of sorted scores tried in partial sorting."""


def exact(scores: Tensor, alpha: float) -> Tensor:
    """Probabilities of scores [*rows keys] in float64 by the package."""
    shifted = scores.double() - scores.double().amax(-1, keepdim=True)
    if alpha == 1.0:
        return torch.softmax(shifted, -1)
    solver: Any = package
    if alpha == 1.5:
        return solver.entmax15(shifted, dim=-1)
    return solver.entmax_bisect(shifted, alpha, dim=-1, n_iter=100)


def halley(scores: Tensor, alpha: float = 1.5, steps: int = 10) -> Tensor:
    """α-entmax of scores [*rows keys] by Halley's method, with bisection for steps that leave the bracket.

    With f(τ) = Σ x₊^q − 1, x = (α − 1) s − τ and q = 1 / (α − 1): τ ← τ − 2 f f' / (2 f'² − f f'').

    Args:
        scores: Scores.
        alpha: α, below 2.
        steps: Iterations; the paper uses few in half precision, float32 needs more.
    """
    scaled, power = scores * (alpha - 1), 1 / (alpha - 1)
    top = scaled.amax(-1, keepdim=True)
    low, high = top - 1, top - scores.shape[-1] ** (1 - alpha)
    tau = (low + high) / 2
    for _ in range(steps):
        rest = (scaled - tau).relu_()
        second = rest.pow(power - 2) * rest.sign() if power != 2.0 else rest.sign()
        first = second * rest
        f = (first * rest).sum(-1, keepdim=True) - 1
        slope, curvature = -power * first.sum(-1, keepdim=True), power * (power - 1) * second.sum(-1, keepdim=True)
        low, high = torch.where(f >= 0, tau, low), torch.where(f >= 0, high, tau)
        moved = tau - 2 * f * slope / (2 * slope.square() - f * curvature)
        tau = torch.where((moved > low) & (moved < high), moved, (low + high) / 2)
    weights = (scaled - tau).relu_().pow_(power)
    return weights / weights.sum(-1, keepdim=True)


def attention_table(levels: Sequence[float]) -> Table:
    """Errors of every executor and SDPA in both half-precision types."""
    table = Table(title="largest error against float64 of the same inputs, 70 tokens, 4 heads of 64")
    for heading in ("type", "score level", "α", "SDPA", "rounding", "dense", "blocks", "flex"):
        table.add_column(heading, justify="right")
    graph = Graph(4, LazyMask(1, 70, 70), pattern=Pattern(window=139))
    for dtype in (torch.bfloat16, torch.float16):
        for level in levels:
            query, key, value = (torch.randn(1, 4, 70, 64) for _ in range(3))
            query[..., 0] = key[..., 0] = math.sqrt(level * 8)
            query, key, value = (x.to(dtype) for x in (query, key, value))
            scores = (query.double() @ key.double().mT) / 8
            for alpha in (1.0, 1.5, 2.0):
                expected = exact(scores, alpha) @ value.double()
                errors = {"rounding": expected.to(dtype)}
                if alpha == 1.0:
                    errors["SDPA"] = F.scaled_dot_product_attention(query, key, value)
                for executor in ("dense", "blocks", "flex"):
                    if executor != "flex" or alpha != 2.0:
                        with torch.no_grad():
                            errors[executor] = sparse_attention(
                                query, key, value, graph, scale=0.125, alpha=alpha, executor=executor, block_size=16
                            )
                found = {name: f"{float((x.double() - expected).abs().max()):.1e}" for name, x in errors.items()}
                names = ("SDPA", "rounding", "dense", "blocks", "flex")
                table.add_row(
                    str(dtype).removeprefix("torch."),
                    f"{level:g}",
                    f"{alpha:g}",
                    *(found.get(name, "–") for name in names),
                )
    return table


def solver_table(options: argparse.Namespace) -> Table:
    """Error, sum error and time of every solver, on rows of several lengths, numbers and scales."""
    table = Table(title="solvers of 1.5-entmax, float32; processor times relative to graftwork, forward pass")
    for heading in ("keys", "scale", "rows", "support", "solver", "error", "sum error", "ns per score", "time"):
        table.add_column(heading, justify="left" if heading == "solver" else "right")
    given: Any = package
    ratios: dict[str, float] = {}
    # many rows, as in a prefill, and a row for each of 12 heads, as in a decoding step
    cases = [
        (keys, rows, scale)
        for keys in options.keys
        for rows in dict.fromkeys((max(1, options.scores // keys), *options.rows))
        for scale in options.scales
    ]
    for keys, rows, scale in cases:
        scores = torch.randn(rows, keys) * scale
        candidates: dict[str, Callable[[Tensor], Tensor]] = {
            "graftwork": entmax,
            "entmax, sort": lambda z: given.entmax15(z, dim=-1),
            "entmax, bisection": lambda z: given.entmax_bisect(z, 1.5, dim=-1, n_iter=25),
            "Halley bisection": halley,
        }
        partial = {
            f"entmax, partial sort k={k}": lambda z, k=k: given.entmax15(z, dim=-1, k=k) for k in PARTIAL if k < keys
        }
        calls = {name: functools.partial(solve, scores) for name, solve in {**candidates, **partial}.items()}
        times = processor_times(calls, options.rounds, max(1, (1 << 16) // scores.numel()))
        best = min(partial, key=lambda name: times[name]) if partial else None
        shown = {**candidates, **({best: partial[best]} if best else {})}
        ratio = times["graftwork"] / min(seconds for name, seconds in times.items() if name != "graftwork")
        ratios[f"{keys} keys, {rows} rows, scale {scale:g}"] = ratio
        expected = exact(scores, 1.5)
        for name, solve in shown.items():
            found = solve(scores).double()
            table.add_row(
                str(keys),
                f"{scale:g}",
                str(rows),
                f"{float((expected > 0).sum(-1).double().mean()):.1f}",
                name,
                f"{float((found - expected).abs().max()):.1e}",
                f"{float((found.sum(-1) - 1).abs().max()):.1e}",
                f"{times[name] / scores.numel() * 1e9:.1f}",
                f"{times[name] / times['graftwork']:.2f}",
            )
        table.add_section()
    worst = max(ratios, key=lambda case: ratios[case])
    table.caption = f"worst ratio of graftwork to the fastest other solver: {ratios[worst]:.2f} ({worst})"
    return table


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--keys", type=int, nargs="+", default=[32, 128, 512, 2048, 8192])
    options.add_argument("--scales", type=float, nargs="+", default=[1.0, 10.0], help="larger: sparser rows")
    options.add_argument("--rows", type=int, nargs="+", default=[12], help="further numbers of rows")
    options.add_argument("--scores", type=int, default=1 << 19, help="scores of a solver's call")
    options.add_argument("--levels", type=float, nargs="+", default=[0.0, 30.0, 300.0, 3000.0])
    options.add_argument("--solvers-only", action="store_true")
    chosen = options.parse_args()
    prepare(chosen)
    console = Console(width=140)
    if not chosen.solvers_only:
        console.print(attention_table(chosen.levels))
    console.print(solver_table(chosen))


if __name__ == "__main__":
    main()
