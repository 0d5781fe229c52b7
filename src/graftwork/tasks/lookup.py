"""Finding a data set's files in the folder that the user named, or its rows on the hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graftwork.errors import DataError
from graftwork.tasks.sources import HubSource, Record, Records, Source

HUB = Path("hub")
"""The word that stands for the Hugging Face hub where a data folder is expected."""


def find_folder(data: Path, folders: Sequence[str], file: str) -> Path:
    """The folder that holds `file`: one of those named, below `data`, or `data` itself.

    Raises:
        DataError: If the file is in none of them; the message names every place looked at.
    """
    places = [*(data / folder for folder in folders), data]
    for place in places:
        if (place / file).exists():
            return place
    raise DataError(
        f"Found no {file} in {data}; expected one of: {', '.join(str(place / file) for place in places)}. "
        "Name the folder that holds the data set, or another split."
    )


@dataclass(frozen=True, slots=True)
class FilesOrHub:
    """Reads raw files, or the same data set from the hub where the data folder is called "hub"."""

    files: Source
    hub: HubSource
    fields: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    """Maps a row of the hub to the fields that the raw files give."""

    def __call__(self, data: Path, split: str) -> Records:
        """Read the split from where the user wants it.

        Raises:
            DataError: If it cannot be had.
        """
        if data != HUB:
            return self.files(data, split)
        records = self.hub(data, split)
        return replace(records, rows=tuple(Record(row.key, self.fields(row.fields)) for row in records.rows))
