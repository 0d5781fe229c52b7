"""UnifiedQA data sets, from their tab-separated files or from prepared JSON lines."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graftwork.core.example import Example
from graftwork.errors import ConfigError, DataError
from graftwork.metrics.metric import Metric
from graftwork.metrics.text import (
    DROP_F1,
    EXACT_MATCH,
    F1,
    ROUGE_L,
    SQUAD2_EXACT_MATCH,
    SQUAD2_F1,
    multiple_choice,
)
from graftwork.tasks.prepared_files import read_prepared
from graftwork.tasks.sources import (
    Record,
    Records,
    is_answer_list,
    read_json_lines,
    read_lines,
    read_tsv,
)
from graftwork.tasks.task import Task

logger = logging.getLogger(__name__)

SEPARATOR = "\\n"
"""Separator between the parts of a UnifiedQA input: a literal backslash followed by n."""

SPECIAL_WORDS = "<yes> <no> <No Answer>"
"""Answer candidates that the T5 format adds to the context, so that T5 can copy them as spans."""

TextFormat = Literal["unifiedqa", "t5"]
"""Input format: `unifiedqa` is the unchanged input; `t5` is the SQuAD prompt of T5's own pretraining mixture."""

_TEXT_FIELDS = frozenset({"input", "ans", "target", "all_answers", "formatted", "split_size"})

DEFAULT_DATASETS = (
    "commonsenseqa",
    "squad1_1",
    "squad2",
    "boolq",
    "narrativeqa",
    "mctest_corrected_the_separator",
    "race_string",
    "openbookqa",
    "arc_easy",
    "arc_hard",
    "ai2_science_middle",
    "ai2_science_elementary",
)
"""Data sets that `prepare` uses by default."""

DATASETS = (*DEFAULT_DATASETS, "ropes")
"""Data sets that are registered as tasks; `unifiedqa_task` supports every other folder of the collection."""

_MULTIPLE_CHOICE = (
    "commonsenseqa",
    "mctest_corrected_the_separator",
    "race_string",
    "openbookqa",
    "arc_easy",
    "arc_hard",
    "ai2_science_middle",
    "ai2_science_elementary",
    "qasc",
)


def read_options(example: Example) -> tuple[str, ...]:
    """Return the lower-cased answer options of a multiple-choice input in either format.

    Source: `allenai/unifiedqa`, `evaluate_multiple_choice_answers.py`.

    Differs from it: an empty option keeps its letter, and text before the first option is not an option.
    """
    text = example.input.lower()
    special, separator = SPECIAL_WORDS.lower(), SEPARATOR
    after = text.partition(special)[2] if special in text else text.partition(separator)[2]
    last = "h" if example.metadata.get("dataset") == "qasc" else "e"
    return tuple(option.strip() for option in re.split(rf"\([a-{last}]\)", after.partition(separator)[0])[1:])


MULTIPLE_CHOICE_ACCURACY = Metric(
    "multiple_choice_accuracy", multiple_choice(read_options), description="share of rows whose nearest option is right"
)

_OFFICIAL: Mapping[str, tuple[Metric, ...]] = {
    "squad2": (SQUAD2_EXACT_MATCH, SQUAD2_F1),
    "squad1_1": (EXACT_MATCH, F1),
    "boolq": (EXACT_MATCH,),
    "narrativeqa": (ROUGE_L,),
    **dict.fromkeys(("ropes", "quoref", "drop"), (DROP_F1,)),
    **dict.fromkeys(_MULTIPLE_CHOICE, (MULTIPLE_CHOICE_ACCURACY,)),
}


def format_unifiedqa(record: Record) -> Example:
    """Format a record with its input unchanged; use it for UnifiedQA checkpoints, which were trained this way."""
    return _example(record, record.fields["input"])


def format_t5(record: Record) -> Example:
    r"""Format a record as a SQuAD prompt with `SPECIAL_WORDS`, which T5 copies if the answer is not a span.

    Source: the conversion with special words in `ag1988/top_k_attention`. Spaces around the separator are kept, so
    double spaces occur; T5's tokenizer merges them.

    Differs from it: an input without separator has an empty context; the original raises an error.

    Example:
        >>> format_t5(Record("0", {"input": r"Q \n (A) x (B) y", "ans": "x"})).input
        'question: Q  context: <yes> <no> <No Answer>  (A) x (B) y'
    """
    text = record.fields["input"]
    if record.fields.get("formatted"):
        # lower-casing a formatted input has lower-cased the special words too
        return _example(record, text.replace(SPECIAL_WORDS.lower(), SPECIAL_WORDS, 1))
    question, separator, rest = text.partition(SEPARATOR)
    return _example(record, f"question: {question} context: {SPECIAL_WORDS}" + (f" {rest}" if separator else ""))


FORMATS: Mapping[TextFormat, Callable[[Record], Example]] = {"unifiedqa": format_unifiedqa, "t5": format_t5}


