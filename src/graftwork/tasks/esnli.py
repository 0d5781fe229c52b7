"""e-SNLI: entailment pairs with free-text explanations, from CSV files or the hub."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.errors import DataError
from graftwork.tasks.lookup import FilesOrHub, find_folder
from graftwork.tasks.sources import HubSource, Record, Records, read_csv, written

logger = logging.getLogger(__name__)

NO_LABEL = "-"
"""Label of pairs on which the annotators of SNLI did not agree."""

LABELS = ("entailment", "neutral", "contradiction")
"""Label names, by index."""

FILES: Mapping[str, tuple[str, ...]] = {
    "train": ("esnli_train_1.csv", "esnli_train_2.csv"),
    "validation": ("esnli_dev.csv",),
    "test": ("esnli_test.csv",),
}

_COLUMNS = ("pairID", "gold_label", "Sentence1", "Sentence2", "Explanation_1")


@dataclass(frozen=True, slots=True)
class EsnliFiles:
    """Reader of the CSV files of `OanaMariaCamburu/e-SNLI`; the two training files form one split."""

    def __call__(self, data: Path, split: str) -> Records:
        """Read the split into the fields `premise`, `hypothesis`, `label` and `explanation_1` to `explanation_3`.

        Raises:
            DataError: If a file, a column or a label is missing.
        """
        folder = find_folder(data, ("esnli", "e-SNLI", "dataset"), FILES[split][0])
        rows: list[Record] = []
        ignored = unlabelled = 0
        for name in FILES[split]:
            third = () if split == "train" else ("Explanation_2", "Explanation_3")
            table = read_csv(folder / name, (*_COLUMNS, *third))
            ignored += table.ignored
            kept = [(index, cells) for index, cells in table.rows if cells["gold_label"] != NO_LABEL]
            unlabelled += len(table.rows) - len(kept)
            rows += [Record(cells["pairID"], _fields(cells, table.path, index)) for index, cells in kept]
        if unlabelled:
            logger.warning("%s: %d pairs without an agreed label (%s) are skipped.", folder, unlabelled, NO_LABEL)
        return Records("esnli", split, tuple(rows), len(rows) + ignored, ignored, folder / FILES[split][0])


def _fields(cells: Mapping[str, str], path: Path, index: int) -> dict[str, Any]:
    if cells["gold_label"] not in LABELS:
        raise DataError(
            f"{path}, row {index + 1}: found gold_label {cells['gold_label']!r}; expected {', '.join(LABELS)}. "
            "Fix or remove the row."
        )
    return {
        "premise": cells["Sentence1"],
        "hypothesis": cells["Sentence2"],
        "label": LABELS.index(cells["gold_label"]),
        **{f"explanation_{number}": written(cells.get(f"Explanation_{number}", "")) for number in (1, 2, 3)},
    }


ESNLI = FilesOrHub(EsnliFiles(), HubSource("esnli/esnli", options={"revision": "refs/convert/parquet"}))
"""e-SNLI from files, or from the hub's Parquet conversion because `datasets` no longer runs loading scripts."""
