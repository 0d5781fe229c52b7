"""Questions with the passages that were found for them, as files that others can go on from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftwork.core.files import append_line, drop_torn_line, read_lines, replace_file
from graftwork.errors import ConfigError, DataError
from graftwork.metrics.answers import normalize_short_answer
from graftwork.tasks.multihop import Dataset, MultihopSource
from graftwork.tasks.sources import Record, Records

if TYPE_CHECKING:
    from graftwork.retrieval.retriever import Hit, Retriever

QUESTIONS_AT_ONCE = 128
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Augmented:
    """What augmentation wrote."""

    path: Path
    questions: int
    passages: int
    without_passages: int
    """Questions for which nothing was found; they have an empty list, never empty passages."""


def augment(
    dataset: Dataset,
    data: Path,
    output: Path,
    retriever: Retriever,
    *,
    split: str = "train",
    top_k: int = 3,
    start: int | None = None,
    end: int | None = None,
    near_duplicates: float | None = None,
    engine: str = "embedded",
    progress: Callable[[int], None] | None = None,
) -> Augmented:
    """Find passages for the questions of a split and write both as one file.

    The id of a question is its place in the whole split, so that slices made apart can be put together. What was found
    is kept beside the output as it comes; the same call after a stop goes on from there.

    Args:
        dataset: The set of questions.
        data: Folder of its raw files.
        output: JSON file to write, whole or not at all.
        retriever: Finds the passages.
        split: Split to read.
        top_k: Passages for each question; fewer where fewer are found.
        start: First question; None for the first of all.
        end: Question to stop before; None for all.
        near_duplicates: Pass over a passage whose text resembles an earlier one's by so much, from 0 to 1; None keeps
            all.
        engine: Name of the retriever in the records.
        progress: Told how many questions more are done.

    Raises:
        ConfigError: If the slice is empty or reversed.
        DataError: If the data cannot be read, or a stopped run at this place was of other settings.
    """
    records = MultihopSource(dataset)(data, split).rows
    chosen = records[_bounds(start, end, len(records))]
    named = {"engine": engine, "fingerprint": retriever.index_fingerprint()}
    settings = {
        "dataset": dataset.name,
        "split": split,
        "start": start,
        "end": end,
        "top_k": top_k,
        "near_duplicates": near_duplicates,
        "retriever": named,
    }
    part = output.with_name(f".{output.name}.part.jsonl")
    done = _begun(part, settings)
    for first in range(len(done), len(chosen), QUESTIONS_AT_ONCE):
        batch = chosen[first : first + QUESTIONS_AT_ONCE]
        found = _search(retriever, [record.fields["question"] for record in batch], top_k, near_duplicates)
        for record, hits in zip(batch, found, strict=True):
            row = _row(record, hits, named)
            append_line(part, row)
            done.append(row)
        if progress:
            progress(len(batch))
    _write(output, done)
    part.unlink()
    counts = [len(row["passages"]) for row in done]
    return Augmented(output, len(done), sum(counts), counts.count(0))


def merge_augmented(paths: Sequence[Path], output: Path, *, allow_gaps: bool = False) -> Augmented:
    """Put slices of one split together, in the order of their ids.

    Raises:
        DataError: If an id is in two of them, ids are missing in between, or they come from different indexes.
    """
    rows: dict[int, dict[str, Any]] = {}
    sources: dict[str, Path] = {}
    for path in paths:
        for row in read_augmented(path):
            if row["test_id"] in rows:
                raise DataError(f"{path}: found test_id {row['test_id']} again; expected slices that do not overlap.")
            rows[row["test_id"]] = row
            sources.setdefault(json.dumps(row.get("retriever"), sort_keys=True), path)
    if len(sources) > 1:
        names = ", ".join(path.name for path in sources.values())
        raise DataError(
            f"Found passages of {len(sources)} different indexes ({names}); "
            "expected one. Augment the slices from the same index."
        )
    ids = sorted(rows)
    gaps = sorted(set(range(ids[0], ids[-1] + 1)) - set(ids)) if ids else []
    if gaps and not allow_gaps:
        raise DataError(
            f"Found no question {', '.join(map(str, gaps[:_SHOWN]))}{' …' if len(gaps) > _SHOWN else ''} ({len(gaps)} "
            "missing in between); expected slices that meet. Augment the rest, or allow gaps."
        )
    ordered = [rows[name] for name in ids]
    _write(output, ordered)
    counts = [len(row["passages"]) for row in ordered]
    return Augmented(output, len(ordered), sum(counts), counts.count(0))


def check_leakage(training: Path, held_out: Sequence[Path]) -> None:
    """Refuse a training file that shares questions with a file to be measured on.

    Raises:
        DataError: If a question's own id or its normalised text is in both; names examples.
    """
    seen: dict[tuple[str, str], str] = {}
    for row in read_augmented(training):
        for mark in _marks(row):
            seen[mark] = row["question"]
    for path in held_out:
        shared = [row["question"] for row in read_augmented(path) if any(mark in seen for mark in _marks(row))]
        if shared:
            examples = "; ".join(repr(question) for question in shared[:_SHOWN])
            raise DataError(
                f"{training} shares {len(shared)} questions with {path}, such as {examples}. Expected none: scores on "
                "them would say nothing. Cut the training slice elsewhere."
            )


def read_augmented(path: Path) -> list[dict[str, Any]]:
    """The records of an augmented file as they stand, ours or the original's.

    Raises:
        DataError: If it is no such file.
    """
    records: Records = MultihopSource(Dataset(path.stem, lambda *_: iter(()))).augmented(path, path.stem)
    return [dict(record.fields) for record in records.rows]


def _marks(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    marks = [("text", normalize_short_answer(row["question"]))]
    return [*marks, ("id", str(row["question_id"]))] if row.get("question_id") is not None else marks


def _bounds(start: int | None, end: int | None, size: int) -> slice:
    first, last = start or 0, size if end is None else end
    if first < 0 or last <= first or first >= size:
        raise ConfigError(
            f"Found start {first} and end {last} of {size} questions; expected 0 ≤ start < end, with end exclusive."
        )
    return slice(first, last)


def _begun(part: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a run that was stopped; starts one if there is none."""
    drop_torn_line(part)
    lines = list(read_lines(part))
    if not lines:
        append_line(part, settings)
        return []
    if lines[0] != settings:
        different = sorted(key for key in settings if lines[0].get(key) != settings[key])
        raise DataError(
            f"{part} was begun with another {', '.join(different)}. Repeat it with the same settings, or remove it."
        )
    return lines[1:]


