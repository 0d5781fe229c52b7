"""Tasks from users' own files and hub data sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from graftwork.core.cache import remembered
from graftwork.core.compression import without_compression_suffix
from graftwork.core.example import Example
from graftwork.core.messages import say
from graftwork.errors import DataError
from graftwork.metrics.labels import ACCURACY
from graftwork.metrics.metric import Metric
from graftwork.metrics.text import (
    EXACT_MATCH,
    F1,
    ROUGE_L,
    SQUAD2_EXACT_MATCH,
    SQUAD2_F1,
    multiple_choice,
)
from graftwork.settings.fields import DataFields
from graftwork.settings.lengths import NEW_TOKENS
from graftwork.tasks.own_data.explained import explained
from graftwork.tasks.own_data.formats import Parts, RowFormat, final_answer, mapped
from graftwork.tasks.own_data.hub import hub_rows, parse_hub_name
from graftwork.tasks.own_data.recognition import SAMPLE, recognise
from graftwork.tasks.own_data.rows import SUFFIXES, Row, open_rows
from graftwork.tasks.own_data.teacher import report, with_outputs
from graftwork.tasks.sources import Record, Records
from graftwork.tasks.streams import RecordStream, is_large, source_key
from graftwork.tasks.task import Task

HUB_PREFIX = "hub:"


@dataclass(frozen=True)
class Description:
    """Format of a data set, after all of its rows have been read once."""

    kind: str
    """File format."""
    format: RowFormat
    rows: int
    labels: tuple[str, ...] = ()
    """Distinct classes, sorted by name."""
    longest_target: int = 0
    """Number of characters of the longest label with its explanations."""
    explained: int | None = None
    """Number of rows with an explanation; None if no column has one."""
    unmatched: int = 0
    """Number of quotes that are not in their text."""
    teacher: str = ""
    """Numbers of a language model's outputs that are kept and left out, for the line; empty if there are none."""
    unanswerable: bool = False
    """True if the right answer of some row is the empty text, as in SQuAD 2.0."""
    key: str | None = None
    """Cache key of the rows of a large file; None for a small file and for the hub."""

    @property
    def line(self) -> str:
        """One line on format, columns and number of rows."""
        name = f", {self.format.name} format" if self.format.name else ""
        more = "" if self.explained is None else f", {self.explained:,} of them explained"
        missing = f", {self.unmatched:,} quotes are not in their text and left out" if self.unmatched else ""
        return f"{self.kind}{name}, {self.format.uses}, {self.rows:,} rows{more}{missing}{self.teacher}"


@dataclass(frozen=True, slots=True)
class OwnSource:
    """Source of a user's file, or of a data set of the hub; the data folder is ignored."""

    name: str
    """Path, or name with the prefix hub:."""
    fields: DataFields
    required: bool = True
    """True if every row needs an answer."""

    def __call__(self, data: Path, split: str) -> Records:
        """Read the rows of a split; a file has one split, "all".

        Raises:
            DataError: If the data cannot be read or a row is malformed; the message names file and line.
        """
        description = describe(self.name, self.fields, split, self.required)
        stream = partial(_records, self.name, self.fields, split, self.required, description.format)
        rows: Sequence[Record]
        if description.key is None and not self.name.startswith(HUB_PREFIX):
            rows = tuple(stream())
        else:
            rows = RecordStream(stream, description.rows, description.key)
        return Records(task_name(self.name), split, rows, len(rows), 0, Path(self.name.removeprefix(HUB_PREFIX)))


def is_own_data(name: str) -> bool:
    """True if a name is the path of a data file, or of a data set of the hub with the prefix `hub:`."""
    return name.startswith(HUB_PREFIX) or without_compression_suffix(name).lower().endswith(SUFFIXES)


def task_name(name: str) -> str:
    """Return the task name of a file or a hub data set: the stem of the file, or id and configuration."""
    if name.startswith(HUB_PREFIX):
        found = parse_hub_name(name)
        stem = Path(found.path).name if Path(found.path).exists() else found.path
        return "_".join("/".join(filter(None, (stem, found.config))).split())
    path = Path(without_compression_suffix(Path(name).name))
    return "_".join((path.stem or path.name).split()) or "file"


