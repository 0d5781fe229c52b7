"""Passages said again, with questions and answers about each: what adapters of passages are trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Pair:
    """A question about a passage, and its answer."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Augmented:
    """What one passage is trained on beside its own text."""

    rewrite: str
    """The passage in other words; empty for none."""
    pairs: tuple[Pair, ...]

    def row(self, id: str) -> dict[str, Any]:
        """One line of a pairs file."""
        pairs = [{"question": pair.question, "answer": pair.answer} for pair in self.pairs]
        return {"id": id, "rewrite": self.rewrite, "pairs": pairs}


def read_pairs(path: Path) -> dict[str, Augmented]:
    """A pairs file: JSON lines of `id`, `rewrite` and `pairs`, each with `question` and `answer`.

    Raises:
        ConfigError: If there is no such file.
        DataError: If a line is something else, or an id is there twice; names the line.
    """
    if not path.is_file():
        raise ConfigError(f"Found no pairs file {path}. Make one with `graftwork bank pairs`, or bring your own.")
    found: dict[str, Augmented] = {}
    for number, row in _rows(path):
        id, rewrite, pairs = row.get("id"), row.get("rewrite", ""), row.get("pairs")
        if not isinstance(id, str) or not isinstance(rewrite, str) or not isinstance(pairs, list) or not pairs:
            raise DataError(
                f"{path}, line {number}: expected an id, a rewrite (a text, may be empty) and at least one of pairs; "
                f"found {json.dumps(row, ensure_ascii=False)[:80]}."
            )
        if id in found:
            raise DataError(f"{path}, line {number}: found {id!r} a second time; expected each passage once.")
        found[id] = Augmented(rewrite, tuple(_pair(pair, path, number) for pair in pairs))
    return found


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: expected a JSON object; found {line.strip()[:60]!r}.")
            yield number, row


def _pair(pair: Any, path: Path, number: int) -> Pair:
    texts = [pair.get(name) for name in ("question", "answer")] if isinstance(pair, dict) else []
    if len(texts) != 2 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(
            f"{path}, line {number}: expected a question and an answer in each of pairs; found {str(pair)[:60]}."
        )
    return Pair(*(str(text) for text in texts))
