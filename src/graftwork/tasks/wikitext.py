"""Running text for language models: WikiText by name, and any plain text file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from graftwork.core.example import Example
from graftwork.errors import DataError
from graftwork.tasks.sources import Record, Records, read_lines
from graftwork.tasks.task import Task

TEXT_SUFFIXES = (".txt", ".raw", ".tokens")
"""Endings of files that are read as running text."""

_FILES = {"train": "train", "dev": "valid", "valid": "valid", "validation": "valid", "test": "test"}
_PART = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<start>\d*%?):(?P<stop>\d*%?)\])?")


@dataclass(frozen=True, slots=True)
class TextSource:
    """Reads `<folder>/wiki.<split>.<ending>`, or one file whatever the split is called.

    A split may name a part of its file, in lines that are not blank: `test[:60%]`, `train[1000:2000]`.
    """

    folder: str
    file: Path | None = None
    """The one file to read; None looks for WikiText's names in the folder."""

    def __call__(self, data: Path, split: str) -> Records:
        """Read the lines of a split that are not blank.

        Raises:
            DataError: If there is no such file or it holds no text, or the part is not written as expected.
        """
        match = _PART.fullmatch(split or "all")
        if match is None:
            raise DataError(f"Found the split {split!r}. Expected a name, or a part of it such as test[:60%].")
        path = self.file or self._find(data, match["name"])
        lines = [line.strip() for line in read_lines(path) if line.strip()]
        if not lines:
            raise DataError(f"{path} holds no text. Expected lines of plain text.")
        chosen = range(_bound(match["start"], len(lines), 0), _bound(match["stop"], len(lines), len(lines)))
        rows = tuple(Record(str(index), {"text": lines[index]}) for index in chosen if index < len(lines))
        if not rows:
            raise DataError(f"{path} has {len(lines)} lines, none of them in {split}. Widen the part.")
        return Records(self.folder, split, rows, len(rows), 0, path)

    def _find(self, data: Path, split: str) -> Path:
        name = _FILES.get(split, split)
        folders = (data / self.folder, data)
        for folder in folders:
            found = [folder / f"wiki.{name}.{ending}" for ending in ("raw", "tokens")]
            for path in found:
                if path.is_file():
                    return path
        there = sorted({path.name for folder in folders if folder.is_dir() for path in folder.glob("wiki.*")})
        raise DataError(
            f"Found no wiki.{name}.raw or .tokens in {data / self.folder} or {data} (there: {', '.join(there)}). "
            "Name the folder that holds it with --data, or another split; test[:60%] takes a part of one."
        )


def _bound(text: str | None, count: int, otherwise: int) -> int:
    if not text:
        return otherwise
    return int(text[:-1]) * count // 100 if text.endswith("%") else int(text)


def text_example(record: Record) -> Example:
    """One line of running text; there is nothing to answer."""
    return Example(record.key, record.fields["text"], "")


def text_task(name: str, source: TextSource, description: str) -> Task:
    """A task of running text: models are trained and scored on its tokens."""
    return Task(name=name, source=source, format=text_example, running_text=True, description=description)


def task_from_text(path: Path) -> Task:
    """The task that a plain text file stands for."""
    if not path.is_file():
        raise DataError(f"{path}: no such file. Give a text file, or the name of a task (graftwork list tasks).")
    return text_task(str(path), TextSource(path.stem, path), f"running text of {path.name}")


TASKS: Mapping[str, Task] = {
    f"wikitext/{name}": text_task(f"wikitext/{name}", TextSource(folder), f"running text of {folder}")
    for name, folder in (
        ("2", "wikitext-2"),
        ("2_raw", "wikitext-2-raw"),
        ("103", "wikitext-103"),
        ("103_raw", "wikitext-103-raw"),
    )
}
