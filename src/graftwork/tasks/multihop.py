"""Questions whose answers lie in passages: four open sets, nine of special domains, and files of one's own."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from graftwork.core.example import Example
from graftwork.errors import DataError
from graftwork.metrics.answers import ANSWER_EXACT_MATCH, ANSWER_F1, ANSWER_PRECISION, ANSWER_RECALL
from graftwork.tasks.sources import Record, Records, read_json_lines, read_lines
from graftwork.tasks.task import Task

Kind = Literal["open", "yes_no", "choice"]
"""`open` is answered in a few words, `yes_no` by one of these two, `choice` by a letter from A to E."""

LETTERS = "ABCDE"
FINAL_DECISION = "The final decision is:"
"""What stands before the verdict in PubMedQA's long answers."""

Row = Mapping[str, Any]
Reader = Callable[["Dataset", Path, str], Iterator[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Dataset:
    """One set of questions: where its files lie, how they are read, and what it belongs to."""

    name: str
    read: Reader
    """Yields `question`, `answers` and possibly `question_id`, `choices` of each row of a file."""
    files: Mapping[str, str] = field(default_factory=dict)
    """File of each split; "*" for any other split, in which {split} is filled in."""
    kind: Kind = "open"
    domain: str = "general"
    index: str = "wiki"
    """Index that its passages are found in."""
    group: str = ""
    """Its name in files of predictions."""
    demonyms: bool = False
    """2WikiMultihopQA: count the names of a country's people as answers too."""
    possible_answers: bool = False
    """PopQA: count what stands in that column as answers too."""
    keep_maybe: bool = True
    """PubMedQA: keep questions whose verdict is neither yes nor no."""

    def file(self, split: str) -> str:
        """Name of the raw file of a split."""
        return (self.files.get(split) or self.files["*"]).format(split=split)


def answers_of(*candidates: Any) -> tuple[str, ...]:
    """Texts among the candidates, in their order, each once; the first is what a model learns."""
    return tuple(dict.fromkeys(text for text in candidates if isinstance(text, str) and text.strip()))


def _json_array(path: Path) -> list[Any]:
    try:
        rows = json.loads("\n".join(read_lines(path)))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}: not readable as JSON ({error.msg}). Download it again."
        ) from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: found a {type(rows).__name__}; expected a list of questions.")
    return rows


def _required(path: Path, number: int, row: Any, name: str) -> Any:
    if not isinstance(row, dict) or row.get(name) is None:
        found = ", ".join(map(repr, row)) if isinstance(row, dict) else f"a {type(row).__name__}"
        raise DataError(
            f"{path}, record {number}: found {found or 'nothing'}; expected a field {name!r}. Mend the file."
        )
    return row[name]


def _read_2wiki(dataset: Dataset, path: Path, split: str) -> Iterator[dict[str, Any]]:
    aliases: dict[str, list[Any]] = {}
    beside = path.with_name("id_aliases.json")
    if beside.exists():
        for _, row in read_json_lines(beside):
            names = [*row.get("aliases", ()), *(row.get("demonyms", ()) if dataset.demonyms else ())]
            aliases[str(row.get("Q_id"))] = names
    for number, row in enumerate(_json_array(path)):
        answer = _required(path, number, row, "answer")
        known = aliases.get(str(row.get("answer_id")), ())
        yield {
            "question": _required(path, number, row, "question"),
            "answers": answers_of(answer, *known),
            "question_id": row.get("_id"),
        }


def _read_hotpot(dataset: Dataset, path: Path, split: str) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(_json_array(path)):
        answers = answers_of(_required(path, number, row, "answer"))
        yield {"question": _required(path, number, row, "question"), "answers": answers, "question_id": row.get("_id")}


def _read_popqa(dataset: Dataset, path: Path, split: str) -> Iterator[dict[str, Any]]:
    reader = csv.DictReader((line + "\n" for line in read_lines(path)), delimiter="\t", strict=True)
    try:
        for number, row in enumerate(reader):
            listed = [_required(path, number, row, "obj"), *_json_cell(path, number, row, "o_aliases")]
            if dataset.possible_answers:
                listed += _json_cell(path, number, row, "possible_answers")
            yield {
                "question": _required(path, number, row, "question"),
                "answers": answers_of(*listed),
                "question_id": row.get("id"),
            }
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: found broken quoting ({error}). Mend the line.") from error


