"""Plots of results."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from graftwork.metrics.results import CostRow, ResultRow, Results
from graftwork.reporting.curves import TRAINING
from graftwork.reporting.picture import COLOURS, DENSE_COLOUR, GRID_COLOUR, Picture, to_picture

SIZE = (7.2, 4.2)
"""Size of every plot in inches."""
_CURVE_NAMES = {
    "train/loss": "Training loss",
    "loss": "Held-out loss while training",
    "train/learning_rate": "Learning rate",
    "train/grad_norm": "Gradient norm",
}
"""Titles of curves, in display order; the titles of others are derived from their names."""


def plots_of(results: Results) -> dict[str, Picture]:
    """Draw every plot of scores and costs that the results have data for, by title, in display order."""
    pictures: dict[str, Picture] = {}
    for key in swept_numbers(results.rows):
        short = key.rpartition(".")[2]
        pictures[f"Score against {short}"] = score_against(results.rows, key)
    if len({count for row in results.rows if (count := explained_examples(row)) is not None}) > 1:
        pictures["Labels and explanations against explained examples"] = reasons_against_count(results.rows)
    for prefix, title, unit in (
        ("kept_mass/", "Kept mass per layer", "share of |activation| kept"),
        ("distance/", "Distance to the teacher per layer", "distance of hidden states, 0: embeddings"),
        ("active_units/", "Active units per layer", "units that are not zero, per token"),
    ):
        chosen = {
            name: {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
            for name, values in results.measures.items()
        }
        chosen = {name: values for name, values in chosen.items() if values}
        if chosen:
            pictures[title] = per_layer(chosen, unit, ordered=bool(swept_numbers(results.rows)))
    if any(row.forward_seconds is not None for row in results.cost):
        pictures["Latency against length"] = latency_against_length(results.cost)
    if results.cost:
        pictures["Time of a training step against length"] = time_against_length(results.cost)
        pictures["Memory saved for backward against length"] = memory_against_length(results.cost)
    return pictures


def training_plots_of(results: Results) -> dict[str, Picture]:
    """Draw every logged metric over training steps, by title: validation and training metrics of all settings.

    Metrics of layers, such as `layer_0` and `layer_1`, share a plot if there is one setting only.
    """
    pictures: dict[str, Picture] = {}
    for title, curves in curves_by_title(results.curves).items():
        positive = all(value > 0 for points in curves.values() for _, value in points)
        lower = title.lower()
        logarithmic = positive and any(word in lower for word in ("distance", "norm"))
        pictures[title] = over_steps(curves, lower.removesuffix(" while training"), logarithmic=logarithmic)
    return pictures


def curves_by_title(
    curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
) -> dict[str, dict[str, Sequence[tuple[float, float]]]]:
    """Group the curves of all settings by the plot that shows them: title → name of the line → points."""
    found: dict[str, dict[str, Sequence[tuple[float, float]]]] = {}
    order: dict[str, int] = {}
    for label, own in curves.items():
        for key, points in own.items():
            name, _, phase = key.partition(", ")
            layer = re.fullmatch(r"(.+)_(\d+)", name)
            if len(curves) == 1 and layer is not None:
                name, line = layer[1], f"layer {layer[2]}"
            else:
                line = label
            line = f"{line}, {phase}" if phase and line != "training" else phase or line
            title = _CURVE_NAMES.get(name) or _curve_title(name)
            if len(points) > 1:
                order[title] = list(_CURVE_NAMES).index(name) if name in _CURVE_NAMES else -1 if "/" not in name else 9
                found.setdefault(title, {})[line] = points
    return {title: found[title] for title in sorted(found, key=lambda title: order[title])}


def _curve_title(name: str) -> str:
    words = name.removeprefix(TRAINING).replace("_", " ").replace("/", " ")
    return f"Training: {words}" if name.startswith(TRAINING) else f"Held-out {words} while training"


def swept_numbers(rows: Sequence[ResultRow]) -> list[str]:
    """Return the swept settings with at least two numeric values."""
    keys = {key for row in rows for key in row.settings}
    return sorted(
        key for key in keys if len({row.settings[key] for row in rows if _is_number(row.settings.get(key))}) > 1
    )


def score_against(rows: Sequence[ResultRow], key: str) -> Picture:
    """Plot the first metric of every task against one swept setting; the dense score is a dashed line.

    Several seeds of one point are shown as mean and range.
    """
    figure, axes = _canvas()
    for number, task in enumerate(dict.fromkeys(row.task for row in rows)):
        colour = COLOURS[number % len(COLOURS)]
        own = [row for row in rows if row.task == task and row.scores]
        points: dict[float, list[float]] = {}
        for row in own:
            if _is_number(row.settings.get(key)):
                points.setdefault(float(row.settings[key]), []).append(next(iter(row.scores.values())))
        if not points:
            continue
        order = sorted(points)
        means = [sum(points[x]) / len(points[x]) for x in order]
        axes.plot(order, means, marker="o", color=colour, label=task)
        lowest, highest = [min(points[x]) for x in order], [max(points[x]) for x in order]
        axes.fill_between(order, lowest, highest, color=colour, alpha=0.15)
        dense = [next(iter(row.scores.values())) for row in own if row.label.startswith("dense")]
        if dense:
            axes.axhline(sum(dense) / len(dense), color=colour, linestyle="--", linewidth=1, alpha=0.8)
    metric = next((name for row in rows for name in row.scores), "score")
    values = sorted({float(row.settings[key]) for row in rows if _is_number(row.settings.get(key))})
    if values[0] > 0:
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()
    axes.set_xlabel(key.rpartition(".")[2])
    axes.set_ylabel(metric.replace("_", " "))
    axes.set_title("dashed: dense model", fontsize=9, color=DENSE_COLOUR, loc="left")
    return finish_figure(figure, axes)


def explained_examples(row: ResultRow) -> int | None:
    """Return the number of explained examples in the training mixture of a row; None for other trainings."""
    from graftwork.tasks import MIXTURES, get_task

    name = row.settings.get("train.mixture")
    if name is None or name not in MIXTURES:
        return None
    taken = [get_task(task).take for task in MIXTURES.get(name).training_tasks]
    return sum(count for count in taken if count is not None) or None


def reasons_against_count(rows: Sequence[ResultRow]) -> Picture:
    """Plot label accuracy and explanation quality against the number of explained examples; chance is dotted."""
    figure, axes = _canvas()
    styles = (
        ("accuracy", "label accuracy", COLOURS[0], "-"),
        ("token_f1", "token F1 of spans", COLOURS[1], "-"),
        ("bleu", "BLEU of explanations", COLOURS[1], "-"),
        ("spans_found", "spans found in the text", COLOURS[2], "-"),
        ("chance_token_f1", "token F1 of random spans", COLOURS[7], ":"),
    )
    counted = [(count, row) for row in rows if (count := explained_examples(row)) is not None]
    for variant in dict.fromkeys(_further(row) for _, row in counted):
        own = sorted((entry for entry in counted if _further(entry[1]) == variant), key=lambda entry: entry[0])
        for metric, name, colour, line in styles:
            points = [(count, row.scores[metric]) for count, row in own if metric in row.scores]
            # further settings affect only the explanations; all other metrics are drawn once
            if not points or (variant and metric not in ("token_f1", "bleu")):
                continue
            style = "--" if variant else line
            label = f"{name}, {variant}" if variant else name
            axes.plot(*zip(*points, strict=True), marker="o", color=colour, linestyle=style, label=label)
    counts = sorted({count for count, _ in counted})
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_ylim(0, 105)
    axes.set_xlabel("training examples with an explanation; all others have labels only")
    axes.set_ylabel("percent, or BLEU")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    return finish_figure(figure, axes)


def _further(row: ResultRow) -> str:
    return ", ".join(
        f"{key.rpartition('.')[2]}={value}" for key, value in row.settings.items() if key != "train.mixture"
    )


def per_layer(values: Mapping[str, Mapping[str, float]], unit: str, *, ordered: bool = True) -> Picture:
    """Plot one measurement per layer, with a line per setting; ordered settings use a sequential colour map."""
    figure, axes = _canvas()
    layers = list(dict.fromkeys(path for own in values.values() for path in own))
    scale = matplotlib.colormaps["viridis"]
    for number, (name, own) in enumerate(values.items()):
        colour = scale(0.3 + 0.5 * number / max(len(values) - 1, 1)) if ordered else _colours(values)[name]
        axes.plot([layers.index(path) for path in own], list(own.values()), marker="o", label=name, color=colour)
    words = [_short_path(path) for path in layers]
    slant: dict[str, Any] = {"rotation": 30, "ha": "right"} if any(len(word) > 2 for word in words) else {}
    axes.set_xticks(range(len(layers)), words, fontsize=8, **slant)
    axes.set_ylabel(unit)
    if "share" in unit:
        axes.set_ylim(0, 1.05)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    return finish_figure(figure, axes)


def over_steps(curves: Mapping[str, Sequence[tuple[float, float]]], unit: str, *, logarithmic: bool = False) -> Picture:
    """Plot one metric over training steps, with a line per setting; the dense model has a separate colour."""
    figure, axes = _canvas()
    for name, colour in _colours(curves).items():
        style = "--" if name == "dense" else "-"
        marker = "." if len(curves[name]) <= 50 else None
        axes.plot(*zip(*curves[name], strict=True), marker=marker, color=colour, linestyle=style, label=name)
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    if len(curves) > 3:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    return finish_figure(figure, axes)


def latency_against_length(rows: Sequence[CostRow]) -> Picture:
    """Plot the milliseconds of a forward pass against length."""
    figure, axes = _canvas()
    known = [row for row in rows if row.forward_seconds is not None]
    _against_length(axes, known, "forward, ms (measured)", lambda row: 1000 * (row.forward_seconds or 0))
    return finish_figure(figure, axes)


def time_against_length(rows: Sequence[CostRow]) -> Picture:
    """Plot the milliseconds of a forward and backward pass against length."""
    figure, axes = _canvas()
    _against_length(axes, rows, "forward + backward, ms (measured)", lambda row: 1000 * row.seconds)
    return finish_figure(figure, axes)


def memory_against_length(rows: Sequence[CostRow]) -> Picture:
    """Plot the memory that a forward pass saves for the backward pass against length."""
    figure, axes = _canvas()
    _against_length(axes, rows, "saved for backward, MiB (measured)", lambda row: row.saved_bytes / 2**20)
    return finish_figure(figure, axes)


@dataclass(frozen=True)
class Bar:
    """One score in the plot of several runs."""

    name: str
    value: float
    published: float | None = None
    """Published number; None if there is none."""
    dense: bool = False


def scores_of_runs(bars: Mapping[str, Sequence[Bar]]) -> Picture:
    """Plot one panel per task with a bar per run and setting; a diamond marks the published number of a bar."""
    sizes = [len(own) for own in bars.values()]
    figure, fields = plt.subplots(
        len(bars),
        1,
        figsize=(9, sum(sizes) * 0.26 + 0.9 * len(bars)),
        squeeze=False,
        gridspec_kw={"height_ratios": [size + 1 for size in sizes]},
    )
    for axes, (title, own) in zip(fields[:, 0], bars.items(), strict=True):
        places = range(len(own))
        drawn = axes.barh(
            places, [bar.value for bar in own], color=[DENSE_COLOUR if bar.dense else COLOURS[0] for bar in own]
        )
        axes.bar_label(drawn, fmt="%.1f", padding=3, fontsize=8)
        known = [(bar.published, place) for place, bar in enumerate(own) if bar.published is not None]
        if known:
            axes.plot(*zip(*known, strict=True), linestyle="", marker="D", color=COLOURS[1], label="published")
        axes.set_yticks(places, [textwrap.fill(bar.name, 40) for bar in own], fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title(title.replace("_", " "), fontsize=9, loc="left")
        _style(axes)
    return finish_figure(figure, fields[-1, 0])


def _against_length(axes: Any, rows: Sequence[CostRow], unit: str, value: Callable[[CostRow], float]) -> None:
    colours = _colours(row.label for row in rows)
    for name, colour in colours.items():
        own = sorted((row for row in rows if row.label == name), key=lambda row: row.length)
        axes.plot([row.length for row in own], [value(row) for row in own], marker="o", color=colour, label=name)
    axes.set_xlabel("tokens")
    axes.set_ylabel(unit)
    axes.set_xscale("log", base=2)
    lengths = sorted({row.length for row in rows})
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)


def _colours(names: Iterable[str]) -> dict[str, str]:
    """Assign one colour per setting, independent of the presence of the dense model."""
    known = list(dict.fromkeys(names))
    others = [name for name in known if name != "dense"]
    return {name: DENSE_COLOUR if name == "dense" else COLOURS[others.index(name) % len(COLOURS)] for name in known}


def _short_path(path: str) -> str:
    parts = [part for part in path.split(".") if part in ("encoder", "decoder") or part.isdigit()]
    return " ".join(parts[:2]) or path


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _canvas() -> tuple[Figure, Any]:
    """Create a figure with one axes object, untyped because matplotlib's annotations are incomplete."""
    return plt.subplots(figsize=SIZE)


def _style(axes: Any) -> None:
    axes.grid(color=GRID_COLOUR, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if axes.get_legend() is None and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def finish_figure(figure: Figure, axes: Any) -> Picture:
    """Apply the common style to the axes, and return the figure as a picture."""
    _style(axes)
    figure.tight_layout()
    picture = to_picture(figure)
    plt.close(figure)
    return picture
