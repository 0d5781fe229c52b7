"""Records of evaluation results: one row per task and setting."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from graftwork.core.config import build, to_plain
from graftwork.core.files import read_json, write_record
from graftwork.core.run_folder import RunFolder
from graftwork.errors import IncompleteRunError

LM_EVAL = "lm_eval/"
"""Prefix of the names of lm-eval's tasks, some of which are also names of tasks of Graftwork."""
Curve = tuple[tuple[float, float], ...]
"""Pairs of training step and value."""


@dataclass(frozen=True)
class ResultRow:
    """Scores of one model on one task in one setting."""

    task: str
    """Task name."""
    split: str
    """Split that was read."""
    label: str
    """Short name of the setting: dense, converted, feed_forward_k=256, …"""
    scores: Mapping[str, float]
    """Metric name → value."""
    size: int
    """Denominator of the scores."""
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Swept settings of this row, dotted key → value."""
    seed: int = 0
    """Seed of the run."""
    ignored: int = 0
    """Number of rows of the file that could not be parsed, counted as wrong."""
    seconds: float = 0.0
    """Measured time of generation and scoring."""
    higher_is_better: Mapping[str, bool] = field(default_factory=dict[str, bool])
    """Metric name → True if higher is better."""
    notes: tuple[str, ...] = ()
    """Configurations of the metrics, such as sacrebleu's signature."""
    digest: str = ""
    """SHA-256 of the weights of the evaluated model, before the method is restored or varied; empty if unknown."""
    own: bool | None = None
    """True for the run's own model, false for another one, such as a checkpoint; null in results of earlier
    versions."""
    device: str = ""
    """Device of the model; empty in results of earlier versions."""
    dtype: str = ""
    """Data type in which the model computed, such as float32; empty in results of earlier versions."""
    cut: Mapping[str, int] = field(default_factory=dict[str, int])
    """Numbers of inputs and targets that are cut, and the lengths that they are cut at; empty if unknown."""


@dataclass(frozen=True)
class PairedRow:
    """Comparison of two models on the same documents of one task."""

    task: str
    """Task name."""
    metric: str
    """Name of the score."""
    label: str
    """Short name of the setting."""
    baseline: str
    """Short name of the setting that it is compared with."""
    value: float
    """Score of the setting."""
    reference: float
    """Score of the baseline."""
    size: int
    """Number of documents."""
    low: float | None = None
    """Lower end of the 95 % interval of the difference, from a paired bootstrap over documents; null if there is
    none."""
    high: float | None = None
    """Upper end of the interval."""
    p_value: float | None = None
    """Twice the share of bootstrap samples whose difference is zero or has the opposite sign."""
    higher_is_better: bool | None = None
    """True if a higher score is better; null if unknown."""

    @property
    def difference(self) -> float:
        """Score of the setting minus that of the baseline."""
        return self.value - self.reference


@dataclass(frozen=True)
class CostRow:
    """Measured time and memory of one forward and backward pass at one sequence length."""

    label: str
    """Short name of the setting."""
    length: int
    """Sequence length in tokens."""
    seconds: float
    """Median time over repetitions."""
    saved_bytes: int
    """Bytes saved for the backward pass, each storage counted once, without parameters."""
    peak_bytes: int | None = None
    """Growth of the process or device high-water mark; null if the system does not report it."""
    device: str = "cpu"
    """Device of the measurement."""
    forward_seconds: float | None = None
    """Median latency of a forward pass in evaluation mode without gradients; null if not measured."""
    forward_range: tuple[float, float] | None = None
    """Shortest and longest latency over the rounds; null if not measured."""
    rounds: int = 0
    """Number of measured forward passes."""


@dataclass(frozen=True)
class Sample:
    """One input with the predictions of several settings."""

    task: str
    """Task name."""
    input: str
    """Input text."""
    answers: tuple[str, ...]
    """Accepted answers."""
    predictions: Mapping[str, str]
    """Setting label → prediction."""

    def by_answer(self) -> dict[str, list[str]]:
        """Group the setting labels by prediction, in the order of the settings."""
        groups: dict[str, list[str]] = {}
        for name, answer in self.predictions.items():
            groups.setdefault(answer, []).append(name)
        return groups


