"""Conversion of raw question-answering files to text-to-text JSON lines, and reading of such files as tasks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from graftwork.core.example import Examples
from graftwork.core.files import write_checksum
from graftwork.core.stored_rows import store_rows
from graftwork.errors import ConfigError, DataError
from graftwork.metrics.text import EXACT_MATCH, F1
from graftwork.tasks.own_data.rows import open_rows
from graftwork.tasks.own_data.task import HUB_PREFIX
from graftwork.tasks.prepared_files import read_prepared
from graftwork.tasks.sources import Record, Records, read_json_lines, write_json_lines
from graftwork.tasks.streams import RecordStream, derived_key
from graftwork.tasks.task import Task
from graftwork.tasks.unifiedqa import (
    DATASETS,
    DEFAULT_DATASETS,
    FORMATS,
    TextFormat,
    find_folder,
    find_split,
    format_unifiedqa,
    lacks_separator,
    read_raw,
    unifiedqa_task,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Callback with the data set name, the number of finished rows and the total number of rows."""

_BATCH = 4000
_OTHER_FORMATS = frozenset(("instruction", "output", "label", "messages", "conversations"))
"""Columns that give a field `input` another meaning."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts of one prepared data set."""

    dataset: str
    split: str
    """Split that was read; differs from the requested one after a fallback."""
    kept: int
    ignored: int
    """Number of lines without exactly two columns."""
    without_separator: int
    """Number of kept rows whose input has no context or options."""
    tokens_98: float | None
    """98th percentile of the input length in tokens; None without a tokenizer."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Files written by `prepare`, with their counts."""

    path: Path
    weighted_path: Path | None
    summaries: tuple[Summary, ...]


