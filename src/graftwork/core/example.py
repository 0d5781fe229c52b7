"""`Example`, one input with its answers, and `Examples`, the examples of one split of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from graftwork.errors import ConfigError

AUXILIARY = "auxiliary"
"""Metadata field with a second example, whose prompt is trained and answered together with the first one's."""


@dataclass(frozen=True, slots=True)
class Example:
    """One input text with its target text and accepted answers."""

    key: str
    """Identifier of the example within its split."""
    input: str
    target: str
    """Target text in training; empty if the data has none."""
    answers: tuple[str, ...] = ()
    """Accepted answers in scoring; empty if the data has none."""
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Further fields of the source, for parsers and metrics."""
    pair: str | None = None
    """Second text of a text-pair task: a separate segment for encoders, appended to the input for other models."""

    @property
    def text(self) -> str:
        """Input and second text, joined by a space."""
        return self.input if self.pair is None else f"{self.input} {self.pair}"


@dataclass(frozen=True, slots=True)
class Examples:
    """The formatted examples of one split of one task."""

    task: str
    split: str
    """Split that was read; differs from the requested split where the task has a fallback."""
    rows: Sequence[Example]
    """A tuple, or a memory-mapped table of many rows."""
    size: int
    """Denominator of scores; includes rows that could not be parsed, which therefore count as wrong."""
    ignored: int
    """Number of rows of the source that could not be parsed."""
    source: str
    """Path or name of the data."""
    running_text: bool = False
    """True if the rows are consecutive lines of one text, for language modelling without answers."""

    def first(self, count: int) -> Examples:
        """Return the first `count` rows; `size` becomes their number.

        Raises:
            ConfigError: If `count` is smaller than 1.
        """
        rows = self.rows[: at_least_one("count", count)]
        return replace(self, rows=rows, size=len(rows), ignored=0)


def at_least_one(name: str, value: int) -> int:
    """Return `value` if it is at least 1.

    Raises:
        ConfigError: If it is smaller than 1.
    """
    if value < 1:
        raise ConfigError(f"Found {name} {value}; expected at least 1. Leave it out to use all rows.")
    return value