def own_task(name: str, split: str, fields: DataFields, *, required: bool = True) -> tuple[Task, str]:
    """Make a task from a user's file or a hub data set, and return it with the split to read.

    All rows are read once, so that a malformed one is found before a model is loaded. One line on stderr names the
    format and the columns.

    Args:
        name: Path of the file, or `hub:ID[:CONFIGURATION[:SPLIT]]`.
        split: Split to read from the hub if the name has none.
        fields: Mapping of columns; empty to recognise the format.
        required: True if every row needs an answer; False for prediction.

    Raises:
        DataError: If the data cannot be read, is in no known format or in several, or a row is malformed.
    """
    part = split_of(name, split)
    description = describe(name, fields.only_fields(), part, required)
    task = Task(
        name=task_name(name),
        source=OwnSource(name, fields.only_fields(), required),
        format=format_own,
        labels=description.labels,
        # a class is short; any other answer is as long as the targets of the training
        new_tokens=NEW_TOKENS if description.labels else None,
        description=f"{name.removeprefix(HUB_PREFIX)}: {description.line}",
    )
    return _scored(task, description), part


def split_of(name: str, split: str) -> str:
    """Return the split to read: that of the name, else the requested one on the hub; "all" for files."""
    if not name.startswith(HUB_PREFIX):
        return "all"
    return parse_hub_name(name).split or split or "train"


def describe(name: str, fields: DataFields, split: str, required: bool = True) -> Description:
    """Return the format of a data set, and print it in one line the first time.

    Raises:
        DataError: If the data cannot be read, is in no known format or in several, or a row is malformed.
    """
    files = [*([] if name.startswith(HUB_PREFIX) else [name]), *(fields.teacher_outputs if required else ())]
    return _describe(name, fields, split, required, tuple(map(_version, files)))


def _version(name: str) -> tuple[int, int]:
    """Size of a file, and the time of its last change.

    Raises:
        DataError: If there is no such file.
    """
    try:
        status = Path(name).stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{name}: found {reason}; expected a data file. Check the path.") from None
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=64)
def _describe(
    name: str, fields: DataFields, split: str, required: bool, versions: tuple[tuple[int, int], ...]
) -> Description:
    hub = parse_hub_name(name) if name.startswith(HUB_PREFIX) else None
    kind = "hub data set" if hub is not None else open_rows(Path(name)).kind
    rows = _rows(name, split, fields if required else None)
    first = list(islice(rows, SAMPLE))
    if not first:
        raise DataError(f"{name}: found no row; expected at least one.")
    place = name if fields.mapped or len(first) > 1 else first[0][0]
    form = _format(fields) if fields.mapped else recognise([row for _, row in first], place, kind)
    large = hub is None and is_large(Path(name))
    # the first version is that of the file itself, which the key contains anyway
    key = source_key(Path(name), "own data", fields, required, *versions[1:]) if large else None
    facts = remembered(key, lambda: _facts(form, chain(first, rows), required))
    found = Description(
        kind,
        form,
        facts["rows"],
        tuple(facts["labels"]),
        unanswerable=facts["unanswerable"],
        key=key,
        longest_target=facts.get("longest", 0),
        explained=facts.get("explained") if form.scores == "explained" else None,
        unmatched=facts.get("unmatched", 0),
        teacher=report(facts.get("teacher", {})),
    )
    say(f"{name}: {found.line}")
    return found


def _format(fields: DataFields) -> RowFormat:
    return explained(fields) if fields.text_field is not None else mapped(fields)


