"""Scores of a model on tasks of lm-eval, and paired comparisons of two models."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from typing import Any, cast

import lm_eval  # pyright: ignore[reportMissingTypeStubs]
import lm_eval.api.metrics  # pyright: ignore[reportMissingTypeStubs]
import lm_eval.evaluator  # pyright: ignore[reportMissingTypeStubs]
import numpy as np
import torch

from graftwork.errors import ConfigError
from graftwork.grafting.converted import Converted
from graftwork.metrics.answers import paired_bootstrap
from graftwork.metrics.results import LM_EVAL, PairedRow, ResultRow
from graftwork.pipeline.harness.model import GraftLM
from graftwork.pipeline.harness.tasks import load_tasks
from graftwork.settings.evaluation import EvaluationSettings

# lm-eval has no complete types
_EVALUATE: Any = lm_eval.evaluator.evaluate
_METRICS: Any = lm_eval.api.metrics
_SEEDS = (0, 1234, 1234)
"""Default seeds of lm-eval for Python, NumPy and torch."""
_ALIASES = ("alias", "name", "sample_len", "sample_count")


class Harness:
    """Tasks of lm-eval, loaded once and scored for one model after the other.

    Args:
        settings: Names of the tasks, number of examples in the prompt, limit and batch size.
    """

    def __init__(self, settings: EvaluationSettings) -> None:
        self.settings = settings
        self._loaded = load_tasks(settings)
        self._rows: dict[str, list[ResultRow]] = {}
        # label → (task, score) → document → value
        self._values: dict[str, dict[tuple[str, str], dict[int, Any]]] = {}

    def score(
        self, converted: Converted, label: str, write: Callable[[str, Sequence[Mapping[str, Any]]], None] | None = None
    ) -> list[ResultRow]:
        """Score a model on all tasks, with lm-eval's own code.

        Args:
            converted: The model.
            label: Short name of the setting.
            write: Receives the name of each task and one record for each document and filter.
        """
        model = GraftLM(converted, batch_size=self.settings.batch_size)
        rows: list[ResultRow] = []
        values: dict[tuple[str, str], dict[int, Any]] = {}
        for tasks in self._loaded:
            started = time.perf_counter()
            found = self._evaluated(model, tasks)
            seconds = round(time.perf_counter() - started, 3)
            for name in found["results"]:
                row = _row(found, name, label, tasks["tasks"].get(name))
                # the time of a group is not that of each of its tasks
                rows.append(row if len(found["results"]) > 1 else replace(row, seconds=seconds))
            for name, samples in found["samples"].items():
                for sample in samples:
                    for metric in sample["metrics"]:
                        key = LM_EVAL + name, score_name(metric, sample["filter"])
                        values.setdefault(key, {})[sample["doc_id"]] = sample[metric]
                if write is not None:
                    write(LM_EVAL + name, [_record(sample) for sample in samples])
        self._rows[label], self._values[label] = rows, values
        return rows

    def _evaluated(self, model: GraftLM, tasks: dict[str, Any]) -> dict[str, Any]:
        try:
            with redirect_stdout(sys.stderr), _seeded():
                return _EVALUATE(
                    lm=model,
                    task_dict=tasks,
                    limit=self.settings.limit,
                    # standard errors are replaced by the paired bootstrap
                    bootstrap_iters=0,
                    log_samples=True,
                    apply_chat_template=self.settings.apply_chat_template,
                    fewshot_as_multiturn=self.settings.apply_chat_template,
                )
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            names = ", ".join(tasks["tasks"])
            raise ConfigError(
                f"lm-eval cannot score this model on {names}: {type(error).__name__}: {reason}. Correct the YAML file "
                "of the task or the settings; --debug shows lm-eval's log."
            ) from error

    def comparisons(self, baseline: str) -> tuple[PairedRow, ...]:
        """Compare all scored models with one of them on every score, by the paired bootstrap over documents.

        Args:
            baseline: Label of the model to compare with; there are no comparisons if it is not scored.
        """
        theirs = {row.task: row for row in self._rows.get(baseline, ())}
        return tuple(
            self._compared(row, theirs[row.task], name)
            for label, rows in self._rows.items()
            for row in rows
            for name, value in row.scores.items()
            if theirs and label != baseline and np.isfinite(value) and np.isfinite(theirs[row.task].scores[name])
        )

    def _compared(self, row: ResultRow, other: ResultRow, name: str) -> PairedRow:
        found: Mapping[str, float | None] = {"low": None, "high": None, "p_value": None}
        ours, theirs = (self._values[one.label].get((row.task, name)) for one in (row, other))
        if ours is not None and theirs is not None:
            documents = sorted(set(ours) & set(theirs))
            found = _bootstrap(
                [ours[number] for number in documents],
                [theirs[number] for number in documents],
                self._aggregation(row.task.removeprefix(LM_EVAL), name.partition(",")[0]),
            )
        return PairedRow(
            task=row.task,
            metric=name,
            label=row.label,
            baseline=other.label,
            value=row.scores[name],
            reference=other.scores[name],
            size=row.size,
            low=found["low"],
            high=found["high"],
            p_value=found["p_value"],
            higher_is_better=row.higher_is_better.get(name),
        )

    def _aggregation(self, task: str, metric: str) -> Callable[[Sequence[Any]], float]:
        for tasks in self._loaded:
            if task in tasks["tasks"]:
                return tasks["tasks"][task].aggregation().get(metric, _METRICS.mean)
        return _METRICS.mean


def score_name(metric: str, filtered: str) -> str:
    """Name of a score: the metric, with the filter of the answers if it is not the default one."""
    return metric if filtered == "none" else f"{metric},{filtered}"


def _row(found: Mapping[str, Any], name: str, label: str, task: Any) -> ResultRow:
    """Scores of one task or group."""
    scores: dict[str, float] = {}
    directions: dict[str, bool] = {}
    for key, value in found["results"][name].items():
        metric, _, filtered = key.partition(",")
        if key in _ALIASES or metric.endswith("_stderr") or not _is_number(value):
            continue
        scores[score_name(metric, filtered)] = float(value)
        higher = found["higher_is_better"].get(name, {}).get(metric)
        if higher is not None:
            directions[score_name(metric, filtered)] = bool(higher)
    size = found["results"][name].get("sample_len") or found["n-samples"].get(name, {}).get("effective", 0)
    version, shots = found["versions"].get(name), found["n-shot"].get(name, 0)
    about = "" if version in (None, "N/A") else f"version {version}, "
    return ResultRow(
        task=LM_EVAL + name,
        split=_split(task),
        label=label,
        scores=scores,
        size=int(size),
        higher_is_better=directions,
        notes=(f"{name}: lm-eval {lm_eval.__version__}, {about}{shots} examples in the prompt.",),
    )


def _split(task: Any) -> str:
    """Name of the split that lm-eval evaluates: test, else validation; empty for a group."""
    if task is None:
        return ""
    config: Any = task.config
    chosen = config.test_split if task.has_test_docs() else config.validation_split
    return str(chosen or "test")


def _record(sample: Mapping[str, Any]) -> dict[str, Any]:
    """One document with the model's answers and its scores, as plain values."""
    return {
        "id": str(sample["doc_id"]),
        "filter": sample["filter"],
        "prompt": _plain(sample["arguments"][0][0]),
        "target": _plain(sample["target"]),
        "prediction": _plain(sample["filtered_resps"]),
        "scores": {metric: _plain(sample[metric]) for metric in sample["metrics"]},
        "document": sample["doc_hash"],
    }


