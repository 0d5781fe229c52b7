"""Base class of the demonstrations, and its stages and summary."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

from graftwork.core.run_folder import RunFolder
from graftwork.reporting.verdicts import Comparison


class Scale(StrEnum):
    """Amount of computation of a demonstration."""

    QUICK = "quick"
    """Two training steps and a handful of examples."""
    SHORT = "short"
    """Short trainings with a selection of the settings."""
    FULL = "full"
    """Trainings of full length with all settings."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of a demonstration; it resumes if it was interrupted."""

    description: str
    run: Callable[[], object]
    seconds: float = 5.0
    """Expected seconds on two idle cores."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Main results of one method in comparison with the dense model."""

    changed: str
    """Changes of the model."""
    accuracy: Comparison
    time: Comparison
    memory: Comparison
    table: Sequence[Mapping[str, str]]
    """Rows of the comparison table; all rows have the same keys."""
    others: Sequence[Comparison] = ()
    """Further comparisons."""
    facts: Sequence[str] = ()
    """Findings that are no comparison with the dense model."""

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """All comparisons."""
        return self.accuracy, self.time, self.memory, *self.others


class Part(ABC):
    """Demonstration of one method: the ordinary pipeline on the offline world at the smallest size.

    Args:
        folder: Folder of its runs.
        world: Folder written by `write_world`.
        scale: Amount of computation.
    """

    method: ClassVar[str]
    intro: ClassVar[str]
    """Introduction of the section in the report."""

    shortened: ClassVar[str]
    """Differences between the short and the full demonstration, for the notice on the page."""

    def __init__(self, folder: Path, world: Path, *, scale: Scale = Scale.SHORT) -> None:
        self.folder = folder
        self.world = world
        self.scale = scale

    @property
    def quick(self) -> bool:
        """True for a smoke test."""
        return self.scale is Scale.QUICK

    @property
    def full(self) -> bool:
        """True for the full demonstration."""
        return self.scale is Scale.FULL

    def sized(self, quick: float, short: float, full: float) -> float:
        """Choose a number by the scale."""
        return {Scale.QUICK: quick, Scale.SHORT: short, Scale.FULL: full}[self.scale]

    def steps(self, short: int, full: int) -> int:
        """Number of training steps."""
        return int(self.sized(2, short, full))

    @abstractmethod
    def stages(self) -> Sequence[Stage]:
        """Stages in order of execution."""

    @abstractmethod
    def runs(self) -> Sequence[RunFolder]:
        """Run folders of the stages, for the report."""

    @abstractmethod
    def summary(self) -> Summary:
        """Summary of the results in the run folders.

        Raises:
            GraftworkError: If a result violates an identity of the method.
        """

    def tables(self) -> Mapping[str, Sequence[Mapping[str, str]]]:
        """Further tables of the report by title; all rows of a table have the same keys."""
        return {}
