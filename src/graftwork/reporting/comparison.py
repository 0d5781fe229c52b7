"""Re-scoring of prediction files, and paired comparison of systems on the same questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.core.example import Example
from graftwork.core.files import read_json, read_lines, write_json
from graftwork.core.readers import fields_of
from graftwork.errors import DataError
from graftwork.metrics.answers import macro_average, paired_bootstrap, score_answer, score_group
from graftwork.tasks.augmentation import read_augmented
from graftwork.tasks.multihop import DATASETS, PARSERS, parse_open

_SCORES = {"em": "exact_match", "f1": "f1", "prec": "precision", "recall": "recall"}
"""Score attribute by the name that the original code uses in its prediction files."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """Answers of one system to one group of questions."""

    name: str
    group: str
    texts: Mapping[str, str]
    """Parsed answer by question id."""
    answers: Mapping[str, Sequence[str]]
    """Gold answers by question id, including unanswered questions."""
    about: Mapping[str, Mapping[str, Any]]
    """Further fields of the answer by question id."""


def read_predictions(path: Path, questions: Sequence[Path] = ()) -> list[Predictions]:
    """Read prediction lines of `graftwork evaluate` or `predict`, or a summary of Graftwork or the original code.

    Args:
        path: JSON lines, or a summary in JSON.
        questions: Augmented files with gold answers, for a summary without them. The group of a file is that of the
            data set that its folder is named after, or the only group.

    Raises:
        DataError: If the file has another format, or there are no gold answers.
    """
    if path.suffix == ".jsonl":
        rows = list(read_lines(path))
        if not rows or not all("prediction" in row and row.get("answers") for row in rows):
            raise DataError(
                f"{path}: expected lines with prediction and answers, as `graftwork evaluate` writes them to "
                "predictions/. Name such a file."
            )
        group, parse = _task_of(path)
        with fields_of(str(path), "id, input, prediction and answers in every line"):
            texts = {
                str(row["id"]): parse(row["prediction"], Example(str(row["id"]), row["input"], "")) for row in rows
            }
            if not all(isinstance(answer, str) for row in rows for answer in row["answers"]):
                raise TypeError("an answer that is no text")
        known = ("id", "answers")
        about = {str(row["id"]): {name: row[name] for name in row if name not in known} for row in rows}
        return [Predictions(str(path), group, texts, {str(row["id"]): row["answers"] for row in rows}, about)]
    stored = read_json(path)
    try:
        groups = {group: found["answer"] for group, found in stored["predictions"].items()}
        samples = stored.get("per_sample", {})
        golds = {group: {name: one["answers"] for name, one in samples[group].items()} for group in samples}
        if not all(isinstance(text, str) for texts in groups.values() for text in texts.values()):
            raise TypeError
    except (LookupError, TypeError, AttributeError):
        raise DataError(
            f"{path}: expected `predictions` by group and question; found something else. Name a summary, or a .jsonl "
            "file of predictions."
        ) from None
    golds |= _golds_of(questions, list(groups))
    if lost := [group for group in groups if group not in golds]:
        raise DataError(
            f"{path}: found no gold answers of {', '.join(lost)}. Name the augmented file with --questions."
        )
    return [
        Predictions(
            str(path), group, {str(name): text for name, text in texts.items()}, golds[group], samples.get(group, {})
        )
        for group, texts in groups.items()
    ]


def compare(systems: Sequence[Sequence[Predictions]]) -> list[dict[str, Any]]:
    """Score every system and group in percent, with the difference from the first system on the same questions.

    Returns:
        One row per system and group: `f1_low` and `f1_high` are the ends of a bootstrap's 95 % interval; `difference`
        of F1, `low` and `high` of its interval and `p_value` come from a paired bootstrap over questions.

    Raises:
        DataError: If a system and the first one have different questions.
    """
    rows: list[dict[str, Any]] = []
    first = {one.group: one for one in systems[0]}
    for number, system in enumerate(systems):
        for one in system:
            score = score_group(one.texts, one.answers)
            row: dict[str, Any] = {
                "file": one.name,
                "group": one.group,
                "questions": score.size,
                "missing": score.missing,
                "exact_match": score.exact_match,
                "f1": score.f1,
                "precision": score.precision,
                "recall": score.recall,
                "f1_low": score.f1_interval[0],
                "f1_high": score.f1_interval[1],
            }
            if number and one.group in first:
                row |= _difference(one, first[one.group])
            rows.append(row)
    return rows


def write_summary(path: Path, system: Sequence[Predictions], run: Mapping[str, Any]) -> None:
    """Write the predictions, gold answers and scores of one system in the format of the original code.

    Args:
        path: JSON file to write.
        system: Predictions, one entry per group.
        run: Further fields of the entry "run".

    Raises:
        DataError: If two files belong to one group.
    """
    if len({one.group for one in system}) < len(system):
        raise DataError("Found two files of one group of questions; expected one per group. Write a summary of each.")
    groups = {one.group: score_group(one.texts, one.answers) for one in system}
    scores: dict[str, Any] = {
        group: {short: getattr(score, name) for short, name in _SCORES.items()} for group, score in groups.items()
    }
    average = macro_average(groups)
    scores |= {short: average[name] for short, name in _SCORES.items()}
    write_json(
        path,
        {
            "predictions": {one.group: {"answer": dict(one.texts)} for one in system},
            "scores": scores,
            "per_sample": {
                one.group: {
                    name: {**one.about.get(name, {}), "answers": list(golds)} for name, golds in one.answers.items()
                }
                for one in system
            },
            "run": {
                **run,
                "counts": {one.group: len(one.answers) for one in system},
                "missing": {group: score.missing for group, score in groups.items()},
            },
        },
    )


def _difference(ours: Predictions, theirs: Predictions) -> dict[str, float]:
    if set(ours.answers) != set(theirs.answers):
        raise DataError(
            f"Found {len(ours.answers)} questions in {ours.name} and {len(theirs.answers)} in {theirs.name}, not the "
            "same ones. Compare answers to the same questions."
        )
    names = sorted(ours.answers)
    scores = [
        [score_answer(one.texts[name], one.answers[name]).f1 if name in one.texts else 0.0 for name in names]
        for one in (ours, theirs)
    ]
    found = paired_bootstrap(*scores)
    return {
        **{name: round(100 * found[name], 2) for name in ("difference", "low", "high")},
        "p_value": round(found["p_value"], 4),
    }


def _task_of(path: Path) -> tuple[str, Callable[[str, Example], str]]:
    """Return the group of a prediction file and the parser of its answers, by the name of the file."""
    name = path.name.split(".")[0]
    dataset = DATASETS.get(name)
    if dataset is None:
        return name, parse_open
    return dataset.group, PARSERS[dataset.kind]


def _golds_of(questions: Sequence[Path], groups: Sequence[str]) -> dict[str, dict[str, Sequence[str]]]:
    found: dict[str, dict[str, Sequence[str]]] = {}
    for path in questions:
        dataset = DATASETS.get(path.parent.name)
        group = groups[0] if dataset is None and len(groups) == 1 else dataset.group if dataset else path.stem
        found[group] = {str(row["test_id"]): list(row["answers"]) for row in read_augmented(path)}
    return found
