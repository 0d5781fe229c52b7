"""MultiNLI as labelled sentence pairs, from the GLUE files or from the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.errors import DataError
from graftwork.tasks.esnli import LABELS
from graftwork.tasks.lookup import FilesOrHub, find_folder
from graftwork.tasks.sources import HubSource, Record, Records, read_tsv

MNLI_FILES: Mapping[str, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("dev_matched", "dev_mismatched"),
    "validation_matched": ("dev_matched",),
    "validation_mismatched": ("dev_mismatched",),
    "test_matched": ("test_matched",),
    "test_mismatched": ("test_mismatched",),
}


@dataclass(frozen=True, slots=True)
class MnliFiles:
    """Reader of MultiNLI in the GLUE layout; "validation" and "test" refer to `part`, or to both parts."""

    part: str | None = None
    """"matched", "mismatched", or None for both."""

    def __call__(self, data: Path, split: str) -> Records:
        """Read the split into the fields `premise`, `hypothesis` and `label`; unlabelled rows have label −1.

        Raises:
            DataError: If a file or a required column is missing.
        """
        own_split = f"{split}_{self.part}" if self.part and split in ("validation", "test") else split
        names = MNLI_FILES[own_split]
        folder = find_folder(data, ("MNLI", "mnli", "glue/MNLI", "glue/mnli"), f"{names[0]}.tsv")
        rows: list[Record] = []
        ignored = 0
        for name in names:
            table = read_tsv(folder / f"{name}.tsv")
            ignored += table.ignored
            for index, cells in table.rows:
                fields = _fields(cells, table.path)
                # row numbers start at 0 in both parts, so the file name disambiguates
                rows.append(Record(f"{name}:{cells.get('index', index)}", fields))
        return Records("mnli", own_split, tuple(rows), len(rows) + ignored, ignored, folder / f"{names[0]}.tsv")


def _fields(cells: Mapping[str, str], path: Path) -> dict[str, Any]:
    for column in ("sentence1", "sentence2"):
        if column not in cells:
            raise DataError(
                f"{path}, line 1: found the columns {', '.join(cells)}; expected also {column}. "
                "Check that this is GLUE's MNLI file."
            )
    gold = cells.get("gold_label", "")
    return {
        "premise": cells["sentence1"],
        "hypothesis": cells["sentence2"],
        "label": LABELS.index(gold) if gold in LABELS else -1,
    }


def mnli(part: str | None = None) -> FilesOrHub:
    """Return the MultiNLI source, for both parts or one of them, from files or the hub."""
    suffix = f"_{part}" if part else "_matched"
    words = {"validation": f"validation{suffix}", "test": f"test{suffix}"}
    return FilesOrHub(MnliFiles(part), HubSource("nyu-mll/glue", "mnli", splits=words, key="idx"))
