"""Overview of several methods: accuracy, time and memory of each beside its dense model, as a table and one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator

from graftwork.reporting.overview import Overview
from graftwork.reporting.picture import COLOURS, DENSE_COLOUR, GRID_COLOUR, Picture, to_picture
from graftwork.reporting.verdicts import Comparison

TABLE = "Accuracy, time and memory of every method beside its dense model (measured)"
PICTURE = "Accuracy against time and memory, relative to the dense model"


@dataclass(frozen=True, slots=True)
class MethodNumbers:
    """The three comparisons of one method."""

    accuracy: Comparison
    time: Comparison
    memory: Comparison


def overview_of_methods(methods: Mapping[str, MethodNumbers]) -> Overview:
    """Build the table and the picture; accuracies are percentages, times milliseconds and memory MiB."""
    rows = [_row(name, numbers) for name, numbers in methods.items()]
    return Overview({TABLE: rows}, {PICTURE: _picture(methods)}) if rows else Overview()


def _row(name: str, numbers: MethodNumbers) -> dict[str, str]:
    accuracy, time, memory = numbers.accuracy, numbers.time, numbers.memory
    return {
        "method": name,
        "accuracy, dense %": f"{accuracy.dense:.1f}",
        "graft %": f"{accuracy.graft:.1f}",
        "difference [95 %]": accuracy.change,
        "n": f"{accuracy.size}",
        "time, dense ms": _significant(time.dense),
        "graft ms": _significant(time.graft),
        "time ×": _ratio(time),
        "memory, dense MiB": _significant(memory.dense),
        "graft MiB": _significant(memory.graft),
        "memory ×": _ratio(memory),
    }


def _significant(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _ratio(comparison: Comparison) -> str:
    return f"{comparison.ratio:.2f}" if math.isfinite(comparison.ratio) else "–"


def _picture(methods: Mapping[str, MethodNumbers]) -> Picture:
    figure, panels = _subplots()
    for axes, name in zip(panels, ("time", "memory"), strict=True):
        axes.axhline(0, color=DENSE_COLOUR, linewidth=1)
        axes.axvline(1, color=DENSE_COLOUR, linewidth=1)
        for number, (method, numbers) in enumerate(methods.items()):
            x, accuracy = getattr(numbers, name).ratio, numbers.accuracy
            if not math.isfinite(x):
                continue
            colour = COLOURS[number % len(COLOURS)]
            low, high = accuracy.interval or (accuracy.difference, accuracy.difference)
            axes.vlines(x, low, high, color=colour, linewidth=2, alpha=0.5)
            axes.plot([x], [accuracy.difference], marker="o", linestyle="", color=colour, label=method)
            axes.annotate(method, (x, accuracy.difference), (6, 4), textcoords="offset points", fontsize=8)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.margins(x=0.2, y=0.15)
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_xlabel(f"{name} relative to dense, × (left is better)")
        axes.set_ylabel("points of accuracy beside dense")
        axes.grid(color=GRID_COLOUR, linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.tight_layout()
    picture = to_picture(figure)
    plt.close(figure)
    return picture


def _subplots() -> tuple[Any, Any]:
    """Create two panels, untyped because matplotlib's annotations are incomplete."""
    return plt.subplots(1, 2, figsize=(10.4, 4.2), sharey=True)
