"""Pairs files: a rewrite and question–answer pairs of every passage, the training data of trained adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from graftwork.core.readers import read_objects, reading, shorten
from graftwork.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Pair:
    """A question about a passage, and its answer."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Augmented:
    """Augmentation of one passage, used for training in addition to the passage's text."""

    rewrite: str
    """Paraphrase of the passage; empty for none."""
    pairs: tuple[Pair, ...]

    def row(self, id: str) -> dict[str, Any]:
        """Return the JSON object of one line of a pairs file."""
        pairs = [{"question": pair.question, "answer": pair.answer} for pair in self.pairs]
        return {"id": id, "rewrite": self.rewrite, "pairs": pairs}


def read_pairs(path: Path) -> dict[str, Augmented]:
    """Read a pairs file: JSON lines with `id`, `rewrite` and `pairs`, each pair with `question` and `answer`.

    Raises:
        ConfigError: If the file does not exist.
        DataError: If a line has another format, or an id occurs twice; the message contains the line number.
    """
    if not path.is_file():
        raise ConfigError(f"Found no pairs file {path}. Make one with `graftwork bank pairs`, or bring your own.")
    found: dict[str, Augmented] = {}
    for number, row in _rows(path):
        id, rewrite, pairs = row.get("id"), row.get("rewrite", ""), row.get("pairs")
        if not isinstance(id, str) or not isinstance(rewrite, str) or not isinstance(pairs, list) or not pairs:
            raise DataError(
                f"{path}, line {number}: expected an id, a rewrite (a text, may be empty) and at least one of pairs; "
                f"found {shorten(row, 80)}."
            )
        if id in found:
            raise DataError(f"{path}, line {number}: found {id!r} a second time; expected each passage once.")
        found[id] = Augmented(rewrite, tuple(_pair(pair, path, number) for pair in cast("list[object]", pairs)))
    return found


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    with reading(path), path.open("rb") as file:
        lines = ((number, line.rstrip(b"\r\n")) for number, line in enumerate(file, start=1) if line.strip())
        for number, row in read_objects(path, lines):
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: expected a JSON object; found {shorten(row)}.")
            yield number, cast("dict[str, object]", row)


def _pair(pair: object, path: Path, number: int) -> Pair:
    shown = shorten(pair)
    fields = cast("dict[str, object]", pair) if isinstance(pair, dict) else {}
    question, answer = fields.get("question"), fields.get("answer")
    if isinstance(question, str) and isinstance(answer, str) and question.strip() and answer.strip():
        return Pair(question, answer)
    raise DataError(f"{path}, line {number}: expected a question and an answer in each of pairs; found {shown}.")
