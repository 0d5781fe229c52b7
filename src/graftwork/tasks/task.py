"""What is learned and measured: tasks and mixtures as frozen declarations, and the examples that they yield."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.core.example import Example, Examples, at_least_one
from graftwork.errors import ConfigError, DataError
from graftwork.metrics.metric import Metric, MetricGroup
from graftwork.tasks.sources import Record, Source, subset_order

logger = logging.getLogger(__name__)

SPLIT_WORDS: Mapping[str, str] = {"dev": "validation", "val": "validation", "validation": "dev"}
"""Other words for a split, tried where a task does not expose the one asked for."""

SIZE = "size"
"""A rate that stands for the number of a task's examples."""


def as_text(prediction: str, example: Example) -> str:
    """The parser of tasks whose metrics read the generated text as it is."""
    return prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Where data comes from, how it is worded, how an answer is read, and how it is scored.

    Source: the declaration of `google/seqio`, with a frozen value in place of its class-level registry.
    """

    name: str
    source: Source
    """Reads the records of a split from a data folder."""
    format: Callable[[Record], Example | None]
    """Words a record as an example; None leaves the record out, and out of the score's denominator too."""
    parse: Callable[[str, Example], Any] = as_text
    """Reads a generated text; what it returns is what the metrics receive."""
    labels: tuple[str, ...] = ()
    """Names of the classes in the data's order, where every answer is one of them; empty for answers in free text. A
    model with a classification head is trained and scored on the classes, any other one writes their names."""
    metrics: tuple[Metric | MetricGroup, ...] = ()
    official_metrics: tuple[Metric | MetricGroup, ...] = ()
    """The metrics of the data's own publisher where they differ from `metrics`."""
    splits: tuple[str, ...] = ()
    """Splits that the task exposes; empty for whatever the source finds."""
    take: int | None = None
    """Use only this many examples, drawn by hash; None uses all."""
    skip: int | None = None
    """Use all but the examples that a `take` of this many would draw."""
    lowercase: bool = False
    """Lower-case the texts of a record before they are formatted."""
    running_text: bool = False
    """The rows are lines of one text: models are trained and scored on its tokens (perplexity), not on answers."""
    version: int = 1
    """Raised whenever the same data would give other examples or other scores."""
    reference: Task | None = None
    """The same task as the authors' code has it, defects included, where that differs; what `mode="reference"` uses."""
    description: str = ""

    def __post_init__(self) -> None:
        if not self.name or any(character.isspace() for character in self.name):
            raise ConfigError(f"Found the task name {self.name!r}; expected a word. Choose a name without spaces.")
        for metrics in (self.metrics, self.official_metrics):
            names = metric_names(metrics)
            if len(set(names)) != len(names):
                raise ConfigError(
                    f"Found the metrics {', '.join(names)} in task {self.name}; expected different names."
                )

    def load(
        self, data: Path, split: str, *, take: int | None = None, skip: int | None = None, seed: int = 0
    ) -> Examples:
        """Read and format one split.

        Args:
            data: Folder that holds the task's files.
            split: Split to read, in the source's words ("train", "dev").
            take: Only the first this many examples of the hashed order; None for all. Takes what there is if the
                split is smaller.
            skip: All but the first this many of the hashed order.
            seed: Draws another hashed order.

        Returns:
            All examples in the order of the file, or a subset in the hashed order, so that the first 100 of 200
            taken are the same as 100 taken.

        Raises:
            DataError: If the split cannot be read or has no usable row.
            ConfigError: If `take` or `skip` is smaller than 1.
        """
        split = self.split_named(split)
        if self.splits and split not in self.splits:
            raise DataError(f"Found split {split!r} asked of {self.name}; expected one of: {', '.join(self.splits)}.")
        records = self.source(Path(data), split)
        if not records.rows:
            raise DataError(
                f"{records.path}: found no usable row for {self.name} ({records.ignored} ignored); expected at least "
                "one. Check that the file is complete and is this task's."
            )
        take, skip = (self.take if take is None else take), (self.skip if skip is None else skip)
        chosen = _choose(self.name, records.rows, records.split, take, skip, seed)
        formatted = [self.format(record.lowered() if self.lowercase else record) for record in chosen]
        rows = tuple(example for example in formatted if example is not None)
        whole = take is None and skip is None
        size = records.size - (len(formatted) - len(rows)) if whole else len(rows)
        return Examples(
            self.name, records.split, rows, size, records.ignored, str(records.path), running_text=self.running_text
        )

    def evaluate(self, predictions: Sequence[str], examples: Examples, *, official: bool = False) -> dict[str, float]:
        """Score generated texts.

        Args:
            predictions: One generated text for each row of the examples, in their order.
            examples: What `load` returned.
            official: Use the official metrics instead of the ordinary ones.

        Returns:
            Score by metric name; NaN where a metric is undefined on these examples.

        Raises:
            DataError: If predictions and examples do not pair up, or examples have no answers.
            ConfigError: If official metrics are asked for and the task has none.
        """
        metrics = self.official_metrics if official else self.metrics
        if official and not metrics:
            raise ConfigError(f"Found no official metrics in task {self.name}. Ask for the ordinary ones.")
        if len(predictions) != len(examples.rows):
            raise DataError(
                f"Found {len(predictions)} predictions for {len(examples.rows)} examples of {self.name}; expected one "
                "for each, in their order."
            )
        parsed = [self.parse(text, example) for text, example in zip(predictions, examples.rows, strict=True)]
        scores: dict[str, float] = {}
        for metric in metrics:
            if isinstance(metric, MetricGroup):
                scores.update(metric.compute(parsed, examples))
            else:
                scores[metric.name] = metric.compute(parsed, examples)
        return scores

    def split_named(self, word: str) -> str:
        """The split that a word means here: itself, or the task's own word for it ("dev" is "validation")."""
        other = SPLIT_WORDS.get(word, word)
        return other if self.splits and word not in self.splits and other in self.splits else word

    def exposes(self, split: str) -> bool:
        """Whether the task has that split, as far as its declaration says."""
        return not self.splits or self.split_named(split) in self.splits

    def in_mode(self, mode: str) -> Task:
        """This task, or for "reference" what it is in the authors' code."""
        return self.reference if mode == "reference" and self.reference is not None else self


