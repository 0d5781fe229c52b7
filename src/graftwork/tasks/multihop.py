"""Question answering over passages: four general and nine domain-specific data sets, and augmented files."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from graftwork.core.example import Example
from graftwork.core.readers import JsonError, fields_of, parse_json, read_head, require
from graftwork.errors import DataError
from graftwork.metrics.answers import ANSWER_EXACT_MATCH, ANSWER_F1, ANSWER_PRECISION, ANSWER_RECALL
from graftwork.tasks.sources import Record, Records, read_json_lines, read_lines
from graftwork.tasks.task import Task

Kind = Literal["open", "yes_no", "choice"]
"""Answer format: a short free answer, yes or no, or a letter from A to E."""

LETTERS = "ABCDE"
FINAL_DECISION = "The final decision is:"
"""Marker before the verdict in PubMedQA's long answers."""

Row = Mapping[str, Any]
Reader = Callable[["Dataset", Path, str], Iterator[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Dataset:
    """One question-answering data set: its files, their reader, and its domain."""

    name: str
    read: Reader
    """Yields a mapping per row with `question`, `answers` and, if present, `question_id` and `choices`."""
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    """File name by split; "*" is the pattern for other splits, with {split} as placeholder."""
    kind: Kind = "open"
    domain: str = "general"
    index: str = "wiki"
    """Name of the index to retrieve passages from."""
    group: str = ""
    """Group name in prediction files."""
    demonyms: bool = False
    """Accept demonyms as answers too; applies to 2WikiMultihopQA only."""
    possible_answers: bool = False
    """Accept the values of the column `possible_answers` too; applies to PopQA only."""
    keep_maybe: bool = True
    """Keep questions whose verdict is neither yes nor no; applies to PubMedQA only."""

    def file(self, split: str) -> str:
        """Return the name of the raw file of a split."""
        return (self.files.get(split) or self.files["*"]).format(split=split)


def answers_of(*candidates: Any) -> tuple[str, ...]:
    """Return the distinct non-empty texts among the candidates, in order; the first one is the training target."""
    return tuple(dict.fromkeys(text for text in candidates if isinstance(text, str) and text.strip()))


def _json_array(path: Path) -> list[Any]:
    try:
        rows = parse_json("\n".join(read_lines(path)))
    except JsonError as problem:
        line = "" if problem.line is None else f", line {problem.line}"
        raise DataError(f"{path}{line}: not readable as JSON ({problem.reason}). Download it again.") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: found a {type(rows).__name__}; expected a list of questions.")
    return cast("list[Any]", rows)


def _required(path: Path, number: int, row: Any, name: str) -> Any:
    kind = type(row).__name__
    fields = cast("dict[str, Any]", row) if isinstance(row, dict) else None
    if fields is None or fields.get(name) is None:
        found = f"a {kind}" if fields is None else ", ".join(map(repr, fields))
        raise DataError(
            f"{path}, record {number}: found {found or 'nothing'}; expected a field {name!r}. Fix the file."
        )
    return fields[name]


def _text(path: Path, number: int, row: Any, name: str) -> str:
    """Return a required field, which must be a text."""
    _required(path, number, row, name)
    return str(require(row, name, str, f"{path}, record {number}"))


def _texts(value: Any, where: str, name: str) -> tuple[str, ...]:
    """Return a list of texts; null counts as an empty list, and null entries are skipped."""
    entries = cast("list[Any]", [] if value is None else require({name: value}, name, list, where))
    return tuple(str(require({name: entry}, name, str, where)) for entry in entries if entry is not None)


def _read_2wiki(dataset: Dataset, path: Path, split: str) -> Iterator[dict[str, Any]]:
    aliases: dict[str, list[Any]] = {}
    alias_file = path.with_name("id_aliases.json")
    if alias_file.exists():
        for line, row in read_json_lines(alias_file):
            where = f"{alias_file}, line {line}"
            with fields_of(where, "Q_id, aliases and demonyms"):
                names = _texts(row.get("aliases"), where, "aliases")
                demonyms = _texts(row.get("demonyms"), where, "demonyms") if dataset.demonyms else ()
                aliases[str(row.get("Q_id"))] = [*names, *demonyms]
    for number, row in enumerate(_json_array(path)):
        answer = _text(path, number, row, "answer")
        known = aliases.get(str(row.get("answer_id")), ())
        yield {
            "question": _text(path, number, row, "question"),
            "answers": answers_of(answer, *known),
            "question_id": row.get("_id"),
        }


def _read_hotpot(dataset: Dataset, path: Path, split: str) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(_json_array(path)):
        answers = answers_of(_text(path, number, row, "answer"))
        yield {"question": _text(path, number, row, "question"), "answers": answers, "question_id": row.get("_id")}


def _read_popqa(dataset: Dataset, path: Path, split: str) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader((line + "\n" for line in read_lines(path)), delimiter="\t", strict=True)
    try:
        for number, row in enumerate(reader):
            if None in row:
                raise DataError(
                    f"{path}, line {reader.line_num}: found more cells than the header names; expected as many. Fix "
                    "the line."
                )
            listed = [_required(path, number, row, "obj"), *_json_cell(path, number, row, "o_aliases")]
            if dataset.possible_answers:
                listed += _json_cell(path, number, row, "possible_answers")
            yield {
                "question": _required(path, number, row, "question"),
                "answers": answers_of(*listed),
                "question_id": row.get("id"),
            }
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: found broken quoting ({error}). Fix the line.") from error


def _json_cell(path: Path, number: int, row: Row, name: str) -> list[Any]:
    text = row.get(name) or "[]"
    try:
        value = parse_json(text)
    except JsonError:
        value = None
    if not isinstance(value, list):
        raise DataError(
            f"{path}, record {number}: found {text[:60]!r} as {name!r}; expected a JSON list. Fix the cell."
        )
    return list(_texts(value, f"{path}, record {number}", name))


def _read_complex_web(dataset: Dataset, path: Path, split: str) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(_json_array(path)):
        _required(path, number, row, "answers")
        where = f"{path}, record {number}"
        listed: list[Any] = []
        # keep the order of the file: the first answer is the training target
        for entry in require(row, "answers", list, where):
            with fields_of(where, "answers with 'answer' and 'aliases'"):
                listed += _texts([entry.get("answer")], where, "answer")
                listed += _texts(entry.get("aliases"), where, "aliases")
        yield {
            "question": _text(path, number, row, "question"),
            "answers": answers_of(*listed),
            "question_id": row.get("ID"),
        }


def _read_lines_of(change: Callable[[Dataset, str, str], str | None]) -> Reader:
    def read(dataset: Dataset, path: Path, split: str) -> Iterator[dict[str, Any]]:
        for number, row in read_json_lines(path):
            _required(path, number, row, "answer")
            answer = require(row, "answer", (str, int, float), f"{path}, line {number}")
            found: dict[str, Any] = {
                "question": _text(path, number, row, "question"),
                "question_id": row.get("id"),
                "answers": answers_of(change(dataset, str(answer), split)),
            }
            if dataset.kind == "choice":
                found["choices"] = _choices(path, number, row)
            yield found

    return read


def _choices(path: Path, number: int, row: Row) -> tuple[str, ...]:
    found = _required(path, number, row, "choices")
    shown = str(found)[:60]
    choices = cast("list[Any]", found) if isinstance(found, list) else []
    if len(choices) != len(LETTERS):
        raise DataError(f"{path}, record {number}: found {shown!r}; expected a list of five 'choices'.")
    return tuple(
        str(require({"choices": choice}, "choices", (str, int, float), f"{path}, record {number}"))
        for choice in choices
    )


def _verdict(dataset: Dataset, answer: str, split: str) -> str | None:
    if split == "train":
        return answer
    decision = answer.partition(FINAL_DECISION)[2] or answer
    word = re.search(r"\b(yes|no|maybe)\b", decision, re.IGNORECASE)
    found = word.group(1).lower() if word else decision.strip()
    return found if found in ("yes", "no") or dataset.keep_maybe else None


_AS_IS = _read_lines_of(lambda dataset, answer, split: answer)
_LOWERED = _read_lines_of(lambda dataset, answer, split: answer.lower())
_LINES = {"*": "{split}.jsonl"}

DATASETS: Mapping[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        Dataset("2wikimultihopqa", _read_2wiki, {"*": "{split}.json"}, group="wiki"),
        Dataset(
            "complexwebquestions", _read_complex_web, {"*": "ComplexWebQuestions_{split}.json"}, group="complexweb"
        ),
        Dataset(
            "hotpotqa",
            _read_hotpot,
            {"train": "hotpot_train_v1.1.json", "*": "hotpot_dev_distractor_v1.json"},
            group="hotpot",
        ),
        Dataset("popqa", _read_popqa, {"*": "popQA.tsv"}, group="popqa"),
        Dataset("pubmedqa", _read_lines_of(_verdict), _LINES, "yes_no", "med", "med", "pubmedqa"),
        Dataset("idquad", _AS_IS, _LINES, "open", "med", "med", "idquad"),
        Dataset("medqa", _AS_IS, _LINES, "open", "med", "med", "medqa"),
        Dataset("bioasq", _LOWERED, _LINES, "yes_no", "med", "med", "bioasq"),
        Dataset("basketball", _AS_IS, _LINES, "open", "sports", "sports", "basketball"),
        Dataset("football", _AS_IS, _LINES, "open", "sports", "sports", "football"),
        Dataset("casehold", _AS_IS, _LINES, "choice", "law", "law", "casehold"),
        Dataset("lhf", _LOWERED, _LINES, "yes_no", "law", "law", "lhf"),
        Dataset("housingqa", _LOWERED, _LINES, "yes_no", "law", "law", "housingqa"),
    )
}

DOMAINS: Mapping[str, tuple[str, ...]] = {
    "general": ("2wikimultihopqa", "complexwebquestions", "hotpotqa", "popqa"),
    "med": ("pubmedqa", "idquad"),
    "sports": ("basketball", "football"),
    "law": ("casehold", "lhf", "housingqa"),
}
"""Data sets of each domain, which are trained and validated together."""


@dataclass(frozen=True, slots=True)
class MultihopSource:
    """Source of one data set: its augmented file `<split>.json` if present, else the publisher's raw file.

    The key of a record is its index in the raw file, before any subsetting or filtering.
    """

    dataset: Dataset

    def __call__(self, data: Path, split: str) -> Records:
        """Read the split.

        Raises:
            DataError: If the file is missing, or a record lacks a field; the message names file, record and field.
        """
        folder = data / self.dataset.name if (data / self.dataset.name).is_dir() else data
        prepared, raw = folder / f"{split}.json", folder / self.dataset.file(split)
        if prepared.exists() and is_augmented(prepared):
            return self.augmented(prepared, split)
        if not raw.exists():
            raise DataError(
                f"Found no {raw.name} of {self.dataset.name} in {folder}; expected the publisher's file, or an "
                f"augmented {prepared.name}. Name the folder of the file, or another split."
            )
        rows = [
            Record(str(number), {"test_id": number, **row})
            for number, row in enumerate(self.dataset.read(self.dataset, raw, split))
        ]
        return Records(self.dataset.name, split, tuple(rows), len(rows), 0, raw)

    def augmented(self, path: Path, split: str) -> Records:
        """Read a file of questions with passages, written by Graftwork or by the original code."""
        rows: list[Record] = []
        for number, row in enumerate(_json_array(path)):
            _required(path, number, row, "test_id")
            name = str(require(row, "test_id", (int, str), f"{path}, record {number}"))
            found = _augmented_fields(path, number, row)
            rows.append(Record(name, {**row, **found}))
        return Records(self.dataset.name, split, tuple(rows), len(rows), 0, path)


def _augmented_fields(path: Path, number: int, row: Any) -> dict[str, Any]:
    where = f"{path}, record {number}"
    answer = _required(path, number, row, "answer")
    _required(path, number, row, "passages")
    found: dict[str, Any] = {
        "question": _text(path, number, row, "question"),
        "answers": answers_of(*_texts(answer if isinstance(answer, list) else [answer], where, "answer")),
    }
    if row.get("choices"):
        found["choices"] = _choices(path, number, row)
    # the original code pads missing hits with empty texts
    passages = [require({"passages": text}, "passages", str, where) for text in require(row, "passages", list, where)]
    kept = [index for index, text in enumerate(passages) if text.strip()]
    for name in ("passages", "passage_ids", "titles", "scores"):
        if name not in row:
            continue
        listed = require(row, name, list, where)
        if len(listed) != len(passages):
            raise DataError(
                f"{where}: found {len(listed)} {name} beside {len(passages)} passages; expected as many. Fix the file."
            )
        found[name] = tuple(listed[index] for index in kept)
    return found


def is_augmented(path: Path) -> bool:
    """True if the first record of a file has passages."""
    head = read_head(path, 1 << 16).decode("utf-8", "replace")
    return re.match(r'\ufeff?\s*\[\s*\{\s*"test_id"', head) is not None or '"passages"' in head.partition("}")[0]


def format_question(record: Record, kind: Kind = "open") -> Example | None:
    """Format the question as input and its first answer as target; questions without an answer are dropped."""
    fields = record.fields
    answers = tuple(fields["answers"])
    if not answers:
        return None
    choices = tuple(fields.get("choices", ()))
    listed = "".join(f"\n{LETTERS[index]}) {choice}" for index, choice in enumerate(choices))
    metadata = {name: value for name, value in fields.items() if name not in ("answers", "answer")} | {"kind": kind}
    return Example(record.key, fields["question"] + listed, answers[0], answers, metadata)


def parse_open(text: str, example: Example) -> str:
    """Return the first line of the generated text, without a leading "Answer:"."""
    return re.sub(r"^\s*answer\s*:", "", text, flags=re.IGNORECASE).strip().partition("\n")[0].strip()


def parse_yes_no(text: str, example: Example) -> str:
    """Return the first word yes or no, lower-cased; else the open answer."""
    found = re.search(r"\b(yes|no)\b", text, re.IGNORECASE)
    return found.group(1).lower() if found else parse_open(text, example)


def parse_choice(text: str, example: Example) -> str:
    """Return the first isolated letter from A to E; else the open answer."""
    found = re.search(r"\b([A-E])\b", text)
    return found.group(1) if found else parse_open(text, example)


PARSERS: Mapping[Kind, Callable[[str, Example], str]] = {
    "open": parse_open,
    "yes_no": parse_yes_no,
    "choice": parse_choice,
}


def multihop_task(dataset: str | Dataset) -> Task:
    """Make a task from a registered data set name or a caller's `Dataset`."""
    chosen = DATASETS[dataset] if isinstance(dataset, str) else dataset
    return Task(
        name=f"multihop/{chosen.name}",
        source=MultihopSource(chosen),
        format=partial(format_question, kind=chosen.kind),
        parse=PARSERS[chosen.kind],
        metrics=(ANSWER_EXACT_MATCH, ANSWER_F1, ANSWER_PRECISION, ANSWER_RECALL),
        description=f"{chosen.name}: {chosen.kind.replace('_', '/')} questions, {chosen.domain} domain",
    )


TASKS: Mapping[str, Task] = {task.name: task for task in map(multihop_task, DATASETS)}