def _search(
    retriever: Retriever, questions: Sequence[str], top_k: int, near_duplicates: float | None
) -> list[list[Hit]]:
    if near_duplicates is None:
        return retriever.search(questions, top_k)
    from graftwork.retrieval.retriever import drop_near_duplicates

    return [drop_near_duplicates(hits, top_k, near_duplicates) for hits in retriever.search(questions, 10 * top_k)]


def _row(record: Record, hits: Sequence[Hit], named: Mapping[str, Any]) -> dict[str, Any]:
    fields, answers = record.fields, list(record.fields["answers"])
    row = {
        "test_id": fields["test_id"],
        "question": fields["question"],
        "answer": answers[0] if len(answers) == 1 else answers,
    }
    for name in ("question_id", "choices"):
        if fields.get(name) is not None:
            row[name] = list(fields[name]) if name == "choices" else fields[name]
    return {
        **row,
        "passages": [hit.text for hit in hits],
        "passage_ids": [hit.id for hit in hits],
        "titles": [hit.title for hit in hits],
        "scores": [round(hit.score, 6) for hit in hits],
        "retriever": dict(named),
    }


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with replace_file(path) as file:
        json.dump([_plain(row) for row in rows], file, ensure_ascii=False, indent=1)
        file.write("\n")


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    # what reading added for tasks is not part of the file
    return {key: list(value) if isinstance(value, tuple) else value for key, value in row.items() if key != "answers"}
