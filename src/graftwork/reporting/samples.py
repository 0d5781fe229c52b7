"""Sample answers side by side, with the words that differ from those of the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from graftwork.metrics.results import Sample

DENSE = "dense"
"""Start of the labels of the dense model."""


@dataclass(frozen=True)
class Answer:
    """One answer, given by one or several settings."""

    pieces: tuple[tuple[bool, str], ...]
    """Pairs (differs, text): the answer split at the borders of the words that the reference answer lacks."""
    right: bool
    """True if the answer equals an accepted one, apart from case and surrounding white space."""
    names: tuple[str, ...]
    """Labels of the settings."""


@dataclass(frozen=True)
class SampleRow:
    """One input, the answer of the reference, and the answers that differ from it."""

    task: str
    input: str
    answers: tuple[str, ...]
    """Accepted answers."""
    reference: Answer
    others: tuple[Answer, ...]
    same: tuple[str, ...]
    """Labels of the settings with the answer of the reference."""


def sample_rows(samples: Sequence[Sample]) -> list[SampleRow]:
    """Arrange samples in rows; the reference of a row is the dense model, or the first setting without one."""
    rows: list[SampleRow] = []
    for sample in samples:
        groups = sample.by_answer()
        if not groups:
            continue
        first = reference_of(list(sample.predictions))
        text = sample.predictions[first]
        others = [
            Answer(differing(answer, text), _is_right(answer, sample), tuple(names))
            for answer, names in groups.items()
            if answer != text
        ]
        same = tuple(name for name in groups[text] if name != first)
        reference = Answer(((False, text),), _is_right(text, sample), (first,))
        rows.append(SampleRow(sample.task, sample.input, sample.answers, reference, tuple(others), same))
    return rows


def reference_of(labels: Sequence[str]) -> str:
    """Label of the dense model among labels, or the first label."""
    return next((label for label in labels if label.startswith(DENSE)), labels[0])


def differing(answer: str, reference: str) -> tuple[tuple[bool, str], ...]:
    """Split an answer into pieces that occur in the reference answer and pieces that differ.

    Example:
        >>> differing("in the town", "in a town")
        ((False, 'in'), (True, 'the'), (False, 'town'))
    """
    words, expected = answer.split(), reference.split()
    pieces: list[tuple[bool, str]] = []
    for kind, start, end, _, _ in SequenceMatcher(None, words, expected, autojunk=False).get_opcodes():
        if end > start:
            pieces.append((kind != "equal", " ".join(words[start:end])))
    return tuple(pieces)


def _is_right(answer: str, sample: Sample) -> bool:
    return answer.strip().lower() in {accepted.strip().lower() for accepted in sample.answers}
