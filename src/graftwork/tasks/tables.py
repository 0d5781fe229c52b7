"""Classification tasks from a CSV or TSV file with a header, a class column and one or two text columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from graftwork.core.example import Example, Examples
from graftwork.errors import DataError
from graftwork.metrics.labels import ACCURACY
from graftwork.tasks.sources import Record, Records, Table, read_csv, read_tsv
from graftwork.tasks.task import Task

LABEL = "label"
PAIR = ("sentence1", "sentence2")
SUFFIXES = (".csv", ".tsv")


@dataclass(frozen=True, slots=True)
class TableSource:
    """Source of one table; the data folder and the split are ignored."""

    path: Path

    def __call__(self, data: Path, split: str) -> Records:
        """Read the table.

        Raises:
            DataError: If the column "label" or a text column is missing.
        """
        table = _read(self.path)
        rows = tuple(Record(str(index), cells) for index, cells in table.rows)
        if not rows:
            raise DataError(f"{self.path}: found no row; expected a header and at least one line below it.")
        if LABEL not in rows[0].fields or len(rows[0].fields) < 2:
            raise DataError(
                f"{self.path}, line 1: found the columns {', '.join(rows[0].fields)}; expected '{LABEL}' and one or "
                "two text columns. Rename the class column."
            )
        return Records(self.path.stem, "all", rows, table.lines, table.ignored, self.path)


def task_from_table(path: Path) -> tuple[Task, Examples]:
    """Make a task from a CSV or TSV file, scored by accuracy.

    The texts are in `sentence1` (and `sentence2`), or in the first one or two columns other than `label`. The classes
    are the distinct labels, sorted by name.

    Raises:
        DataError: If the file has no header, no class column or no text column.
    """
    source = TableSource(path)
    labels = tuple(sorted({str(row.fields[LABEL]) for row in source(path, "all").rows}))
    task = Task(
        name="_".join(path.stem.split()),
        source=source,
        format=_format,
        labels=labels,
        metrics=(ACCURACY,),
        description=f"the table {path.name}",
    )
    return task, task.load(path.parent, "all")


def _read(path: Path) -> Table:
    return read_tsv(path) if path.suffix == ".tsv" else read_csv(path)


def _format(record: Record) -> Example:
    first, *second = (record.fields[name] for name in _text_columns(record.fields))
    label = str(record.fields[LABEL])
    return Example(record.key, first, label, (label,), pair=second[0] if second else None)


def _text_columns(fields: Mapping[str, str]) -> list[str]:
    named = [name for name in PAIR if name in fields]
    return named if PAIR[0] in fields else [name for name in fields if name != LABEL][:2]
