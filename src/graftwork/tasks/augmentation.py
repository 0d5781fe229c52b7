"""Files of questions with retrieved passages: writing, merging, reading, and the check for leakage."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from graftwork.core.files import append_line, drop_torn_line, read_lines, replace_file, write_checksum
from graftwork.core.readers import require, shorten
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
    """Path and counts of a written augmented file."""

    path: Path
    questions: int
    passages: int
    without_passages: int
    """Number of questions without any hit; their list of passages is empty and never holds empty texts."""


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
    """Retrieve passages for the questions of a split and write both to one file.

    The id of a question is its index in the whole split, so slices that are augmented separately can be merged.
    Finished rows are appended to a part file next to the output; the same call resumes from it after an interruption.

    Args:
        dataset: Questions to augment.
        data: Folder of the raw files.
        output: JSON file to write, atomically.
        retriever: Searches the passages.
        split: Split to read.
        top_k: Passages per question; fewer if the search has fewer hits.
        start: Index of the first question; None starts at 0.
        end: Index after the last question; None reads to the end.
        near_duplicates: Similarity from 0 to 1 above which a passage counts as a duplicate of an earlier one and is
            skipped; None keeps all passages.
        engine: Name of the retriever in the records.
        progress: Called with the number of newly finished questions.

    Raises:
        ConfigError: If the slice is empty or reversed.
        DataError: If the data cannot be read, or a part file of a run with other settings exists.
    """
    records = MultihopSource(dataset)(data, split).rows
    chosen = records[_bounds(start, end, len(records))]
    index = {"engine": engine, "fingerprint": retriever.index_fingerprint()}
    settings = {
        "dataset": dataset.name,
        "split": split,
        "start": start,
        "end": end,
        "top_k": top_k,
        "near_duplicates": near_duplicates,
        "retriever": index,
    }
    part = output.with_name(f".{output.name}.part.jsonl")
    done = _resume(part, settings)
    for first in range(len(done), len(chosen), QUESTIONS_AT_ONCE):
        batch = chosen[first : first + QUESTIONS_AT_ONCE]
        found = _search(retriever, [record.fields["question"] for record in batch], top_k, near_duplicates)
        for record, hits in zip(batch, found, strict=True):
            row = _row(record, hits, index)
            append_line(part, row)
            done.append(row)
        if progress:
            progress(len(batch))
    _write(output, done)
    part.unlink()
    counts = [len(row["passages"]) for row in done]
    return Augmented(output, len(done), sum(counts), counts.count(0))


def merge_augmented(paths: Sequence[Path], output: Path, *, allow_gaps: bool = False) -> Augmented:
    """Merge slices of one split in the order of their ids.

    Raises:
        DataError: If slices overlap, ids between them are missing, or passages come from different indexes.
    """
    rows: dict[int, dict[str, Any]] = {}
    sources: dict[str, Path] = {}
    for path in paths:
        for row in read_augmented(path):
            if type(row["test_id"]) is not int:
                raise DataError(
                    f"{path}: found test_id {shorten(row['test_id'])}; expected whole numbers, as `augment` writes."
                )
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
            "missing in between); expected contiguous slices. Augment the rest, or allow gaps."
        )
    ordered = [rows[name] for name in ids]
    _write(output, ordered)
    counts = [len(row["passages"]) for row in ordered]
    return Augmented(output, len(ordered), sum(counts), counts.count(0))


def check_leakage(training: Path, held_out: Sequence[Path]) -> None:
    """Raise if a training file shares questions with an evaluation file.

    Raises:
        DataError: If the publisher's id or the normalised text of a question occurs in both; the message lists
            examples.
    """
    seen: dict[tuple[str, str], str] = {}
    for row in read_augmented(training):
        for identifier in _identifiers(row):
            seen[identifier] = row["question"]
    for path in held_out:
        shared = [row["question"] for row in read_augmented(path) if any(own in seen for own in _identifiers(row))]
        if shared:
            examples = "; ".join(repr(question) for question in shared[:_SHOWN])
            raise DataError(
                f"{training} shares {len(shared)} questions with {path}, such as {examples}. Expected none: scores on "
                "them would be meaningless. Cut the training slice elsewhere."
            )


def read_augmented(path: Path) -> list[dict[str, Any]]:
    """Read the unmodified records of an augmented file, written by Graftwork or by the original code.

    Raises:
        DataError: If the file is not an augmented file.
    """
    records: Records = MultihopSource(Dataset(path.stem, _no_rows)).augmented(path, path.stem)
    return [dict(record.fields) for record in records.rows]


def _no_rows(dataset: Dataset, path: Path, split: str) -> Iterator[dict[str, Any]]:
    """Reader of a data set that has augmented files only."""
    return iter(())


def _identifiers(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Identifiers of a question: its normalised text and, if present, the publisher's id."""
    found = [("text", normalize_short_answer(row["question"]))]
    return [*found, ("id", str(row["question_id"]))] if row.get("question_id") is not None else found


def _bounds(start: int | None, end: int | None, size: int) -> slice:
    first, last = start or 0, size if end is None else end
    if first < 0 or last <= first or first >= size:
        raise ConfigError(
            f"Found start {first} and end {last} of {size} questions; expected 0 ≤ start < end, with end exclusive."
        )
    return slice(first, last)


def _resume(part: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the finished rows of an interrupted run, or start a part file."""
    drop_torn_line(part)
    lines = list(read_lines(part))
    if not lines:
        append_line(part, settings)
        return []
    if lines[0] != settings:
        different = sorted(key for key in settings if lines[0].get(key) != settings[key])
        raise DataError(
            f"{part} was started with another {', '.join(different)}. Repeat it with the same settings, or remove it."
        )
    for number, row in enumerate(lines[1:], start=2):
        require(row, "test_id", int, f"{part}, line {number}")
        require(row, "passages", list, f"{part}, line {number}")
    return lines[1:]


def _search(
    retriever: Retriever, questions: Sequence[str], top_k: int, near_duplicates: float | None
) -> list[list[Hit]]:
    if near_duplicates is None:
        return retriever.search(questions, top_k)
    from graftwork.retrieval.retriever import drop_near_duplicates

    return [drop_near_duplicates(hits, top_k, near_duplicates) for hits in retriever.search(questions, 10 * top_k)]


def _row(record: Record, hits: Sequence[Hit], index: Mapping[str, Any]) -> dict[str, Any]:
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
        "retriever": dict(index),
    }


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with replace_file(path) as file:
        json.dump([_plain(row) for row in rows], file, ensure_ascii=False, indent=1)
        file.write("\n")
    write_checksum(path)


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    # `answers` is derived while reading and is not part of the file format
    return {
        key: list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value
        for key, value in row.items()
        if key != "answers"
    }