@dataclass(frozen=True)
class Results:
    """Results of all evaluations of one run."""

    model: str
    """Initial checkpoint."""
    method: str | None
    """Name of the method."""
    rows: tuple[ResultRow, ...] = ()
    """Scores by task and setting."""
    measures: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])
    """Setting label → method-specific numbers, such as kept_mass/<module>."""
    cost: tuple[CostRow, ...] = ()
    """Time and memory by sequence length."""
    samples: tuple[Sample, ...] = ()
    """Sample predictions for the report."""
    changes: Mapping[str, int] = field(default_factory=dict[str, int])
    """Setting label → number of changed modules."""
    training: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])
    """Training phase → its final numbers, such as the loss."""
    curves: Mapping[str, Mapping[str, Curve]] = field(default_factory=dict[str, Mapping[str, Curve]])
    """Setting label → validation metrics during its training, by name."""
    comparisons: tuple[PairedRow, ...] = ()
    """Paired comparisons with another setting, on tasks of lm-eval."""

    def scores(self, task: str, label: str) -> Mapping[str, float]:
        """Scores of one task in one setting.

        Raises:
            KeyError: If the pair was not evaluated.
        """
        for row in self.rows:
            if row.task == task and row.label == label:
                return row.scores
        raise KeyError(f"no result for {task} at {label}; there are: {[(row.task, row.label) for row in self.rows]}")

    def merged(self, newer: Results) -> Results:
        """Merge with the results of a later evaluation, which replace equal measurements."""
        taken = {(row.task, row.split, row.label, row.seed) for row in newer.rows}
        cost = {(row.label, row.length) for row in newer.cost}
        # a comparison whose setting or baseline was scored again is no longer valid
        scored = {(row.task, row.label) for row in newer.rows}
        renewed = {(row.task, row.metric, row.label, row.baseline) for row in newer.comparisons}
        compared = (
            row
            for row in self.comparisons
            if not {(row.task, row.label), (row.task, row.baseline)} & scored
            and (row.task, row.metric, row.label, row.baseline) not in renewed
        )
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
            comparisons=(*compared, *newer.comparisons),
        )

    def write(self, path: Path) -> None:
        """Write the results as valid JSON with their digest; a score of NaN or infinity becomes null."""
        write_record(path, to_plain(self))

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read results from a JSON file; a score of null becomes NaN.

        Raises:
            CheckpointMismatchError: If the file is not JSON, or has changed since it was written.
            ConfigError: If it contains other fields.
        """
        values = read_json(path)
        if not isinstance(values, dict):
            return build(cls, values, where=str(path))
        content = cast("dict[str, Any]", values)
        for row in cast("list[Any]", content["rows"] if isinstance(content.get("rows"), list) else []):
            if isinstance(row, dict) and "scores" in row:
                row["scores"] = _numbers(row["scores"])
        numbers = {name: _numbers(content[name]) for name in ("measures", "training", "curves") if name in content}
        return build(cls, {**content, **numbers}, where=str(path))


def update_results(run: RunFolder, change: Callable[[Results | None], Results]) -> Results:
    """Change the results of a run while no other process writes them.

    Args:
        run: Run folder.
        change: Returns the new results, given the recorded ones or None.

    Returns:
        The new results.
    """
    with run.writing():
        file = run.results_file
        results = change(Results.read(file) if file.exists() else None)
        results.write(file)
    return results


def merge_results(run: RunFolder, newer: Results) -> Results:
    """Merge results of an evaluation into `results.json`, and return all results of the run."""
    return update_results(run, lambda earlier: newer if earlier is None else earlier.merged(newer))


def record_training(run: RunFolder, phases: Mapping[str, Mapping[str, float]]) -> Results:
    """Write the closing numbers of a training into the results of a run.

    Raises:
        IncompleteRunError: If the run has no results.
    """

    def changed(recorded: Results | None) -> Results:
        if recorded is None:
            raise IncompleteRunError(f"Found no {run.results_file}. Run `graftwork evaluate` first.")
        return replace(recorded, training=phases)

    return update_results(run, changed)


def _numbers(value: Any) -> Any:
    """Replace null by NaN in nested numbers."""
    if value is None:
        return math.nan
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in cast("dict[str, Any]", value).items()}
    return [_numbers(item) for item in cast("list[Any]", value)] if isinstance(value, list) else value