def _facts(form: RowFormat, rows: Iterable[Row], required: bool) -> dict[str, Any]:
    """Validate every row; return their number, the classes, and whether the right answer of some row is empty."""
    labels: set[str] = set()
    count, unanswerable = 0, False
    with_reason = unmatched = longest = 0
    teacher: dict[str, Any] = {"kept": 0, "wrong": 0, "unread": 0, "first": ""}
    for where, row in rows:
        parts = form.read(row, where, required)
        count += 1
        unanswerable = unanswerable or parts.answers == ("",)
        if form.scores in ("classes", "explained") and parts.target is not None:
            labels.add(parts.target)
        with_reason += bool(parts.spans or parts.explanations)
        unmatched += parts.unmatched
        if parts.kept is not None:
            kept = parts.kept
            teacher["kept"] += len(kept.reasons)
            teacher["wrong"] += kept.wrong
            teacher["unread"] += kept.unread
            teacher["first"] = teacher["first"] or kept.first
        reasons = [*parts.explanations, *(parts.input[start:end] for start, end in parts.spans)]
        longest = max(longest, len(parts.target or "") + sum(len(reason) + len(" explanation: ") for reason in reasons))
    return {
        "rows": count,
        "labels": sorted(labels),
        "unanswerable": unanswerable,
        "explained": with_reason,
        "unmatched": unmatched,
        "longest": longest,
        "teacher": teacher,
    }


def _records(name: str, fields: DataFields, split: str, required: bool, form: RowFormat) -> Iterator[Record]:
    for index, (where, row) in enumerate(_rows(name, split, fields if required else None)):
        yield Record(_key(row, index), _fields(form.read(row, where, required), fields, where))


def format_own(record: Record) -> Example:
    """Return the example of a row that `OwnSource` has read."""
    fields = record.fields
    metadata: dict[str, Any] = {}
    if fields["turns"]:
        metadata |= {"turns": fields["turns"], "where": fields["where"]}
    if fields["choices"]:
        metadata["options"] = fields["choices"]
    target: str | None = fields["target"]
    return Example(record.key, fields["input"], target or "", fields["answers"], metadata, fields["pair"])


def _fields(parts: Parts, fields: DataFields, where: str) -> Mapping[str, Any]:
    if fields.text_field is not None:
        return {
            "text": parts.input,
            "label": parts.target,
            "explanations": parts.explanations,
            "spans": parts.spans,
            "unmatched": parts.unmatched,
            "choices": parts.choices,
            "where": where,
        }
    turns = parts.turns
    if fields.as_chat and not turns:
        asked = (("user", parts.input if parts.pair is None else f"{parts.input} {parts.pair}"),)
        turns = asked if parts.target is None else (*asked, ("assistant", parts.target))
    return {
        "input": parts.input,
        "target": parts.target,
        "answers": parts.answers,
        "pair": parts.pair,
        "turns": turns,
        "choices": parts.choices,
        "where": where,
    }


def _rows(name: str, split: str, fields: DataFields | None) -> Iterator[Row]:
    """Rows of a data set, with a language model's outputs if the fields name any; None for inputs of a prediction."""
    hub = name.startswith(HUB_PREFIX)
    rows = hub_rows(replace(parse_hub_name(name), split=split)) if hub else open_rows(Path(name)).rows()
    yield from with_outputs(rows, fields.teacher_outputs) if fields is not None and fields.teacher_outputs else rows


def _key(row: Mapping[str, Any], index: int) -> str:
    given = row.get("id")
    return str(given) if isinstance(given, str | int) and str(given) else str(index)


def _scored(task: Task, description: Description) -> Task:
    """Task with the metrics of its kind of answers."""
    kind = description.format.scores
    if kind == "classes":
        return replace(task, metrics=(ACCURACY,))
    if kind == "final_answer":
        return replace(task, metrics=(ACCURACY,), parse=_final)
    if kind == "options":
        nearest = Metric("accuracy", multiple_choice(_lower_options), description="share of rows whose option is right")
        return replace(task, metrics=(nearest, EXACT_MATCH))
    if description.unanswerable:
        return replace(task, metrics=(SQUAD2_EXACT_MATCH, SQUAD2_F1), official_metrics=(SQUAD2_EXACT_MATCH, SQUAD2_F1))
    more = (ROUGE_L,) if kind == "free_text" else ()
    return replace(task, metrics=(EXACT_MATCH, F1, *more), official_metrics=(F1,))


def _final(prediction: str, example: Example) -> str:
    return final_answer(prediction)


def _lower_options(example: Example) -> tuple[str, ...]:
    return tuple(option.lower() for option in example.metadata["options"])