def _plain(value: Any) -> Any:
    """Value for JSON; what JSON lacks becomes text."""
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, list | tuple):
        return [_plain(one) for one in cast("Sequence[Any]", value)]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _bootstrap(
    ours: Sequence[Any], theirs: Sequence[Any], aggregate: Callable[[Sequence[Any]], float]
) -> Mapping[str, float | None]:
    """Interval and p-value of the difference; None for scores of texts, such as BLEU, which take minutes."""
    if not all(_is_number(value) for value in (*ours, *theirs)):
        return {"low": None, "high": None, "p_value": None}
    return paired_bootstrap(ours, theirs, aggregate=None if aggregate is _METRICS.mean else aggregate)


def _is_number(value: Any) -> bool:
    """True for numbers and for tuples of them, such as log-likelihood and number of words."""
    if isinstance(value, list | tuple):
        return all(_is_number(one) for one in cast("Sequence[Any]", value))
    return isinstance(value, bool | int | float | np.number)


@contextmanager
def _seeded() -> Generator[None]:
    """Set the seeds of lm-eval's command in the context, and restore the generators afterwards."""
    states = random.getstate(), np.random.get_state()
    # torch's generators are untyped
    generators: Any = torch.random
    with generators.fork_rng():
        random.seed(_SEEDS[0])
        np.random.seed(_SEEDS[1])
        generators.manual_seed(_SEEDS[2])
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