def _json_cell(path: Path, number: int, row: Row, name: str) -> list[Any]:
    text = row.get(name) or "[]"
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, list):
        raise DataError(
            f"{path}, record {number}: found {text[:60]!r} as {name!r}; expected a JSON list. Mend the cell."
        )
    return value


def _read_complex_web(dataset: Dataset, path: Path, split: str) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(_json_array(path)):
        entries = _required(path, number, row, "answers")
        # the order of the file, not of a set: the first answer is what a model learns
        listed = [text for entry in entries for text in (entry.get("answer"), *(entry.get("aliases") or ()))]
        yield {
            "question": _required(path, number, row, "question"),
            "answers": answers_of(*listed),
            "question_id": row.get("ID"),
        }


def _read_lines_of(change: Callable[[Dataset, str, str], str | None]) -> Reader:
    def read(dataset: Dataset, path: Path, split: str) -> Iterator[dict[str, Any]]:
        for number, row in read_json_lines(path):
            answer = change(dataset, str(_required(path, number, row, "answer")), split)
            found = {
                "question": _required(path, number, row, "question"),
                "question_id": row.get("id"),
                "answers": answers_of(answer),
            }
            if dataset.kind == "choice":
                found["choices"] = _choices(path, number, row)
            yield found

    return read


def _choices(path: Path, number: int, row: Row) -> tuple[str, ...]:
    choices = _required(path, number, row, "choices")
    if not isinstance(choices, list) or len(choices) != len(LETTERS):
        raise DataError(f"{path}, record {number}: found {str(choices)[:60]!r}; expected a list of five 'choices'.")
    return tuple(map(str, choices))


def _verdict(dataset: Dataset, answer: str, split: str) -> str | None:
    if split == "train":
        return answer
    decision = answer.partition(FINAL_DECISION)[2] or answer
    word = re.search(r"\b(yes|no|maybe)\b", decision, re.IGNORECASE)
    found = word.group(1).lower() if word else decision.strip()
    return found if found in ("yes", "no") or dataset.keep_maybe else None


def _read_generic(dataset: Dataset, path: Path, split: str) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(_json_array(path)):
        answer = _required(path, number, row, "answer")
        listed = answer if isinstance(answer, list) else [answer]
        found = {
            "question": _required(path, number, row, "question"),
            "answers": answers_of(*listed),
            "question_id": row.get("question_id", row.get("id")),
        }
        if row.get("choices"):
            found["choices"] = _choices(path, number, row)
        yield found


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
"""What is trained and validated together in each domain."""


@dataclass(frozen=True, slots=True)
class MultihopSource:
    """Finds the questions of one set: its augmented file `<split>.json`, or the raw file of its publisher.

    The key of a record is its place in the raw file, before anything is cut or left out.
    """

    dataset: Dataset

    def __call__(self, data: Path, split: str) -> Records:
        """Read the split.

        Raises:
            DataError: If the file is not there, or a record lacks a field; names file, record and field.
        """
        folder = data / self.dataset.name if (data / self.dataset.name).is_dir() else data
        prepared, raw = folder / f"{split}.json", folder / self.dataset.file(split)
        if prepared.exists() and is_augmented(prepared):
            return self.augmented(prepared, split)
        if not raw.exists():
            raise DataError(
                f"Found no {raw.name} of {self.dataset.name} in {folder}; expected the publisher's file, or an "
                f"augmented {prepared.name}. Name the folder that holds it, or another split."
            )
        rows = [
            Record(str(number), {"test_id": number, **row})
            for number, row in enumerate(self.dataset.read(self.dataset, raw, split))
        ]
        return Records(self.dataset.name, split, tuple(rows), len(rows), 0, raw)

    def augmented(self, path: Path, split: str) -> Records:
        """Read a file of questions with their passages, ours or the original's."""
        rows = []
        for number, row in enumerate(_json_array(path)):
            name = str(_required(path, number, row, "test_id"))
            found = next(iter(_read_generic_row(self.dataset, path, number, row)))
            rows.append(Record(name, {**row, **found}))
        return Records(self.dataset.name, split, tuple(rows), len(rows), 0, path)