@dataclass(frozen=True, slots=True)
class UnifiedQASource:
    """Source of one data set: its raw files if present, else a prepared file that contains it."""

    dataset: str
    format: TextFormat

    def __call__(self, data: Path, split: str) -> Records:
        """Read the split.

        Raises:
            DataError: If neither raw nor prepared data exists; the message lists every path tried.
        """
        folder = find_folder(data, self.dataset)
        raw = find_split(folder, split) if folder else None
        if folder and raw:
            records = read_raw(folder, raw, self.dataset)
            unseparated = sum(lacks_separator(record) for record in records.rows)
            logger.info(
                "%s: kept %d rows, ignored %d, without separator %d",
                records.path,
                len(records.rows),
                records.ignored,
                unseparated,
            )
            return records
        name = f"combined_{split}_{self.format}.jsonl"
        for path in (data / name, data / self.dataset / name):
            if path.is_file():
                return self._from_prepared(path)
        looked = [data / self.dataset / f"{split}.tsv", data / name, data / self.dataset / name]
        found = ", ".join(sorted(file.name for file in folder.glob("*.tsv"))) if folder else "no such folder"
        raise DataError(
            f"Found no {split} data of {self.dataset} in {data} ({found}); expected one of: "
            f"{', '.join(map(str, looked))}. Name the folder of {self.dataset}, or another split."
        )

    def _from_prepared(self, path: Path) -> Records:
        for records in read_prepared(path):
            if records.name == self.dataset:
                return records
        raise DataError(
            f"{path}: found no row of {self.dataset}; expected some. Prepare {self.dataset} into this file."
        )


def unifiedqa_task(dataset: str, *, format: TextFormat = "unifiedqa", lowercase: bool = False) -> Task:
    """Make a task from any folder of the UnifiedQA collection.

    Args:
        dataset: Name of the folder.
        format: "unifiedqa" for UnifiedQA checkpoints, "t5" for T5 without fine-tuning.
        lowercase: Lower-case inputs and answers; choose it for UnifiedQA checkpoints.

    Raises:
        ConfigError: If the format is unknown.
    """
    if format not in FORMATS:
        raise ConfigError(f"Found format {format!r}; expected one of: {', '.join(FORMATS)}.")
    return Task(
        name=f"unifiedqa/{dataset}" + ("_t5" if format == "t5" else ""),
        source=UnifiedQASource(dataset, format),
        format=FORMATS[format],
        metrics=(EXACT_MATCH, F1),
        official_metrics=_OFFICIAL.get(dataset, (F1,)),
        lowercase=lowercase,
        description=f"{dataset} in {'T5' if format == 't5' else 'UnifiedQA'} format",
    )


def find_folder(data: Path, dataset: str) -> Path | None:
    """Return the folder of a data set: inside `data`, or `data` itself if it has that name; None if there is none."""
    if (data / dataset).is_dir():
        return data / dataset
    return data if data.resolve().name == dataset and data.is_dir() else None


def find_split(folder: Path, split: str) -> str | None:
    """Return the split to read: `split` itself, "test" as the fallback for a missing "dev", or None."""
    for candidate in (split, "test") if split == "dev" else (split,):
        if (folder / f"{candidate}.tsv").is_file():
            return candidate
    return None


def read_raw(folder: Path, split: str, dataset: str) -> Records:
    """Read `<split>.tsv` with its files of answers and option letters.

    Differs from the reference, which interprets quotes and pairs a test split with the answers of dev: here each
    physical line is one row, and the answers belong to the split that was read.

    Returns:
        Records with the fields `id` (line number from 0), `input`, `ans`, `all_answers`, and `answer_key` if a
        meta file gives the letter of the correct option.

    Raises:
        DataError: If the file of answers has a different number of lines.
    """
    table = read_tsv(folder / f"{split}.tsv", ("input", "ans"))
    answers = _answers(folder / f"{split}_ans.jsonl", table.path, table.lines)
    letters = _letters(folder, split, table.lines)
    rows: list[Record] = []
    for index, cells in table.rows:
        fields: dict[str, Any] = {
            "dataset": dataset,
            "id": index,
            **cells,
            "all_answers": answers[index] if answers else (cells["ans"],),
        }
        if letters and letters[index]:
            fields["answer_key"] = letters[index]
        rows.append(Record(str(index), fields))
    return Records(dataset, split, tuple(rows), table.lines, table.ignored, table.path)


def lacks_separator(record: Record) -> bool:
    """True if the input has no separator, so the T5 format gives it an empty context."""
    return SEPARATOR not in record.fields["input"]


def _example(record: Record, text: str) -> Example:
    fields = record.fields
    metadata = {name: value for name, value in fields.items() if name not in _TEXT_FIELDS}
    # strip the padding spaces of some data sets: metrics ignore them, and a model should not learn them
    return Example(record.key, text, fields["ans"].strip(), tuple(fields["all_answers"]), metadata)


def _answers(path: Path, rows: Path, lines: int) -> list[tuple[str, ...]] | None:
    if not path.is_file():
        return None
    answers: list[tuple[str, ...]] = []
    for number, value in read_json_lines(path, skip_blank=False):
        if not is_answer_list(value):
            raise DataError(f"{path}, line {number}: found {value!r}; expected a list of at least one text.")
        answers.append(tuple(value))
    if len(answers) != lines:
        raise DataError(
            f"{path}: found {len(answers)} lines of answers for {lines} lines of {rows.name}; expected as many. "
            "Download both files again, or remove the answers to score against the second column."
        )
    return answers


def _letters(folder: Path, split: str, lines: int) -> list[str] | None:
    """Return the letter or digit of the correct option per line; None without a usable meta file."""
    for path in (folder / f"{split}_meta.tsv", folder / f"{split}_meta.txt"):
        if not path.is_file():
            continue
        cells = [line.split("\t") for line in read_lines(path)]
        if len(cells) == lines:
            return [row[1].strip() if len(row) > 1 and re.fullmatch(r"\s*\w\s*", row[1]) else "" for row in cells]
        # not an error: the metric also finds the option by comparing the answer with the options
        logger.warning("%s is not used: it has %d lines for %d rows.", path, len(cells), lines)
    return None


TASKS: Mapping[str, Task] = {
    task.name: task for name in DATASETS for task in (unifiedqa_task(name), unifiedqa_task(name, format="t5"))
}
