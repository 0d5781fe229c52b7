"""Base class of the demonstrations, and its stages and summary."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from graftwork.core.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of a demonstration; it resumes if it was interrupted."""

    description: str
    run: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Summary:
    """Main results of one method in comparison with the dense model."""

    changed: str
    """Changes of the model."""
    cost: str
    """Cost in time, memory or quality."""
    gained: str
    """Benefit for the user."""
    table: Sequence[Mapping[str, str]]
    """Rows of the comparison table; all rows have the same keys."""


class Part(ABC):
    """Demonstration of one method: the ordinary pipeline on the offline world at the smallest size.

    Args:
        folder: Folder of its runs.
        world: Folder written by `write_world`.
        quick: True for a smoke test with two training steps and a handful of examples.
    """

    method: ClassVar[str]
    intro: ClassVar[str]
    """Introduction of the section in the report."""

    def __init__(self, folder: Path, world: Path, *, quick: bool = False) -> None:
        self.folder = folder
        self.world = world
        self.quick = quick

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
