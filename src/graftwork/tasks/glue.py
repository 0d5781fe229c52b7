"""GLUE sentence classification, from the original files or the copy on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.core.example import Example
from graftwork.errors import DataError
from graftwork.metrics.labels import ACCURACY, class_f1
from graftwork.metrics.metric import Metric
from graftwork.tasks.sources import HubSource, Record, Records, read_tsv
from graftwork.tasks.task import Task


@dataclass(frozen=True, slots=True)
class GlueData:
    """On-disk layout of one GLUE data set."""

    folder: str
    """Folder in the GLUE archive."""
    hub: str
    """Configuration name on the hub."""
    texts: tuple[str, ...]
    """Column of the text, or columns of both texts."""
    labels: tuple[str, ...]
    """Class names in the order of the class indices."""
    label: str = "label"
    """Class column in the raw files; on the hub it is always "label"."""
    metrics: tuple[Metric, ...] = (ACCURACY,)
    """Metrics; the first one selects the best checkpoint."""


DATASETS: Mapping[str, GlueData] = {
    "sst2": GlueData("SST-2", "sst2", ("sentence",), ("negative", "positive")),
    "qnli": GlueData("QNLI", "qnli", ("question", "sentence"), ("entailment", "not_entailment")),
    "qqp": GlueData(
        "QQP",
        "qqp",
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        label="is_duplicate",
        metrics=(ACCURACY, Metric("f1", class_f1("duplicate"), description="F1 of the class duplicate")),
    ),
}
"""Layout by data set."""


@dataclass(frozen=True, slots=True)
class GlueSource:
    """Reader of `<folder>/<split>.tsv`; quote characters are literal."""

    dataset: str

    def __call__(self, data: Path, split: str) -> Records:
        """Read a split.

        Raises:
            DataError: If the file or a required column is missing.
        """
        known = DATASETS[self.dataset]
        places = [data / known.folder, data / self.dataset, data]
        path = next((place / f"{split}.tsv" for place in places if (place / f"{split}.tsv").is_file()), None)
        if path is None:
            raise DataError(
                f"Found no {split} data of {self.dataset} in {data}; expected {known.folder}/{split}.tsv. "
                "Name the folder of GLUE's archive, or another split (train, dev)."
            )
        table = read_tsv(path)
        for index, cells in table.rows[:1]:
            if missing := [name for name in known.texts if name not in cells]:
                raise DataError(
                    f"{path}, line {index + 1}: found the columns {', '.join(cells)}; expected also "
                    f"{', '.join(missing)}. Check that this is the original GLUE file."
                )
        rows = tuple(Record(str(index), _named(cells, known, path, index)) for index, cells in table.rows)
        return Records(self.dataset, split, rows, table.lines, table.ignored, table.path)


@dataclass(frozen=True, slots=True)
class ClassFormat:
    """Format of a classification record: one or two texts, with the class name as target."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    label: str = "label"

    def __call__(self, record: Record) -> Example:
        """Format a record.

        Raises:
            DataError: If the class is unknown.
        """
        first, *second = (str(record.fields[name]) for name in self.texts)
        name = class_name(record.fields.get(self.label), self.labels, f"row {record.key}")
        answers = () if name is None else (name,)
        return Example(record.key, first, name or "", answers, pair=second[0] if second else None)


def class_name(value: Any, labels: tuple[str, ...], where: str) -> str | None:
    """Return the class name for a name or an index; None for unlabelled data such as test files.

    Raises:
        DataError: If the value is neither a known name nor an index.
    """
    text = str(value).strip().lower()
    if value is None or text in ("", "-1"):
        return None
    if text in labels:
        return text
    # isdigit is also true for superscripts, which are no numbers
    if text.isdecimal() and len(text) < 9 and int(text) < len(labels):
        return labels[int(text)]
    raise DataError(
        f"{where}: found the class {value!r}; expected one of {', '.join(labels)}, or a number from 0 to "
        f"{len(labels) - 1}. Fix the row."
    )


def glue_task(dataset: str, *, hub: bool = False) -> Task:
    """Make a task from a GLUE data set.

    Args:
        dataset: "sst2", "qnli" or "qqp".
        hub: Read the copy on the hub instead of raw files.
    """
    known = DATASETS[dataset]
    return Task(
        name=f"glue/{dataset}" + ("_hub" if hub else ""),
        source=HubSource("nyu-mll/glue", known.hub, {"dev": "validation"}) if hub else GlueSource(dataset),
        format=ClassFormat(known.texts, known.labels),
        labels=known.labels,
        metrics=known.metrics,
        description=f"{known.folder} of GLUE, {'from the hub' if hub else 'from its raw files'}",
    )


def _named(cells: Mapping[str, str], known: GlueData, path: Path, index: int) -> dict[str, Any]:
    value = cells.get(known.label)
    # validated here because file and line are known; the header is line 1
    return {**cells, "label": class_name(value, known.labels, f"{path}, line {index + 2}")}


TASKS: Mapping[str, Task] = {
    task.name: task for dataset in DATASETS for task in (glue_task(dataset), glue_task(dataset, hub=True))
}
