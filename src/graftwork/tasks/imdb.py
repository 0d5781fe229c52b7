"""IMDb review classification, from folders of text files in the layout of the IMDb archive, or from the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from graftwork.errors import DataError
from graftwork.metrics.labels import ACCURACY
from graftwork.tasks.glue import ClassFormat
from graftwork.tasks.sources import HubSource, Record, Records, read_lines
from graftwork.tasks.task import Task

LABELS = ("negative", "positive")
FOLDERS = {"neg": "negative", "pos": "positive"}
"""Class by folder name."""


@dataclass(frozen=True, slots=True)
class ReviewFolders:
    """Reader of `<split>/neg/*.txt` and `<split>/pos/*.txt`; a collection without split folders is one split."""

    name: str = "imdb"

    def __call__(self, data: Path, split: str) -> Records:
        """Read the reviews of a split, negative ones first, sorted by file name; "dev" falls back to "test".

        Raises:
            DataError: If no folder contains both classes, or a file is not UTF-8.
        """
        found = self._find(data, split)
        if found is None:
            raise DataError(
                f"Found no {split} reviews in {data}; expected folders {split}/neg and {split}/pos of text files. Name "
                "the folder of IMDb's archive, or another split."
            )
        folder, actual_split = found
        rows = tuple(
            Record(f"{name}/{file.stem}", {"text": _read(file), "label": label})
            for name, label in FOLDERS.items()
            for file in sorted((folder / name).glob("*.txt"))
        )
        return Records(self.name, actual_split, rows, len(rows), 0, folder)

    def _find(self, data: Path, split: str) -> tuple[Path, str] | None:
        for base in (data / "aclImdb", data / self.name, data):
            for name in (split, "test") if split == "dev" else (split,):
                if _has_classes(base / name):
                    return base / name, name
        return next(((base, "all") for base in (data / self.name, data) if _has_classes(base)), None)


def _has_classes(folder: Path) -> bool:
    return all((folder / name).is_dir() for name in FOLDERS)


def _read(path: Path) -> str:
    return "\n".join(read_lines(path)).strip()


def imdb_task(*, hub: bool = False) -> Task:
    """Make the sentiment classification task of IMDb.

    Args:
        hub: Read the copy on the hub instead of folders of files.
    """
    return Task(
        name="reviews/imdb_hub" if hub else "reviews/imdb",
        source=HubSource("stanfordnlp/imdb", None, {"dev": "test"}) if hub else ReviewFolders(),
        format=ClassFormat(("text",), LABELS),
        labels=LABELS,
        metrics=(ACCURACY,),
        description=f"IMDb reviews, {'from the hub' if hub else 'from folders of text files'}; dev is the test split",
    )


TASKS: Mapping[str, Task] = {task.name: task for task in (imdb_task(), imdb_task(hub=True))}
