"""Tasks from own explained data: rows of the training, held-out rows, and rows that keep their explanation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from graftwork.core.plugins import method_modules
from graftwork.errors import DataError
from graftwork.settings.fields import DataFields
from graftwork.settings.lengths import Lengths
from graftwork.settings.training import TrainingSettings
from graftwork.tasks.own_data.task import HUB_PREFIX, OwnSource, describe, format_own, split_of, task_name
from graftwork.tasks.own_data.task_file import TaskFile
from graftwork.tasks.sources import Record, Records, subset_order
from graftwork.tasks.task import Task

TRAIN, VALIDATION = "train", "validation"
_INPUT = 2048
_TARGETS = (32, 512)
"""Smallest and largest declared target length in tokens."""


@dataclass(frozen=True, slots=True)
class ExplainedSource:
    """Source of own explained data.

    Training rows are asked for an explanation if they have one, and for the label alone otherwise; all other rows are
    asked for an explanation.
    """

    definition: TaskFile
    required: bool = True
    """True if every row needs a label."""

    def __call__(self, data: Path, split: str) -> Records:
        """Read the rows of a split.

        Raises:
            DataError: If the data cannot be read, or no row is left for the split.
        """
        own = self.definition
        part = split_of(own.source, split)
        records = OwnSource(own.source, own.only_fields(), self.required)(data, part)
        rows = list(records.rows)
        if own.validation is not None:
            held = held_out([row.key for row in rows], own)
            rows = [row for index, row in enumerate(rows) if (index in held) == (split == VALIDATION)]
        if split in (TRAIN, "all"):
            rows = self._asked(rows, plain=split == TRAIN)
        return replace(records, split=split, rows=tuple(rows), size=len(rows))

    def _asked(self, rows: list[Record], *, plain: bool) -> list[Record]:
        """Rows of a training, of which those without an explanation are asked for the label alone."""
        explained = [index for index, row in enumerate(rows) if row.fields["spans"] or row.fields["explanations"]]
        if self.definition.explanations is not None:
            keys = [rows[index].key for index in explained]
            order = subset_order(keys, split=TRAIN, seed=self.definition.seed)
            explained = [explained[place] for place in order[: self.definition.explanations]]
        kept = set(explained)
        return [
            Record(row.key, {**row.fields, "explain": index in kept or not plain}) for index, row in enumerate(rows)
        ]


def held_out(keys: list[str], definition: TaskFile) -> set[int]:
    """Positions of the rows that the training does not see.

    Raises:
        DataError: If none or all rows would be held out.
    """
    count = max(1, round((definition.validation or 0) * len(keys)))
    if count >= len(keys):
        raise DataError(
            f"{definition.source}: found {len(keys)} rows, of which {count} would be held out. Expected more; lower "
            "validation, or give more rows."
        )
    return set(subset_order(keys, split="held out", seed=definition.seed)[:count])


def definition_of(name: str, fields: DataFields) -> TaskFile:
    """Return the definition of own explained data that the settings of a stage describe.

    Args:
        name: Path of the file, or hub:ID.
        fields: Settings; those of a training also have the held-out share and the number of explanations.
    """
    more: dict[str, Any] = {}
    if isinstance(fields, TrainingSettings):
        share = fields.validation if isinstance(fields.validation, float) else None
        more = {"validation": share, "explanations": fields.explanations, "seed": fields.subset_seed or 0}
    return TaskFile(**{**fields.only_fields().given, **more}, name=task_name(name), source=name)


def explained_task(definition: TaskFile, split: str, *, required: bool = True) -> tuple[Task, str]:
    """Make a task from own explained data, and return it with the split to read.

    Args:
        definition: The data.
        split: Split to read; a file without held-out rows is one split, "all", of which a training reads "train".
        required: True if every row needs a label; False for prediction.

    Raises:
        DataError: If the data cannot be read or a row is malformed, or there are fewer than two labels.
    """
    description = describe(definition.source, definition.only_fields(), split_of(definition.source, split), required)
    labels = () if definition.choices_field else definition.labels or description.labels
    if len(labels) < 2 and not definition.choices_field:
        raise DataError(
            f"{definition.source}: found the labels {', '.join(labels) or 'none'}; expected at least 2. Name the "
            "column of the labels with --label-field, or give them with --labels."
        )
    definition = replace(definition, labels=tuple(labels))
    low, high = _TARGETS
    # about four characters a token in English; half of that leaves room for other languages
    target = min(high, max(low, -(-description.longest_target // 32) * 16 + 16))
    task = Task(
        name=definition.name,
        source=ExplainedSource(definition, required),
        format=format_own,
        splits=() if definition.validation is None else (TRAIN, VALIDATION),
        lengths=Lengths(_INPUT, target),
        new_tokens=None,
        description=f"{definition.source.removeprefix(HUB_PREFIX)}: {description.line}",
    )
    # formats and metrics of explained answers belong to the method that trains them
    (module,) = method_modules("own_data")
    task = import_module(module).explained_task(task, definition)
    if definition.validation is None and not definition.source.startswith(HUB_PREFIX):
        return task, TRAIN if split == TRAIN else "all"
    return task, split
