"""What is learned and measured: tasks and mixtures as frozen declarations, and the examples that they yield."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from graftwork.errors import ConfigError, DataError
from graftwork.metrics.metric import Metric
from graftwork.tasks.sources import Record, Source, subset_order

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Example:
    """One input text with the text that the model should write."""

    key: str
    """What names the example within its split."""
    input: str
    target: str
    """The text to learn; empty if the data gives none."""
    answers: tuple[str, ...] = ()
    """Every text that counts as right when scoring; empty if the data gives none."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What else the source knows of the example, for parsing and for metrics."""


@dataclass(frozen=True, slots=True)
class Examples:
    """The formatted examples of one split of one task."""

    task: str
    split: str
    """The split really read, which a fallback can make another one than was asked for."""
    rows: tuple[Example, ...]
    size: int
    """Number that scores are divided by; rows that could not be read count as wrong in it."""
    ignored: int
    """Rows of the source that are not in its format."""
    source: str
    """Path or name of what was read."""
    running_text: bool = False
    """The rows are lines of one text, to be modelled token by token; there is nothing to answer."""

    def first(self, count: int) -> Examples:
        """The first `count` rows, scored by themselves.

        Raises:
            ConfigError: If `count` is smaller than 1.
        """
        rows = self.rows[: _at_least_one("count", count)]
        return replace(self, rows=rows, size=len(rows), ignored=0)


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
    metrics: tuple[Metric, ...] = ()
    official_metrics: tuple[Metric, ...] = ()
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
    description: str = ""

    def __post_init__(self) -> None:
        if not self.name or any(character.isspace() for character in self.name):
            raise ConfigError(f"Found the task name {self.name!r}; expected a word. Choose a name without spaces.")
        for metrics in (self.metrics, self.official_metrics):
            names = [metric.name for metric in metrics]
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
        return {metric.name: metric.compute(parsed, examples) for metric in metrics}


@dataclass(frozen=True, slots=True)
class Mixture:
    """Tasks that are trained on together, each drawn in proportion to its rate."""

    name: str
    rates: Mapping[str, float]
    """Task name to rate; 0 means that the task is only evaluated."""
    description: str = ""

    def __post_init__(self) -> None:
        if not self.rates:
            raise ConfigError(f"Found no task in mixture {self.name}; expected at least one.")
        for task, rate in self.rates.items():
            if not (math.isfinite(rate) and rate >= 0):
                raise ConfigError(
                    f"Found rate {rate} for {task} in mixture {self.name}; expected a number of at least 0, "
                    "where 0 means evaluation only."
                )

    @property
    def training_tasks(self) -> tuple[str, ...]:
        """Names of the tasks that take part in training."""
        return tuple(task for task, rate in self.rates.items() if rate > 0)


def _choose(
    name: str, rows: tuple[Record, ...], split: str, take: int | None, skip: int | None, seed: int
) -> Sequence[Record]:
    if take is None and skip is None:
        return rows
    start = 0 if skip is None else _at_least_one("skip", skip)
    stop = None if take is None else start + _at_least_one("take", take)
    if len(rows) < (stop or start + 1):
        logger.warning("%s: %s has %d rows, so take=%s, skip=%s leave fewer.", name, split, len(rows), take, skip)
    order = subset_order([row.key for row in rows], split=split, seed=seed)
    return [rows[index] for index in order[start:stop]]


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"Found {name} {value}; expected at least 1. Leave it out to use all rows.")
    return value
