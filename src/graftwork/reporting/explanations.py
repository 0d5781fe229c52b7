"""Page of answers with explanations: marked spans, label probabilities, and filters for correct and wrong labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from graftwork.core.files import read_lines, write_text
from graftwork.core.run_folder import DETAILS_SUFFIX, RunFolder
from graftwork.metrics.results import Results
from graftwork.reporting.pages import render
from graftwork.reporting.selection import stale_predictions
from graftwork.tasks.eraser import token_places

LIMIT = 500
"""Maximum number of answers per task and setting; a larger page would be slow to open."""
HIGHLIGHTS = 4
"""Number of answers per task in the report, which links to the full page."""
PAGE = "explanations.html"

_KINDS = {(True, True): "both", (True, False): "missed", (False, True): "extra", (False, False): ""}


@dataclass(frozen=True)
class Card:
    """One answer, prepared for the template."""

    entry: Mapping[str, Any]
    """Annotations of the method for the answer."""
    pieces: tuple[tuple[str, str], ...]
    """Pairs (kind, text): the source split at the borders of marked spans; empty for free-text explanations."""
    others: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    """Annotations of the answers to the same example with other settings, by the label of the setting."""

    @property
    def order(self) -> str:
        """Order of label and explanation: label_first, reason_first or separate."""
        return self.entry.get("order", "label_first")

    @property
    def gold(self) -> tuple[str, ...]:
        """Gold explanations; spans as they are written in the source."""
        return _texts(self.entry, "gold_explanations", "gold_characters")

    @property
    def reasons(self) -> tuple[tuple[str, tuple[float, float] | None], ...]:
        """Explanations of the model, each with comprehensiveness and sufficiency of its span if they were measured."""
        texts = _texts(self.entry, "explanations", "characters")
        measured: list[Any] = self.entry.get("span_faithfulness") or [None] * len(texts)
        return tuple(
            (text, None if own is None else (own[0], own[1])) for text, own in zip(texts, measured, strict=False)
        )

    @property
    def state(self) -> str:
        """Correctness of the label: "right", "wrong", or "open" for inputs without a gold label."""
        return {True: "right", False: "wrong", None: "open"}[self.entry.get("right")]

    @property
    def flags(self) -> str:
        """Words that the filters of the page match."""
        words = [self.state]
        if self.entry.get("unmatched"):
            words.append("unmatched")
        if self.entry.get("sufficiency", 0) > 0.5:
            words.append("insufficient")
        if self.entry.get("contradicts"):
            words.append("contradicts")
        return " ".join(words)


@dataclass(frozen=True)
class Section:
    """Answers of one task with one setting."""

    task: str
    label: str
    scores: Mapping[str, float]
    notes: tuple[str, ...]
    cards: tuple[Card, ...]
    total: int


def write_explanations(run: RunFolder, output: Path) -> Path | None:
    """Write `explanations.html` if the run has answers with explanations.

    Args:
        run: Run folder.
        output: Folder for the page.

    Returns:
        Path of the page; None if the run has no explanations.
    """
    sections = explained_answers(run)
    if not sections:
        return None
    path = output / PAGE
    title = f"Answers with explanations: {run.path.name}"
    write_text(path, render(PAGE, sections=sections, title=title))
    return path


def explained_answers(run: RunFolder, *, limit: int = LIMIT) -> list[Section]:
    """Read the answers with explanations of a run and of runs in subfolders, in the order of the results.

    Args:
        run: Run folder.
        limit: Maximum number of answers per task and setting.
    """
    rows = Results.read(run.results_file).rows if run.results_file.exists() else ()
    order = {f"{row.task}.{row.label.replace('/', '_')}": row for row in rows}
    places = list(order)
    stale = stale_predictions(run)
    found: list[tuple[int, Section]] = []
    for path in sorted(run.path.rglob(f"{run.predictions.name}/**/*{DETAILS_SUFFIX}")):
        below = path.parts[len(path.parts) - path.parts[::-1].index(run.predictions.name) :]
        name = "/".join(below).removesuffix(DETAILS_SUFFIX)
        if name in stale:
            continue
        row = order.get(name)
        entries = list(read_lines(path))
        cards = tuple(Card(entry, marked_text(entry)) for entry in entries[:limit])
        task, label = (row.task, row.label) if row else (name, "")
        scores: Mapping[str, float] = row.scores if row else {}
        notes = row.notes if row else ()
        place = places.index(name) if row else len(places)
        found.append((place, Section(task, label, scores, notes, cards, len(entries))))
    return _with_others([section for _, section in sorted(found, key=lambda one: one[0])])


def _with_others(sections: Sequence[Section]) -> list[Section]:
    """Sections whose cards have the answers to the same example in other sections of the task."""
    known: dict[tuple[str, str], list[tuple[str, Mapping[str, Any]]]] = {}
    for section in sections:
        for card in section.cards:
            known.setdefault((section.task, str(card.entry["id"])), []).append((section.label, card.entry))

    def others(section: Section, card: Card) -> tuple[tuple[str, Mapping[str, Any]], ...]:
        same = known[section.task, str(card.entry["id"])]
        return tuple((label, entry) for label, entry in same if entry is not card.entry)

    return [
        replace(section, cards=tuple(replace(card, others=others(section, card)) for card in section.cards))
        for section in sections
    ]


def _texts(entry: Mapping[str, Any], name: str, spans: str) -> tuple[str, ...]:
    """Explanations of an answer: those of its spans, with single spaces, or free texts."""
    if "source" in entry and spans in entry:
        return tuple(" ".join(entry["source"][start:end].split()) for start, end in entry[spans])
    return tuple(entry.get(name, ()))


def highlights(run: RunFolder) -> list[Section]:
    """Return a sample of correct and wrong answers per task, with the last setting of the task."""
    chosen: dict[str, Section] = {}
    for section in explained_answers(run):
        chosen[section.task] = section
    return [replace(section, cards=_mixed(section.cards)) for section in chosen.values()]


def _mixed(cards: Sequence[Card]) -> tuple[Card, ...]:
    """Sample evenly from the file, which may be sorted by class; the last answer is a wrong one if there is any."""
    chosen = list(cards[:: max(1, len(cards) // HIGHLIGHTS)][:HIGHLIGHTS])
    wrong = next((card for card in cards if card.state == "wrong"), None)
    if wrong is not None and all(card.state != "wrong" for card in chosen):
        chosen[-1] = wrong
    return tuple(chosen)


def marked_text(entry: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Split the source of an answer into pieces: marked by gold and model, by one of them, or by none ("").

    Example:
        >>> marked_text({"source": "a b c", "characters": [[2, 3]], "gold_characters": [[2, 5]]})
        (('', 'a '), ('both', 'b'), ('', ' '), ('missed', 'c'))
    """
    if "source" not in entry:
        return ()
    source = entry["source"]
    found, gold = character_spans(entry, "characters"), character_spans(entry, "gold_characters")
    borders = sorted({0, len(source), *(place for span in (*found, *gold) for place in span)})
    pieces: list[tuple[str, str]] = []
    for start, end in pairwise(borders):
        kind = _KINDS[_covers(gold, start), _covers(found, start)]
        text = source[start:end]
        # white space between two different marks belongs to neither
        inner = text.strip() if kind else text
        before, after = text.split(inner, 1) if inner else (text, "")
        for own, part in (("", before), (kind, inner), ("", after)):
            if part and pieces and pieces[-1][0] == own:
                pieces[-1] = (own, pieces[-1][1] + part)
            elif part:
                pieces.append((own, part))
    return tuple(pieces)


def character_spans(entry: Mapping[str, Any], name: str) -> list[tuple[int, int]]:
    """Spans of an answer as character offsets; answers of earlier versions have spans of ERASER's tokens.

    Args:
        entry: Details of the answer.
        name: "characters" for the predicted spans, "gold_characters" for the gold ones.
    """
    if name in entry:
        return [(start, end) for start, end in entry[name]]
    places = token_places(entry["source"])
    earlier = {"characters": "spans", "gold_characters": "gold_spans"}[name]
    return [(places[start][0], places[end - 1][1]) for start, end in entry[earlier]]


def _covers(spans: Sequence[tuple[int, int]], place: int) -> bool:
    return any(start <= place < end for start, end in spans)
