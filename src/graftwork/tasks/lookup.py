"""Lookup of a data set's files in the data folder, or of its rows on the hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graftwork.errors import DataError
from graftwork.tasks.sources import HubSource, Record, Records, Source

HUB = Path("hub")
"""Data folder value that selects the Hugging Face hub instead of files."""


def find_folder(data: Path, folders: Sequence[str], file: str) -> Path:
    """Return the folder that contains `file`: one of `folders` below `data`, or `data` itself.

    Raises:
        DataError: If no folder contains the file; the message lists every path tried.
    """
    places = [*(data / folder for folder in folders), data]
    for place in places:
        if (place / file).exists():
            return place
    raise DataError(
        f"Found no {file} in {data}; expected one of: {', '.join(str(place / file) for place in places)}. "
        "Name the folder of the data set, or another split."
    )


@dataclass(frozen=True, slots=True)
class FilesOrHub:
    """Source that reads raw files, or the same data set from the hub if the data folder is "hub"."""

    files: Source
    hub: HubSource
    fields: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    """Maps a hub row to the record fields of the raw files."""

    def __call__(self, data: Path, split: str) -> Records:
        """Read the split from files or from the hub.

        Raises:
            DataError: If the split cannot be read.
        """
        if data != HUB:
            return self.files(data, split)
        records = self.hub(data, split)
        return replace(records, rows=tuple(Record(row.key, self.fields(row.fields)) for row in records.rows))
