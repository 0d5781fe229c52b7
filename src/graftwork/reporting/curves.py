"""Training and validation curves from the training logs of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from graftwork.core.files import read_lines
from graftwork.core.run_folder import RunFolder

HELD_OUT = "eval_"
"""Prefix of validation metrics in the log; `read_curves` removes it."""
TRAINING = "train/"
"""Prefix of training metrics in `Curves`."""
POINTS = 200
"""Maximum number of points of a curve; longer ones are thinned."""
_CLOSING = "train_runtime"
# counters, timings and checksums of the log, which are no curves
_IGNORED = ("step", "epoch", "sha256", "total_flos", "num_input_tokens_seen")
_TIMINGS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")

Curve = tuple[tuple[float, float], ...]
Curves = dict[str, Curve]
"""Pairs of step and value by metric name: validation metrics by their own name, training metrics as `train/NAME`."""


def read_curves(run: RunFolder) -> Curves:
    """Read the validation and training metrics of all phases of a run, sorted by step; empty without a log.

    A metric of several phases has one curve per phase, named `NAME, PHASE`.
    """
    logs = {log.parent.name: log for log in sorted((run.path / "train").glob("*/log.jsonl"))}
    phases = {phase: _read_log(list(read_lines(log))) for phase, log in logs.items()}
    phases = {phase: curves for phase, curves in phases.items() if curves}
    found: Curves = {}
    for phase, curves in phases.items():
        for name, points in curves.items():
            shared = sum(name in other for other in phases.values()) > 1
            found[f"{name}, {phase}" if shared else name] = points
    return found


def read_closing(run: RunFolder) -> dict[str, dict[str, float]]:
    """Read the closing metrics of every finished phase from its log."""
    found: dict[str, dict[str, float]] = {}
    for log in sorted((run.path / "train").glob("*/log.jsonl")):
        for row in read_lines(log):
            if _CLOSING in row:
                numbers = {name: float(row[name]) for name in ("train_loss", _CLOSING) if _is_finite(row.get(name))}
                found[log.parent.name] = {**numbers, "steps": float(row["step"])}
    return found


def thinned(points: Sequence[tuple[float, float]], limit: int = POINTS) -> Curve:
    """Thin a curve to at most `limit` points, keeping its ends and the extremes of every part, so that spikes remain.

    Example:
        >>> thinned([(step, 9.0 if step == 50 else 1.0) for step in range(100)], 6)
        ((0, 1.0), (1, 1.0), (50, 9.0), (51, 1.0), (99, 1.0))
    """
    if len(points) <= limit:
        return tuple(points)
    inner = points[1:-1]
    parts = max(1, (limit - 2) // 2)
    kept = {0: points[0], len(points) - 1: points[-1]}
    for part in range(parts):
        places = range(part * len(inner) // parts, (part + 1) * len(inner) // parts)
        for choose in (min, max):
            place = choose(places, key=lambda place: inner[place][1])
            kept[place + 1] = inner[place]
    return tuple(kept[place] for place in sorted(kept))


def _read_log(rows: Sequence[dict[str, Any]]) -> Curves:
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if _CLOSING in row:
            continue
        for key, value in row.items():
            name = key.removeprefix(HELD_OUT) if key.startswith(HELD_OUT) else TRAINING + key
            if key in _IGNORED or name.endswith(_TIMINGS) or not _is_finite(value):
                continue
            found.setdefault(name, []).append((float(row["step"]), float(value)))
    return {name: thinned(sorted(points)) for name, points in found.items()}


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
