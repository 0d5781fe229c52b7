"""Results of an evaluation as rows of one table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graftwork.core.messages import aligned
from graftwork.metrics.results import LM_EVAL, PairedRow, ResultRow, Results


def records_of(results: Results) -> list[dict[str, Any]]:
    """Return one record for each task and setting; for tasks of lm-eval one for each score, with its comparison."""
    seeds = len({row.seed for row in results.rows}) > 1
    own = [row for row in results.rows if not row.task.startswith(LM_EVAL)]
    records: list[dict[str, Any]] = []
    for row in own:
        # an undefined score, such as BLEU without any explanation, is shown as a dash like a missing one
        scores = {name: round(value, 2) for name, value in row.scores.items() if value == value}
        records.append({**_about(row, seeds), **scores, "size": row.size})
    return aligned([*records, *_of_lm_eval([row for row in results.rows if row not in own], results, seeds)])


def _of_lm_eval(rows: Sequence[ResultRow], results: Results, seeds: bool) -> list[dict[str, Any]]:
    """Records of the tasks of lm-eval, each score beside the same score of the other settings."""
    compared = {(row.task, row.metric, row.label): row for row in results.comparisons}
    scores = dict.fromkeys((row.task, metric) for row in rows for metric in row.scores)
    return [
        {
            **_about(row, seeds),
            "metric": metric,
            "value": significant(row.scores[metric]),
            "size": row.size,
            **_difference(compared.get((task, metric, row.label))),
        }
        for task, metric in scores
        for row in rows
        if row.task == task and metric in row.scores
    ]


def _about(row: ResultRow, seeds: bool) -> dict[str, Any]:
    return {"setting": row.label, "task": row.task, "split": row.split, **({"seed": row.seed} if seeds else {})}


def _difference(found: PairedRow | None) -> dict[str, Any]:
    """Difference from the baseline, with the 95 % interval and the p-value of the paired bootstrap."""
    if found is None:
        return {}
    interval = {} if found.low is None else {"low": significant(found.low), "high": significant(found.high)}
    p_value = {} if found.p_value is None else {"p_value": round(found.p_value, 4)}
    return {"difference": significant(found.difference), **interval, **p_value}


def significant(value: float | None) -> float | str:
    """Round to four significant digits: scores of lm-eval are shares, perplexities or percentages."""
    return "–" if value is None or value != value else float(f"{value:.4g}")
