"""Tasks and mixtures: frozen declarations of data, format and metrics."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from graftwork.core.example import Example, Examples, at_least_one
from graftwork.core.stored_rows import select_rows, store_rows
from graftwork.errors import ConfigError, DataError
from graftwork.metrics.metric import Metric, MetricGroup
from graftwork.settings.lengths import GENERAL, NEW_TOKENS, Lengths
from graftwork.tasks.sources import Record, Source, subset_order
from graftwork.tasks.streams import RecordStream, derived_key

logger = logging.getLogger(__name__)

SPLIT_WORDS: Mapping[str, str] = {"dev": "validation", "val": "validation", "validation": "dev"}
"""Aliases of split names, tried if a task does not have the requested split."""

SIZE = "size"
"""Rate that is replaced by the number of examples of the task."""


@dataclass(frozen=True, slots=True)
class SizeRate:
    """Rate that grows with the number of examples n of a task: min(n, maximum)^(1 / temperature).

    Source: examples-proportional and temperature-scaled mixing of Raffel et al. 2020 (T5), as in the
    `mixing_rate_num_examples` of `google/seqio`.
    """

    maximum: int | None = None
    """Number of examples above which a task counts as no larger; None for no limit."""
    temperature: float = 1.0
    """1 samples in proportion to the sizes; larger values sample small tasks more often."""

    def __call__(self, size: int) -> float:
        """Rate of a task with `size` examples."""
        counted = size if self.maximum is None else min(size, self.maximum)
        return float(counted) ** (1 / self.temperature)


@runtime_checkable
class LocatedParser(Protocol):
    """Parser that also accepts a label and positions that were read from the tokens of an answer."""

    def located(self, answer: Mapping[str, Any], text: str, example: Example) -> Any:
        """Value for the metrics.

        Args:
            answer: Label and positions.
            text: Generated text, for parsers that reproduce a search in it.
            example: The example.
        """
        ...


def as_text(prediction: str, example: Example) -> str:
    """Return the generated text unchanged; the parser of tasks whose metrics score the text itself."""
    return prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Declaration of a task: source, format, parser and metrics.

    Source: the declaration of `google/seqio`, with a frozen value in place of its class-level registry.
    """

    name: str
    source: Source
    """Reader of the records of a split."""
    format: Callable[[Record], Example | None]
    """Converts a record to an example; None drops the record, also from the denominator of scores."""
    parse: Callable[[str, Example], Any] = as_text
    """Converts a generated text to the value that the metrics receive."""
    labels: tuple[str, ...] = ()
    """Class names in the order of the class indices; empty for free-text answers. A model with a classification head is
    trained and scored on the classes; a generative model writes the class names."""
    metrics: tuple[Metric | MetricGroup, ...] = ()
    official_metrics: tuple[Metric | MetricGroup, ...] = ()
    """Metrics of the data set's publisher, if they differ from `metrics`."""
    splits: tuple[str, ...] = ()
    """Splits of the task; empty accepts every split that the source can read."""
    take: int | None = None
    """Number of examples to use, drawn by hash; None uses all."""
    skip: int | None = None
    """Number of examples to exclude: the ones that `take` with the same number selects."""
    lowercase: bool = False
    """Lower-case the texts of a record before formatting; choose it for UnifiedQA checkpoints."""
    running_text: bool = False
    """True if the rows are lines of one text: models are trained and scored on its tokens (perplexity)."""
    lengths: Lengths = GENERAL
    """Maximum lengths of inputs and targets in tokens, used unless the settings have their own."""
    new_tokens: int | None = NEW_TOKENS
    """Maximum number of generated tokens in the published protocol; None uses the target length of the training."""
    version: int = 1
    """Version number, incremented whenever the same data yields different examples or scores."""
    reference: Task | None = None
    """Variant that reproduces the authors' code with its defects, selected by `mode="reference"`; None if equal."""
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
            data: Folder of the task's files.
            split: Split to read, such as "train" or "dev".
            take: Number of examples from the start of the hashed order; None loads all. A smaller split is loaded
                completely.
            skip: Number of examples to drop from the start of the hashed order.
            seed: Seed of the hashed order.

        Returns:
            All examples in the order of the file, or a subset in the hashed order; subsets of different sizes are
            nested.

        Raises:
            DataError: If the split cannot be read or has no usable row.
            ConfigError: If `take` or `skip` is smaller than 1.
        """
        split = self.split_named(split)
        if self.splits and split not in self.splits:
            raise DataError(f"Found split {split!r} for {self.name}; expected one of: {', '.join(self.splits)}.")
        records = self.source(Path(data), split)
        if not records.rows:
            raise DataError(
                f"{records.path}: found no usable row for {self.name} ({records.ignored} ignored); expected at least "
                "one. Check that the file is complete and belongs to this task."
            )
        take, skip = (self.take if take is None else take), (self.skip if skip is None else skip)
        whole = take is None and skip is None
        keys = [] if whole else [record.key for record in records.rows]
        order = None if whole else _choose(self.name, keys, records.split, take, skip, seed)
        try:
            if isinstance(records.rows, RecordStream):
                rows, dropped = self._stream(records.rows, order)
            else:
                chosen = records.rows if order is None else [records.rows[index] for index in order]
                rows = tuple(self._formatted(chosen))
                dropped = len(chosen) - len(rows)
        except DataError as error:
            # formats know the record only
            raise error if str(records.path) in str(error) else DataError(f"{records.path}: {error}") from None
        size = records.size - dropped if whole else len(rows)
        return Examples(
            self.name, records.split, rows, size, records.ignored, str(records.path), running_text=self.running_text
        )

    def _formatted(self, records: Iterable[Record]) -> Iterator[Example]:
        found = (self.format(record.lowered() if self.lowercase else record) for record in records)
        return (example for example in found if example is not None)

    def _stream(self, records: RecordStream, order: Sequence[int] | None) -> tuple[Sequence[Example], int]:
        """Examples of a stream in a table, all or those at the positions, and the number of dropped records."""
        key = derived_key(records.key, self.format, self.lowercase, self.version)
        rows = store_rows(lambda: self._formatted(records), key)
        dropped = len(records) - len(rows)
        if order is None:
            return rows, dropped
        if dropped:
            # positions count the dropped records
            kept: dict[int, int] = {}
            for position, record in enumerate(records):
                if self.format(record) is not None:
                    kept[position] = len(kept)
            order = [kept[position] for position in order if position in kept]
        return select_rows(rows, order), dropped

    def evaluate(
        self,
        predictions: Sequence[str],
        examples: Examples,
        *,
        located: Sequence[Mapping[str, Any] | None] | None = None,
        official: bool = False,
    ) -> dict[str, float]:
        """Score generated texts.

        Args:
            predictions: One generated text per example, in the same order.
            examples: Examples returned by `load`.
            located: Label and positions of each answer where a method read them from the tokens, in place of the text.
            official: Use `official_metrics` instead of `metrics`; choose it to compare with published numbers.

        Returns:
            Score by metric name; NaN if a metric is undefined on these examples.

        Raises:
            DataError: If the numbers of predictions and examples differ, or an example has no answer.
            ConfigError: If official metrics are requested and the task has none.
        """
        metrics = self.official_metrics if official else self.metrics
        if official and not metrics:
            raise ConfigError(f"Found no official metrics in task {self.name}. Use the ordinary ones.")
        if len(predictions) != len(examples.rows):
            raise DataError(
                f"Found {len(predictions)} predictions for {len(examples.rows)} examples of {self.name}; expected one "
                "for each, in their order."
            )
        known = [None] * len(predictions) if located is None else located
        parsed = [
            self._parsed(text, own, example)
            for text, own, example in zip(predictions, known, examples.rows, strict=True)
        ]
        scores: dict[str, float] = {}
        for metric in metrics:
            if isinstance(metric, MetricGroup):
                scores.update(metric.compute(parsed, examples))
            else:
                scores[metric.name] = metric.compute(parsed, examples)
        return scores

    def _parsed(self, text: str, located: Mapping[str, Any] | None, example: Example) -> Any:
        if located is not None and isinstance(self.parse, LocatedParser):
            return self.parse.located(located, text, example)
        return self.parse(text, example)

    def split_named(self, word: str) -> str:
        """Resolve a split name: the name itself, or the task's alias of it ("dev" for "validation")."""
        other = SPLIT_WORDS.get(word, word)
        return other if self.splits and word not in self.splits and other in self.splits else word

    def exposes(self, split: str) -> bool:
        """True if the task declares the split, or declares no splits."""
        return not self.splits or self.split_named(split) in self.splits

    def in_mode(self, mode: str) -> Task:
        """Return the task for a mode: its `reference` variant for "reference", else the task itself."""
        return self.reference if mode == "reference" and self.reference is not None else self


