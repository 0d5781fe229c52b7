"""Examples: one input with its answers, and the examples of one split of a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from graftwork.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Example:
    """One input text with the text that the model should write."""

    key: str
    """What names the example within its split."""
    input: str
    target: str
    """The text to learn; empty if the data gives none."""
    answers: tuple[str, ...] = ()
    """Every text that counts as right when scoring; empty if the data gives none."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What else the source knows of the example, for parsing and for metrics."""
    pair: str | None = None
    """The second text, where the task is about two: a segment of its own for encoders, a continuation for others."""

    @property
    def text(self) -> str:
        """The input in one piece."""
        return self.input if self.pair is None else f"{self.input} {self.pair}"


@dataclass(frozen=True, slots=True)
class Examples:
    """The formatted examples of one split of one task."""

    task: str
    split: str
    """The split really read, which a fallback can make another one than was asked for."""
    rows: tuple[Example, ...]
    size: int
    """Number that scores are divided by; rows that could not be read count as wrong in it."""
    ignored: int
    """Rows of the source that are not in its format."""
    source: str
    """Path or name of what was read."""
    running_text: bool = False
    """The rows are lines of one text, to be modelled token by token; there is nothing to answer."""

    def first(self, count: int) -> Examples:
        """The first `count` rows, scored by themselves.

        Raises:
            ConfigError: If `count` is smaller than 1.
        """
        rows = self.rows[: at_least_one("count", count)]
        return replace(self, rows=rows, size=len(rows), ignored=0)


def at_least_one(name: str, value: int) -> int:
    """Return `value`.

    Raises:
        ConfigError: If it is below 1.
    """
    if value < 1:
        raise ConfigError(f"Found {name} {value}; expected at least 1. Leave it out to use all rows.")
    return value
