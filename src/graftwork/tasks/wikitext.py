"""Running text for language modelling: WikiText by name, and any plain text file."""

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
"""File suffixes that are read as running text."""

_FILES = {"train": "train", "dev": "valid", "valid": "valid", "validation": "valid", "test": "test"}
_PART = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<start>\d{0,15}%?):(?P<stop>\d{0,15}%?)\])?")


@dataclass(frozen=True, slots=True)
class TextSource:
    """Reader of `<folder>/wiki.<split>.<suffix>`, or of one file for every split.

    A split can be sliced by its non-blank lines: `test[:60%]`, `train[1000:2000]`.
    """

    folder: str
    file: Path | None = None
    """File to read; None searches the folder for the WikiText file names."""

    def __call__(self, data: Path, split: str) -> Records:
        """Read the non-blank lines of a split.

        Raises:
            DataError: If the file is missing or empty, or the slice is malformed or empty.
        """
        match = _PART.fullmatch(split or "all")
        if match is None:
            raise DataError(f"Found the split {split!r}. Expected a name, or a slice of it such as test[:60%].")
        path = self.file or self._find(data, match["name"])
        lines = [line.strip() for line in read_lines(path) if line.strip()]
        if not lines:
            raise DataError(f"{path} contains no text. Expected lines of plain text.")
        chosen = range(_bound(match["start"], len(lines), 0), _bound(match["stop"], len(lines), len(lines)))
        rows = tuple(Record(str(index), {"text": lines[index]}) for index in chosen if index < len(lines))
        if not rows:
            raise DataError(f"{path} has {len(lines)} lines, none of them in {split}. Widen the slice.")
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
            f"Found no wiki.{name}.raw or .tokens in {data / self.folder} or {data} (found: {', '.join(there)}). "
            "Name the folder of the file with --data, or another split; test[:60%] reads a slice of one."
        )


def _bound(text: str | None, count: int, otherwise: int) -> int:
    if not text or text == "%":
        return otherwise
    return int(text[:-1]) * count // 100 if text.endswith("%") else int(text)


def text_example(record: Record) -> Example:
    """Format one line of running text, without a target."""
    return Example(record.key, record.fields["text"], "")


def text_task(name: str, source: TextSource, description: str) -> Task:
    """Make a language-modelling task: models are trained and scored on the tokens of the text."""
    return Task(name=name, source=source, format=text_example, running_text=True, description=description)


def task_from_text(path: Path) -> Task:
    """Make a language-modelling task from a plain text file."""
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
