"""What was measured, as data: one row for each task and setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from graftwork.core.config import build, to_plain
from graftwork.core.files import read_json, write_json


@dataclass(frozen=True)
class ResultRow:
    """The scores of one model on one task under one setting."""

    task: str
    """Task name."""
    split: str
    """Split really read."""
    label: str
    """Short name of the setting: dense, converted, feed_forward_k=256."""
    scores: Mapping[str, float]
    """Metric name to value."""
    size: int
    """Number that scores were divided by."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The swept settings of this row, by dotted key."""
    seed: int = 0
    """Seed of the run."""
    ignored: int = 0
    """Rows of the file that were not in its format, and counted as wrong."""
    seconds: float = 0.0
    """Time of generating and scoring; measured."""
    higher_is_better: Mapping[str, bool] = field(default_factory=dict)
    """Direction of each metric."""
    notes: tuple[str, ...] = ()
    """Configurations that the metrics were computed with, such as sacrebleu's signature."""


@dataclass(frozen=True)
class CostRow:
    """Time and memory of one forward and backward pass at one length; measured."""

    label: str
    """Short name of the setting."""
    length: int
    """Tokens in the sequence."""
    seconds: float
    """Median over repetitions."""
    saved_bytes: int
    """Bytes held for the backward pass, each storage once, without parameters."""
    peak_bytes: int | None = None
    """Growth of the process or device high-water mark; null where the system does not tell."""
    device: str = "cpu"
    """Device it was measured on."""
    forward_seconds: float | None = None
    """Latency: a forward pass alone, in evaluation mode, without gradients; median. null where it was not measured."""


@dataclass(frozen=True)
class Sample:
    """One input with the answers that different settings gave."""

    task: str
    """Task name."""
    input: str
    """What was asked."""
    answers: tuple[str, ...]
    """What counts as right."""
    predictions: Mapping[str, str]
    """Setting label to answer."""

    def by_answer(self) -> dict[str, list[str]]:
        """Every different answer with the settings that gave it, in the order of the settings."""
        groups: dict[str, list[str]] = {}
        for name, answer in self.predictions.items():
            groups.setdefault(answer, []).append(name)
        return groups


@dataclass(frozen=True)
class Results:
    """Everything that the evaluations of one run measured."""

    model: str
    """Checkpoint that was started from."""
    method: str | None
    """Method, by name."""
    rows: tuple[ResultRow, ...] = ()
    """Scores."""
    measures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Setting label to the method's own numbers, such as kept_mass/<module>."""
    cost: tuple[CostRow, ...] = ()
    """Time and memory against length."""
    samples: tuple[Sample, ...] = ()
    """Some answers to look at."""
    changes: Mapping[str, int] = field(default_factory=dict)
    """Setting label to the number of changed modules."""
    training: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Phase to the closing numbers of its training."""
    curves: Mapping[str, Mapping[str, tuple[tuple[float, float], ...]]] = field(default_factory=dict)
    """Setting label to the numbers of what was held out of its training: each as pairs of step and value."""

    def scores(self, task: str, label: str) -> Mapping[str, float]:
        """The scores of one task under one setting.

        Raises:
            KeyError: If that was not evaluated.
        """
        for row in self.rows:
            if row.task == task and row.label == label:
                return row.scores
        raise KeyError(f"no result for {task} at {label}; there are: {[(row.task, row.label) for row in self.rows]}")

    def merged(self, newer: Results) -> Results:
        """These results with those of a later evaluation, which wins where both measured the same."""
        taken = {(row.task, row.split, row.label, row.seed) for row in newer.rows}
        cost = {(row.label, row.length) for row in newer.cost}
        samples = {(sample.task, sample.input): sample for sample in (*self.samples, *newer.samples)}
        earlier = {(sample.task, sample.input): sample for sample in self.samples}
        combined = tuple(
            replace(sample, predictions={**(earlier[key].predictions if key in earlier else {}), **sample.predictions})
            for key, sample in samples.items()
        )
        return Results(
            model=newer.model,
            method=newer.method or self.method,
            rows=(
                *(row for row in self.rows if (row.task, row.split, row.label, row.seed) not in taken),
                *newer.rows,
            ),
            measures={**self.measures, **newer.measures},
            cost=(*(row for row in self.cost if (row.label, row.length) not in cost), *newer.cost),
            samples=combined,
            changes={**self.changes, **newer.changes},
            training={**self.training, **newer.training},
            curves={**self.curves, **newer.curves},
        )

    def write(self, path: Path) -> None:
        """Write as JSON."""
        write_json(path, to_plain(self))

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read what `write` wrote."""
        return build(cls, read_json(path), where=str(path))
