"""Plots of attention graphs: curves of predictors, heat maps per module and head, single graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap

from graftwork.methods.sparsefinder.graph_report.oracle import Choice
from graftwork.reporting.picture import COLOURS, DENSE_COLOUR, Picture
from graftwork.reporting.plots import SIZE, finish_figure

Frontier = Sequence[tuple[float, float]]
"""Points (sparsity, score)."""

Matrix = np.ndarray[tuple[int, int], np.dtype[np.float64]]

FARTHEST = 2.5
"""Upper limit of the perplexity axis, relative to the best perplexity."""


def pareto(
    frontiers: Mapping[str, Frontier],
    points: Mapping[str, Frontier],
    gold_sparsity: float,
    score: str = "recall",
    lines: Mapping[str, float] | None = None,
) -> Picture:
    """Draw all settings faintly, the frontier of each method as steps, and the gold sparsity as a dotted line.

    Args:
        frontiers: Frontier of each method, sorted by sparsity.
        points: All settings of each method.
        gold_sparsity: Position of the dotted line.
        score: Name of the second axis; the axis of perplexity is inverted, so that higher is better.
        lines: Scores without sparsity by name, drawn as horizontal lines.
    """
    figure, axes = _subplots(figsize=SIZE)
    for number, (name, frontier) in enumerate(frontiers.items()):
        colour = DENSE_COLOUR if name == "window" else COLOURS[number % len(COLOURS)]
        style = "--" if number >= len(COLOURS) else "-"
        axes.scatter(*_columns(points.get(name, ())), s=8, color=colour, alpha=0.2, linewidths=0)
        width = 2.2 if name == "window" else 1.4
        axes.step(
            *_columns(frontier),
            where="pre",
            color=colour,
            linestyle=style,
            linewidth=width,
            label=name,
            marker=".",
        )
    axes.axvline(gold_sparsity, color=DENSE_COLOUR, linestyle=":", linewidth=1)
    for name, value in (lines or {}).items():
        axes.axhline(value, color=DENSE_COLOUR, linestyle="--", linewidth=1, alpha=0.7)
        axes.text(0.01, value, f" {name}", transform=axes.get_yaxis_transform(), fontsize=8, va="bottom")
    if score == "perplexity":
        best = min(y for own in points.values() for _, y in own)
        # outliers are cut off, because they would compress all other curves
        axes.set_ylim(best * 0.97, min(best * FARTHEST, max(y for own in points.values() for _, y in own) * 1.03))
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(axis="y", which="minor", labelsize=7)
        axes.invert_yaxis()
    axes.set_xlabel("sparsity (dotted: that of the entmax graph)")
    axes.set_ylabel(f"{score} (simulated)")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return finish_figure(figure, axes)


def time_of_executors(rows: Sequence[Mapping[str, Any]]) -> Picture:
    """Draw milliseconds of one attention layer against length, one line per executor.

    Args:
        rows: Measurements with `label`, `length`, `backward` and `seconds`.
    """
    figure, panels = _subplots(1, 2, figsize=(10, 4.2), sharey=True)
    labels = list(dict.fromkeys(row["label"] for row in rows))
    for axes, backward in zip(panels, (False, True), strict=True):
        for number, name in enumerate(labels):
            own = sorted(
                (row["length"], 1000 * row["seconds"])
                for row in rows
                if row["label"] == name and row["backward"] == backward
            )
            if own:
                colour = DENSE_COLOUR if name.startswith("SDPA") else COLOURS[number % len(COLOURS)]
                axes.plot(*_columns(own), marker="o", color=colour, label=name)
        lengths = sorted({row["length"] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("tokens")
        axes.set_title("forward + backward" if backward else "forward", fontsize=10)
    panels[0].set_ylabel("ms (measured)")
    panels[1].grid(alpha=0.25)
    for side in ("top", "right"):
        panels[1].spines[side].set_visible(False)
    return finish_figure(figure, panels[0])


def heat_maps(values: Mapping[str, Sequence[Sequence[float]]], modules: Sequence[str]) -> bytes:
    """Draw one map of modules × heads per measure, side by side."""
    figure, all_axes = _subplots(1, len(values), figsize=(3.4 * len(values), 0.7 + 0.34 * len(modules)), squeeze=False)
    for axes, (name, rows) in zip(all_axes[0], values.items(), strict=True):
        picture = axes.imshow(np.array(rows), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.set_xlabel("head", fontsize=8)
        axes.set_yticks(range(len(modules)), [_short(module) for module in modules], fontsize=7)
        figure.colorbar(picture, ax=axes, fraction=0.046)
    return _plain(figure)


def choice_maps(choices: Sequence[Choice], modules: Sequence[str]) -> Picture:
    """Draw recall and mass of every choice of blocks as maps of modules × heads; of the gold graph, kept blocks.

    Args:
        choices: Choices of one budget in every module.
        modules: Paths of the modules, one row each.
    """
    names = list(dict.fromkeys(choice.name for choice in choices))
    # the gold graph has recall 1 by definition; the blocks it needs are of interest
    fields = ("kept", "mass") if choices[0].budget is None else ("recall", "mass")
    height = 0.9 + 0.3 * len(modules)
    figure, all_axes = _subplots(len(names), 2, figsize=(6, height * len(names)), squeeze=False)
    for axes_of, name in zip(all_axes, names, strict=True):
        own = {choice.module: choice for choice in choices if choice.name == name}
        for axes, field in zip(axes_of, fields, strict=True):
            widest = max(len(getattr(own[module], field)) for module in modules)
            rows = np.full((len(modules), widest), np.nan)
            for number, module in enumerate(modules):
                values = getattr(own[module], field)
                rows[number, : len(values)] = values
            picture = axes.imshow(rows, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            mean = float(np.nanmean(rows))
            axes.set_title(f"{name}\n{'blocks kept' if field == 'kept' else field} {mean:.2f}", fontsize=12)
            axes.set_xlabel("head", fontsize=11)
            axes.set_yticks(range(len(modules)), [_short(module) for module in modules], fontsize=11)
            axes.tick_params(axis="x", labelsize=11)
            figure.colorbar(picture, ax=axes, fraction=0.046)
    return Picture(_plain(figure))


def one_head(gold: Matrix, predicted: Matrix, fixed: Matrix, resulting: Matrix, title: str = "") -> bytes:
    """Draw the gold graph, the predicted graph and the resulting attention, as matrices and as lines between tokens.

    Args:
        gold: Entmax probabilities without a graph [queries keys].
        predicted: 0/1 predicted graph [queries keys].
        fixed: 0/1 graph of band and global tokens [queries keys], drawn in another colour.
        resulting: Entmax probabilities along the predicted graph [queries keys].
        title: Title of the figure.
    """
    # 0 none, 1 predicted, 2 fixed, 3 missed gold edge
    kinds = np.where(predicted > 0, np.where(fixed > 0, 2, 1), np.where(gold > 0, 3, 0))
    figure, axes = _subplots(2, 3, figsize=(11, 7.4))
    axes[0][0].imshow(gold > 0, cmap="Greys", vmin=0, vmax=1.4)
    axes[0][1].imshow(kinds, cmap=ListedColormap(["white", COLOURS[0], COLOURS[1], "#e0b0b0"]), vmin=0, vmax=3)
    # square root, so that small weights are visible
    axes[0][2].imshow(np.sqrt(resulting), cmap="viridis")
    names = ("gold graph", "predicted (blue), fixed (orange), missed (pink)", "resulting weights (square root)")
    for axes_of, name in zip(axes[0], names, strict=True):
        axes_of.set_title(name, fontsize=9)
        axes_of.set_xlabel("key", fontsize=8)
        axes_of.set_ylabel("query", fontsize=8)
    for axes_of, flags in zip(axes[1], (gold > 0, predicted > 0, resulting > 0), strict=True):
        for query, key in zip(*np.nonzero(flags), strict=True):
            colour = COLOURS[1] if fixed[query, key] else COLOURS[0]
            axes_of.plot([0, 1], [-query, -key], color=colour, alpha=0.35, linewidth=0.6)
        axes_of.set_xticks([0, 1], ["query", "key"], fontsize=8)
        axes_of.set_yticks([])
    figure.suptitle(title, fontsize=10)
    return _plain(figure)


def _subplots(rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """New figure and its axes, untyped because the annotations of matplotlib are incomplete."""
    return plt.subplots(rows, columns, **options)


def _columns(points: Frontier) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _short(path: str) -> str:
    parts = [part for part in path.split(".") if part in ("encoder", "decoder") or part.isdigit()]
    return " ".join(parts) or path


def _plain(figure: Any) -> bytes:
    """PNG bytes of a figure without the common style."""
    import io

    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()
