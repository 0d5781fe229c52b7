"""Contents of a report, prepared for the templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from graftwork.metrics.results import Results
from graftwork.reporting.explanations import Section as Answers
from graftwork.reporting.picture import Picture
from graftwork.reporting.samples import SampleRow, sample_rows
from graftwork.settings.recipe import RunConfig


@dataclass(frozen=True)
class Cell:
    """One score with its published number."""

    value: float | None
    """Mean over seeds; None if not measured."""
    spread: float | None = None
    """Half of the range over seeds; None for a single seed."""
    published: float | None = None
    """Published number; None if there is none."""
    reproduced: bool | None = None
    """True if our score is within the tolerance of the published one."""
    share: bool = False
    """True if the score may be a share from 0 to 1, which needs more digits than a percentage."""

    @property
    def text(self) -> str:
        """Formatted score."""
        if self.value is None:
            return "–"
        shown = ".4g" if self.share else ".1f"
        return f"{self.value:{shown}}" + (f" ± {self.spread:{shown}}" if self.spread is not None else "")

    @property
    def note(self) -> str:
        """Formatted published number with the result of the comparison."""
        if self.published is None:
            return ""
        mark = {True: "reproduced", False: "differs", None: "not run"}[self.reproduced]
        return f"published {self.published:g}, {mark}"


@dataclass(frozen=True)
class ScoreTable:
    """Scores of all settings on all tasks."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


@dataclass(frozen=True)
class Table:
    """Additional table that a command wrote for the report of its run."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    """Note below the table."""


@dataclass(frozen=True)
class RunReport:
    """Report of one run."""

    name: str
    results: Results
    config: RunConfig | None
    table: ScoreTable
    pictures: dict[str, Picture] = field(repr=False, default_factory=dict[str, Picture])
    """Plots of scores, measures and costs by title."""
    training_pictures: dict[str, Picture] = field(repr=False, default_factory=dict[str, Picture])
    """Plots over training steps by title."""
    changes: int = 0
    tables: tuple[Table, ...] = ()
    wide: frozenset[str] = frozenset()
    """Titles of plots that need the full page width."""
    answers: Sequence[Answers] = ()
    """Sample of answers with explanations, for each task that has them."""
    answers_page: str | None = None
    """Relative link to the page of all answers."""
    notice: str = ""
    """Sentence above the scores, such as the one about a run without an evaluation."""

    @property
    def samples(self) -> Sequence[SampleRow]:
        """Sample answers of tasks without explanations, beside those of the dense model."""
        explained = {section.task for section in self.answers}
        return sample_rows([sample for sample in self.results.samples if sample.task not in explained])

    @property
    def notes(self) -> list[str]:
        """Configurations of the metrics, and devices and data types of the models."""
        notes = [note for row in self.results.rows for note in row.notes]
        places = sorted({(row.device, row.dtype) for row in self.results.rows if row.device and row.dtype})
        if places:
            notes.append(f"Computed on {' and '.join(f'{device} in {dtype}' for device, dtype in places)}.")
        return list(dict.fromkeys(notes))

    @property
    def model_name(self) -> str:
        """Hub id, or the last two parts of a folder's path."""
        return "/".join(Path(self.results.model).parts[-2:])

    @property
    def training(self) -> Table:
        """Table of the final metrics of every training phase."""
        phases = self.results.training
        columns = list(dict.fromkeys(name for numbers in phases.values() for name in numbers))
        rows = [
            [phase, *(f"{own[name]:.4g}" if name in own else "–" for name in columns)] for phase, own in phases.items()
        ]
        return Table("Training", ["phase", *(name.replace("_", " ") for name in columns)], rows)
