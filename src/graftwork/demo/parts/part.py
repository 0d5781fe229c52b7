"""What the demonstration of one method is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from graftwork.core.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of a demonstration; run again after a stop, it goes on where it was."""

    description: str
    run: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Summary:
    """What a reader takes home from one method, measured beside the dense model."""

    changed: str
    """What the method did to the model."""
    cost: str
    """What it costs, in time, memory or quality."""
    gained: str
    """What the user has now and had not before."""
    table: Sequence[Mapping[str, str]]
    """The comparison in a few rows; every row has the same keys."""


class Part(ABC):
    """The demonstration of one method: the ordinary line, on the offline world, at the smallest size.

    Args:
        folder: Where its runs lie.
        world: Folder that `write_world` has filled.
        quick: Whether to do as little as shows that everything runs, rather than as much as it takes to see something.
    """

    method: ClassVar[str]
    intro: ClassVar[str]
    """What the reader is going to see, in a few sentences."""

    def __init__(self, folder: Path, world: Path, *, quick: bool = False) -> None:
        self.folder = folder
        self.world = world
        self.quick = quick

    @abstractmethod
    def stages(self) -> Sequence[Stage]:
        """What is done, in order."""

    @abstractmethod
    def runs(self) -> Sequence[RunFolder]:
        """The run folders that the stages leave, for the page."""

    @abstractmethod
    def summary(self) -> Summary:
        """The result, read from the run folders.

        Raises:
            GraftworkError: If something that must hold by definition does not.
        """

    def tables(self) -> Mapping[str, Sequence[Mapping[str, str]]]:
        """Further tables for the page: title to rows, all rows of one with the same keys."""
        return {}