def prepare(
    names: Sequence[str],
    *,
    input: Path,
    output: Path,
    split: str = "dev",
    format: TextFormat = "unifiedqa",
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    workers: int | None = None,
    lowercase: bool = False,
    weighted_to: int | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Write `combined_<split>_<format>.jsonl`, one object per usable row of the named data sets, and its SHA-256.

    Source: `prepare_data.py` of `ag1988/top_k_attention`; file names and fields are the same.

    Differs from it: quotes are literal, a test split used as a fallback for dev is paired with its own answers, and a
    row without separator is kept; see `graftwork.tasks.unifiedqa.read_raw`.

    Args:
        names: Data sets, with or without the prefix "unifiedqa/"; ("all",) for every folder that has the split; empty
            for the twelve defaults.
        input: Parent folder of the data sets, or the folder of a single named one.
        output: Folder to write to, created if missing.
        split: Split to read; "dev" falls back to test files, and the rows then have the split "test".
        format: Format of the inputs: "unifiedqa" for UnifiedQA checkpoints, "t5" for T5 that is not fine-tuned.
        tokenizer: Tokenizer for the field `num_t5_toks`: a name, a path or a loaded tokenizer. None writes null.
        workers: Number of processes that count tokens; None or 1 counts in the current process.
        lowercase: Lower-case inputs and answers; choose it for UnifiedQA checkpoints, which were trained this way.
        weighted_to: Also write `weighted_<split>_<format>.jsonl`, which repeats every data set as often as fits into
            this many rows, at least once; choose it to balance data sets of different sizes.
        progress: Called after every batch of rows.

    Returns:
        Paths and counts; the counts are logged as well.

    Raises:
        DataError: If a data set or its split is missing, or a file is malformed.
        ConfigError: If the value of a setting is invalid.
    """
    if format not in FORMATS:
        raise ConfigError(f"Found format {format!r}; expected one of: {', '.join(FORMATS)}.")
    for name, value in (("workers", workers), ("weighted_to", weighted_to)):
        if value is not None and value < 1:
            raise ConfigError(f"Found {name} {value}; expected at least 1. Leave it out to switch it off.")
    rows: list[list[dict[str, Any]]] = []
    summaries: list[Summary] = []
    with _token_counter(tokenizer, workers) as count:
        for dataset, folder in _folders(names, input, split):
            records = read_raw(folder, find_split(folder, split) or split, dataset)
            rows.append(_objects(dataset, records, format, lowercase, count, progress))
            summaries.append(_summarise(dataset, records, rows[-1]))
    path = output / f"combined_{split}_{format}.jsonl"
    write_json_lines(path, (row for dataset in rows for row in dataset))
    write_checksum(path)
    weighted = None
    if weighted_to is not None:
        weighted = output / f"weighted_{split}_{format}.jsonl"
        write_json_lines(weighted, _weighted(rows, weighted_to))
        write_checksum(weighted)
    return Prepared(path, weighted, tuple(summaries))


def load_prepared(path: Path) -> list[Examples]:
    """Read a JSON-lines file with a text field `input` on each line as examples, grouped by data set.

    A file without `dataset` fields is one data set with the name of the file. Without `target`, `ans` or `all_answers`
    it can be used for prediction only.

    Raises:
        DataError: If a line is malformed or lacks a field; the message names file and line.
    """
    return [_examples(records) for records in _read_groups(path)]


def is_prepared(name: str) -> bool:
    """True if a file is JSON lines with a text field `input`, as `prepare` writes them.

    Raises:
        DataError: If the file cannot be read, or is in no known format.
    """
    if name.startswith(HUB_PREFIX) or open_rows(Path(name)).kind != "JSON lines":
        return False
    _, first = next(read_json_lines(Path(name)))
    if not isinstance(first, dict) or "input" not in first:
        return False
    columns = set(cast("dict[str, Any]", first))
    return bool(columns & {"target", "ans"}) or not columns & _OTHER_FORMATS


def task_from_file(path: Path) -> list[tuple[Task, Examples]]:
    """Make a task from each data set in a JSON-lines file, scored by exact match and F1.

    Data sets of the UnifiedQA collection keep their official metrics.

    Raises:
        DataError: If a line is malformed or lacks a field (the message names file and line), or if the file mixes
            splits of one data set.
    """
    return [(task, _examples(records, task.name)) for task, records in _file_tasks(path)]


def tasks_of_file(path: Path) -> list[tuple[Task, str]]:
    """Make the tasks of `task_from_file`, and return them with their splits.

    Raises:
        DataError: As `task_from_file`.
    """
    return [(task, records.split) for task, records in _file_tasks(path)]


@dataclass(frozen=True, slots=True)
class PreparedSource:
    """Source of one data set in one JSON-lines file; the data folder is ignored."""

    path: Path
    dataset: str
    split: str

    def __call__(self, data: Path, split: str) -> Records:
        """Read the file again.

        Raises:
            DataError: If the file no longer contains the data set.
        """
        for records in read_prepared(self.path):
            if (records.name, records.split) == (self.dataset, self.split):
                return records
        raise DataError(f"{self.path}: found no row of {self.dataset}, {self.split}; expected some. Was it replaced?")


def _folders(names: Sequence[str], data: Path, split: str) -> list[tuple[str, Path]]:
    """Return (data set, folder) for every name; every folder exists and has the split."""
    if "all" in names:
        found = sorted(folder for folder in data.iterdir() if folder.is_dir()) if data.is_dir() else []
        usable = [(folder.name, folder) for folder in found if find_split(folder, split)]
        for folder in found:
            if not find_split(folder, split):
                logger.info("%s is skipped: it has no %s.tsv.", folder, split)
        if not usable:
            raise DataError(f"Found no folder with {split}.tsv in {data}; expected folders such as squad1_1.")
        return usable
    folders: list[tuple[str, Path]] = []
    missing: list[str] = []
    for name in dict.fromkeys(name.removeprefix("unifiedqa/") for name in names or DEFAULT_DATASETS):
        folder = find_folder(data, name)
        if folder and find_split(folder, split):
            folders.append((name, folder))
        else:
            missing.append(f"{name}/{split}.tsv")
    if missing:
        raise DataError(
            f"Found no {', '.join(missing)} in {data}; expected a folder for each data set. "
            "Download the missing ones, or name only data sets that are present."
        )
    return folders


def _objects(
    dataset: str,
    records: Records,
    format: TextFormat,
    lowercase: bool,
    count: Callable[[list[str]], Sequence[int | None]],
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """Return the rows of one data set in the output format."""
    rows: list[dict[str, Any]] = []
    for start in range(0, len(records.rows), _BATCH):
        batch = [record.lowered() if lowercase else record for record in records.rows[start : start + _BATCH]]
        texts = [FORMATS[format](record).input for record in batch]
        for record, text, tokens in zip(batch, texts, count(texts), strict=True):
            rows.append(_object(dataset, records, record, text, tokens))
        if progress:
            progress(dataset, len(rows), len(records.rows))
    return rows


def _object(dataset: str, records: Records, record: Record, text: str, tokens: int | None) -> dict[str, Any]:
    return {
        "dataset": dataset,
        "split": records.split,
        "id": record.fields["id"],
        "input": text,
        "ans": record.fields["ans"],
        "all_answers": list(record.fields["all_answers"]),
        "num_t5_toks": tokens,
        "split_size": records.size,
    }


def _summarise(dataset: str, records: Records, rows: Sequence[Mapping[str, Any]]) -> Summary:
    lengths = [row["num_t5_toks"] for row in rows if row["num_t5_toks"] is not None]
    unseparated = sum(map(lacks_separator, records.rows))
    summary = Summary(dataset, records.split, len(rows), records.ignored, unseparated, _percentile(lengths))
    logger.info(
        "%s: split %s, kept %d, ignored %d, without separator %d, 98th percentile %s tokens",
        dataset,
        summary.split,
        summary.kept,
        summary.ignored,
        summary.without_separator,
        "not counted" if summary.tokens_98 is None else f"{summary.tokens_98:.0f}",
    )
    return summary


def _percentile(lengths: Sequence[int]) -> float | None:
    import numpy as np

    return float(np.percentile(lengths, 98)) if lengths else None


def _weighted(rows: Sequence[Sequence[dict[str, Any]]], target: int) -> Iterator[dict[str, Any]]:
    for dataset in rows:
        for _ in range(max(1, target // len(dataset)) if dataset else 0):
            yield from dataset


@contextmanager
def _token_counter(
    tokenizer: str | PreTrainedTokenizerBase | None, workers: int | None
) -> Generator[Callable[[list[str]], Sequence[int | None]]]:
    if tokenizer is None:
        yield lambda texts: [None] * len(texts)
    elif workers is None or workers == 1:
        yield partial(_count_tokens, tokenizer)
    else:
        # spawn: forking a process whose tokenizer has started threads can deadlock
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:

            def count(texts: list[str]) -> list[int | None]:
                share = -(-len(texts) // workers)
                parts = [texts[start : start + share] for start in range(0, len(texts), share)]
                return [length for part in pool.map(partial(_count_tokens, tokenizer), parts) for length in part]

            yield count


def _count_tokens(tokenizer: str | PreTrainedTokenizerBase, texts: list[str]) -> list[int]:
    loaded = _load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    return [len(tokens) for tokens in loaded(texts, add_special_tokens=False, verbose=False)["input_ids"]]


@lru_cache(maxsize=1)
def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        # AutoTokenizer has no return annotation
        return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(name, trust_remote_code=False))  # pyright: ignore[reportUnknownMemberType]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Found no tokenizer {name!r} ({str(error).splitlines()[0]}); expected a hub id or a folder. "
            "Check the name, or omit the tokenizer to write no lengths."
        ) from error


def _read_groups(path: Path) -> list[Records]:
    groups = read_prepared(path)
    if not groups:
        raise DataError(f"{path}: found no line; expected at least one object with a text field 'input'.")
    return groups


def _examples(records: Records, task: str | None = None) -> Examples:
    rows = records.rows
    key = derived_key(rows.key, format_unifiedqa) if isinstance(rows, RecordStream) else None
    examples = store_rows(lambda: map(format_unifiedqa, rows), key)
    return Examples(task or records.name, records.split, examples, records.size, records.ignored, str(records.path))


def _file_tasks(path: Path) -> list[tuple[Task, Records]]:
    groups = _read_groups(path)
    tasks = [_file_task(path, records) for records in groups]
    names = [task.name for task in tasks]
    for name, records in zip(names, groups, strict=True):
        if names.count(name) > 1:
            raise DataError(f"{path}: found several splits of {records.name}; expected one. Write a file for each.")
    return list(zip(tasks, groups, strict=True))


def _file_task(path: Path, records: Records) -> Task:
    source = PreparedSource(path, records.name, records.split)
    if records.name in DATASETS:
        task = unifiedqa_task(records.name, format="t5" if path.stem.endswith("_t5") else "unifiedqa")
        return replace(task, source=source)
    return Task(
        name="_".join(records.name.split()) or "file",
        source=source,
        format=format_unifiedqa,
        metrics=(EXACT_MATCH, F1),
        official_metrics=(F1,),
        description=f"{records.name} in {path.name}",
    )