def _read_generic_row(dataset: Dataset, path: Path, number: int, row: Any) -> Iterator[dict[str, Any]]:
    answer = _required(path, number, row, "answer")
    _required(path, number, row, "passages")
    found: dict[str, Any] = {
        "question": _required(path, number, row, "question"),
        "answers": answers_of(*(answer if isinstance(answer, list) else [answer])),
    }
    if row.get("choices"):
        found["choices"] = _choices(path, number, row)
    # the original fills missing hits up with empty texts, which are no passages
    kept = [index for index, text in enumerate(row["passages"]) if text.strip()]
    for name in ("passages", "passage_ids", "titles", "scores"):
        if name in row:
            found[name] = tuple(row[name][index] for index in kept)
    yield found


def is_augmented(path: Path) -> bool:
    """Whether a file holds questions with passages, by its first record."""
    with path.open("rb") as file:
        head = file.read(1 << 16).decode("utf-8", "replace")
    return re.match(r'\ufeff?\s*\[\s*\{\s*"test_id"', head) is not None or '"passages"' in head.partition("}")[0]


def format_question(record: Record, kind: Kind = "open") -> Example | None:
    """The question as input, its first answer as target; a question without any answer is left out."""
    fields = record.fields
    answers = tuple(fields["answers"])
    if not answers:
        return None
    choices = tuple(fields.get("choices", ()))
    listed = "".join(f"\n{LETTERS[index]}) {choice}" for index, choice in enumerate(choices))
    metadata = {name: value for name, value in fields.items() if name not in ("answers", "answer")} | {"kind": kind}
    return Example(record.key, fields["question"] + listed, answers[0], answers, metadata)


def parse_open(text: str, example: Example) -> str:
    """The generated answer up to its line's end, behind its label if it wrote one."""
    return re.sub(r"^\s*answer\s*:", "", text, flags=re.IGNORECASE).strip().partition("\n")[0].strip()


def parse_yes_no(text: str, example: Example) -> str:
    """The first yes or no that stands by itself; else the open answer."""
    found = re.search(r"\b(yes|no)\b", text, re.IGNORECASE)
    return found.group(1).lower() if found else parse_open(text, example)


def parse_choice(text: str, example: Example) -> str:
    """The first letter from A to E that stands by itself; else the open answer."""
    found = re.search(r"\b([A-E])\b", text)
    return found.group(1) if found else parse_open(text, example)


PARSERS: Mapping[Kind, Callable[[str, Example], str]] = {
    "open": parse_open,
    "yes_no": parse_yes_no,
    "choice": parse_choice,
}


def multihop_task(dataset: str | Dataset) -> Task:
    """Make a task of a registered set, or of one declared by the caller."""
    chosen = DATASETS[dataset] if isinstance(dataset, str) else dataset
    return Task(
        name=f"multihop/{chosen.name}",
        source=MultihopSource(chosen),
        format=partial(format_question, kind=chosen.kind),
        parse=PARSERS[chosen.kind],
        metrics=(ANSWER_EXACT_MATCH, ANSWER_F1, ANSWER_PRECISION, ANSWER_RECALL),
        description=f"{chosen.name}: {chosen.kind.replace('_', '/')} questions, {chosen.domain} domain",
    )


def generic_dataset(path: Path, *, kind: Kind = "open", index: str = "wiki") -> Dataset:
    """A JSON list of `question` and `answer` as a set of its own, called like the file."""
    return Dataset(path.stem, _read_generic, {"*": path.name}, kind, "own", index, path.stem)


TASKS: Mapping[str, Task] = {task.name: task for task in map(multihop_task, DATASETS)}
