"""Validation curves from the training logs of a run."""

from __future__ import annotations

from graftwork.core.files import read_lines
from graftwork.core.run_folder import RunFolder

_PREFIX = "eval_"

Curves = dict[str, tuple[tuple[float, float], ...]]
"""Pairs of step and value by metric name."""


def read_curves(run: RunFolder) -> Curves:
    """Read the validation metrics of all phases of a run, sorted by step; empty without validation data."""
    found: dict[str, list[tuple[float, float]]] = {}
    for log in sorted((run.path / "train").glob("*/log.jsonl")):
        for row in read_lines(log):
            for name, value in row.items():
                if name.startswith(_PREFIX):
                    found.setdefault(name.removeprefix(_PREFIX), []).append((float(row["step"]), float(value)))
    return {name: tuple(sorted(points)) for name, points in found.items()}