def check_mode(mode: str) -> str:
    """Return `mode`.

    Raises:
        ConfigError: If `mode` is neither "fixed" nor "reference".
    """
    if mode not in ("fixed", "reference"):
        raise ConfigError(f"mode is {mode!r}. Expected fixed, or reference to reproduce the authors' code.")
    return mode


def metric_names(metrics: Sequence[Metric | MetricGroup]) -> list[str]:
    """Return the names of all scores that these metrics compute."""
    return [
        name for metric in metrics for name in (metric.names if isinstance(metric, MetricGroup) else (metric.name,))
    ]


def metric_notes(metrics: Sequence[Metric | MetricGroup]) -> tuple[str, ...]:
    """Return the notes on configuration that reports print with these metrics."""
    return tuple(metric.note() for metric in metrics if isinstance(metric, MetricGroup) and metric.note is not None)


def metric_directions(metrics: Sequence[Metric | MetricGroup]) -> dict[str, bool]:
    """Return, by score name, True if a higher score is better."""
    return {
        name: name not in metric.lower_is_better if isinstance(metric, MetricGroup) else metric.higher_is_better
        for metric in metrics
        for name in (metric.names if isinstance(metric, MetricGroup) else (metric.name,))
    }


@dataclass(frozen=True, slots=True)
class Mixture:
    """Tasks that are trained together, each sampled in proportion to its rate.

    Source: the mixture of `google/seqio`.

    Differs from it: rate 0 is allowed and marks a task as evaluation-only, and the rate "size" uses the number of
    loaded examples.
    """

    name: str
    rates: Mapping[str, float | str]
    """Rate by task name: a number, 0 for evaluation-only tasks, or "size" for the number of examples."""
    description: str = ""
    sized: SizeRate = SizeRate()
    """Rate of tasks with the rate "size"."""

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
        """Names of the tasks with a rate above 0; they are trained on if they have the training split."""
        return tuple(task for task, rate in self.rates.items() if rate == SIZE or float(rate) > 0)

    def proportions(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """Return the sampling probability of each task: p(t) = rate(t) / Σ rate(u).

        Args:
            sizes: Number of training examples by task; tasks that are missing or have no example are excluded.

        Raises:
            ConfigError: If no task remains.
        """
        rates = {
            task: self.sized(sizes[task]) if rate == SIZE else float(rate)
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


def _choose(name: str, keys: Sequence[str], split: str, take: int | None, skip: int | None, seed: int) -> Sequence[int]:
    """Positions of a subset, in the hashed order."""
    start = 0 if skip is None else at_least_one("skip", skip)
    stop = None if take is None else start + at_least_one("take", take)
    if len(keys) < (stop or start + 1):
        logger.warning("%s: %s has %d rows, so take=%s, skip=%s leave fewer.", name, split, len(keys), take, skip)
    return subset_order(keys, split=split, seed=seed)[start:stop]
