"""How a training went: the numbers that its log holds of examples that were held out."""

from __future__ import annotations

from graftwork.core.files import read_lines
from graftwork.core.run_folder import RunFolder

_PREFIX = "eval_"

Curves = dict[str, tuple[tuple[float, float], ...]]
"""Name of a number to its pairs of step and value."""


def read_curves(run: RunFolder) -> Curves:
    """The held-out numbers of all phases of a run, in the order of their steps; none if nothing was held out."""
    found: dict[str, list[tuple[float, float]]] = {}
    for log in sorted((run.path / "train").glob("*/log.jsonl")):
        for row in read_lines(log):
            for name, value in row.items():
                if name.startswith(_PREFIX):
                    found.setdefault(name.removeprefix(_PREFIX), []).append((float(row["step"]), float(value)))
    return {name: tuple(sorted(points)) for name, points in found.items()}