def check_mode(mode: str) -> str:
    """The mode itself.

    Raises:
        ConfigError: If it is neither "fixed" nor "reference".
    """
    if mode not in ("fixed", "reference"):
        raise ConfigError(f"mode is {mode!r}. Expected fixed, or reference for what the authors' code does.")
    return mode


def metric_names(metrics: Sequence[Metric | MetricGroup]) -> list[str]:
    """The names of all numbers that these metrics give."""
    return [
        name for metric in metrics for name in (metric.names if isinstance(metric, MetricGroup) else (metric.name,))
    ]


def metric_notes(metrics: Sequence[Metric | MetricGroup]) -> tuple[str, ...]:
    """The configurations that have to be printed beside these metrics."""
    return tuple(metric.note() for metric in metrics if isinstance(metric, MetricGroup) and metric.note is not None)


def metric_directions(metrics: Sequence[Metric | MetricGroup]) -> dict[str, bool]:
    """Whether higher is better, by the name of each number."""
    return {
        name: name not in metric.lower_is_better if isinstance(metric, MetricGroup) else metric.higher_is_better
        for metric in metrics
        for name in (metric.names if isinstance(metric, MetricGroup) else (metric.name,))
    }


@dataclass(frozen=True, slots=True)
class Mixture:
    """Tasks that are trained on together, each drawn in proportion to its rate.

    Source: the mixture of `google/seqio`.

    Differs from it: rate 0 is legal and means that a task is only evaluated, and a rate by size counts the examples
    that are really there.
    """

    name: str
    rates: Mapping[str, float | str]
    """Task name to rate: a number, 0 if the task is only evaluated, or "size" for the number of its examples."""
    description: str = ""

    def __post_init__(self) -> None:
        if not self.rates:
            raise ConfigError(f"Found no task in mixture {self.name}; expected at least one.")
        for task, rate in self.rates.items():
            good = rate == SIZE if isinstance(rate, str) else math.isfinite(rate) and rate >= 0
            if not good:
                raise ConfigError(
                    f"Found rate {rate} for {task} in mixture {self.name}; expected a number of at least 0, "
                    "where 0 means evaluation only, or the word size."
                )

    @property
    def training_tasks(self) -> tuple[str, ...]:
        """Names of the tasks that take part in training if they have the split that is trained on."""
        return tuple(task for task, rate in self.rates.items() if rate == SIZE or float(rate) > 0)

    def proportions(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """The share of draws that each task gets.

        Args:
            sizes: Number of examples of each task that has the split trained on; the others take no part, and neither
                does one without any example.

        Raises:
            ConfigError: If no task is left.
        """
        rates = {
            task: float(sizes[task] if rate == SIZE else rate)
            for task, rate in self.rates.items()
            if sizes.get(task, 0) > 0
        }
        total = sum(rates.values())
        if not total > 0:
            raise ConfigError(
                f"Found no training example in mixture {self.name}: none of {', '.join(self.rates)} has both a rate "
                "above 0 and an example to train on. Check the data folder, or train on another mixture."
            )
        return {task: rate / total for task, rate in rates.items() if rate > 0}


def _choose(
    name: str, rows: tuple[Record, ...], split: str, take: int | None, skip: int | None, seed: int
) -> Sequence[Record]:
    if take is None and skip is None:
        return rows
    start = 0 if skip is None else at_least_one("skip", skip)
    stop = None if take is None else start + at_least_one("take", take)
    if len(rows) < (stop or start + 1):
        logger.warning("%s: %s has %d rows, so take=%s, skip=%s leave fewer.", name, split, len(rows), take, skip)
    order = subset_order([row.key for row in rows], split=split, seed=seed)
    return [rows[index] for index in order[start:stop]]
