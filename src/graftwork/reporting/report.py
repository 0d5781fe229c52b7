"""Values that a report shows, ready for the templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from graftwork.metrics.results import Results, Sample
from graftwork.reporting.explanations import Section as Answers
from graftwork.settings.recipe import RunConfig


@dataclass(frozen=True)
class Cell:
    """One score, with what was published for it."""

    value: float | None
    """Mean over seeds; None if it was not measured."""
    spread: float | None = None
    """Half of the range over seeds; None for one seed."""
    published: float | None = None
    """The published number, if there is one."""
    reproduced: bool | None = None
    """Whether ours lies within the tolerance."""

    @property
    def text(self) -> str:
        """The score, as it is shown."""
        if self.value is None:
            return "–"
        return f"{self.value:.1f}" + (f" ± {self.spread:.1f}" if self.spread is not None else "")

    @property
    def note(self) -> str:
        """The published number and whether ours agrees."""
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
    """A table that a command wrote for the report of its run."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    """What a reader must know of it, below."""


@dataclass(frozen=True)
class RunReport:
    """One run, ready to be written down."""

    name: str
    results: Results
    config: RunConfig | None
    table: ScoreTable
    pictures: dict[str, bytes] = field(repr=False, default_factory=dict)
    changes: int = 0
    tables: tuple[Table, ...] = ()
    wide: frozenset[str] = frozenset()
    """Titles of pictures that need the whole width."""
    answers: Sequence[Answers] = ()
    """Some answers with their reasons marked, of each task that has them."""
    answers_page: str | None = None
    """Where all of them lie, as seen from the page."""

    @property
    def samples(self) -> Sequence[Sample]:
        """Answers without reasons; the others are shown with their marks."""
        explained = {section.task for section in self.answers}
        return [sample for sample in self.results.samples if sample.task not in explained]

    @property
    def model_name(self) -> str:
        """The hub id, or the last parts of a folder's path."""
        return "/".join(Path(self.results.model).parts[-2:])

    @property
    def training(self) -> Table:
        """The closing numbers of every phase."""
        phases = self.results.training
        columns = list(dict.fromkeys(name for numbers in phases.values() for name in numbers))
        rows = [
            [phase, *(f"{own[name]:.4g}" if name in own else "–" for name in columns)] for phase, own in phases.items()
        ]
        return Table("Training", ["phase", *(name.replace("_", " ") for name in columns)], rows)
