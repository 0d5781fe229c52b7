"""Sentiment data about the events of the offline world: reviews with rationale spans, and labelled sentences."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from graftwork.demo.world.sentences import RELATIONS, REVIEW
from graftwork.demo.world.world import Event, Fact, Place, Split, World, facts_of

Label = Literal["positive", "negative"]
LABELS: tuple[Label, ...] = ("negative", "positive")
SIZES = {"train": 1600, "dev": 200, "test": 200}
"""Number of reviews per split, equal to ERASER's movie reviews."""
SENTENCES = {"train": 3000, "dev": 400}
"""Number of labelled sentences per split; GLUE has no labels for its test split."""


@dataclass(frozen=True, slots=True)
class _Style:
    """Composition of reviews, as fractions."""

    phrases: float
    """Fraction of rationales that are a fixed phrase; the others are an adjective of one or two words."""
    concessions: float
    """Fraction of reviews that contain an opinion against their label, after "although"."""
    rationales: tuple[int, ...] = (1, 2, 2)
    """Number of rationales per review, sampled uniformly from this tuple."""


# rarer words in rationales, or two rationales in most reviews, need longer training than the demo can afford
_LABELLED = _Style(phrases=1.0, concessions=0.2, rationales=(1,))
_UNLABELLED = _Style(phrases=0.5, concessions=0.3)


@dataclass(frozen=True, slots=True)
class Review:
    """Review of one event with rationale spans for its label."""

    name: str
    label: Label
    sentences: tuple[tuple[str, ...], ...]
    """Tokens of each sentence, including the full stop."""
    spans: tuple[tuple[int, int], ...]
    """Rationales as [start, end) offsets into `tokens`, in reading order."""

    @property
    def tokens(self) -> tuple[str, ...]:
        """Tokens of all sentences."""
        return tuple(token for sentence in self.sentences for token in sentence)

    @property
    def text(self) -> str:
        """Text with one sentence per line."""
        return "\n".join(" ".join(sentence) for sentence in self.sentences)


def reviews(world: World, split: Split) -> list[Review]:
    """Generate the reviews of a split; half are positive, and rationales always support the label.

    Factual sentences mention the same nouns as opinions, and some reviews concede a point after "although", so neither
    position nor noun identifies a rationale.
    """
    return [
        _review(
            world,
            random.Random(f"{world.seed}:labelled review:{split}:{number}"),
            f"{LABELS[number % 2][:3]}R_{split}_{number // 2:03d}.txt",
            LABELS[number % 2],
            _LABELLED,
        )
        for number in range(SIZES[split])
    ]


def unlabelled_reviews(world: World) -> list[Review]:
    """Generate further reviews for pretraining on text alone; more of their rationales are adjectives."""
    return [
        _review(
            world,
            random.Random(f"{world.seed}:review:train:{number}"),
            f"{number:04d}.txt",
            LABELS[number % 2],
            _UNLABELLED,
        )
        for number in range(SIZES["train"])
    ]


def judged_sentences(world: World, split: Literal["train", "dev"]) -> list[tuple[str, int]]:
    """Generate sentences with label 1 (positive) or 0 (negative); many contain opinions of both polarities.

    "A but B" and "although A , B" have the label of B, and negation flips the label, so word order decides and word
    counts do not.

    Returns:
        Pairs of sentence and label; no sentence is in two splits.
    """
    made: list[tuple[str, int]] = []
    seen: set[str] = {text for text, _ in judged_sentences(world, "train")} if split == "dev" else set()
    number = 0
    while len(made) < SENTENCES[split]:
        rng = random.Random(f"{world.seed}:sentence:{split}:{number}")
        label = LABELS[number % 2]
        text = _judged(world, rng, label)
        if text not in seen:
            seen.add(text)
            made.append((text, LABELS.index(label)))
        number += 1
    return made


def opinion(rng: random.Random, label: Label) -> str:
    """Return a clause with a positive or negative opinion of one thing."""
    other = _opposite(label)
    thing = rng.choice(REVIEW["thing"])
    if rng.random() < 0.15:
        return f"the {thing} was {rng.choice(REVIEW['denial'])} {rng.choice(REVIEW[other])}"
    if rng.random() < 0.3:
        return f"{rng.choice(REVIEW['who'])} {rng.choice(REVIEW[f'{label}-verb'])} the {thing}"
    pattern = rng.choice(REVIEW["opinion"])
    return pattern.format(thing=thing, word=rng.choice(REVIEW[label]))


def _review(world: World, rng: random.Random, name: str, label: Label, style: _Style) -> Review:
    event = rng.choice(world.events)
    place = next(place for place in world.places if place.name == event.venue)
    kinds = ["rationale"] * rng.choice(style.rationales) + ["fact"] * rng.choice((3, 4))
    rng.shuffle(kinds)
    conceding = kinds.index("rationale") if rng.randrange(100) < 100 * style.concessions else None
    sentences: list[tuple[str, ...]] = []
    spans: list[tuple[int, int]] = []
    used: list[str] = []
    for number, kind in enumerate(kinds):
        if kind == "fact":
            words = _fact(rng, event, place)
            while (*words.split(), ".") in sentences:
                words = _fact(rng, event, place)
        else:
            before, rationale, after = _rationale_sentence(rng, label, style, conceding=number == conceding)
            while rationale in used:
                before, rationale, after = _rationale_sentence(rng, label, style, conceding=number == conceding)
            used.append(rationale)
            words = f"{before} {rationale} {after}".strip()
            start = sum(map(len, sentences)) + len(before.split())
            spans.append((start, start + len(rationale.split())))
        sentences.append((*words.split(), "."))
    return Review(name, label, tuple(sentences), tuple(spans))


def _rationale_sentence(rng: random.Random, label: Label, style: _Style, *, conceding: bool) -> tuple[str, str, str]:
    """Return a sentence in three parts; the middle part is the rationale."""
    opening, rationale = _rationale(rng, label, style)
    if conceding:
        return f"although {' '.join(_rationale(rng, _opposite(label), style))} , {opening}", rationale, ""
    before = f"{rng.choice(REVIEW['before'])} , " if rng.random() < 0.4 else ""
    after = rng.choice(REVIEW["after"]) if rng.random() < 0.4 else ""
    return f"{before}{opening}", rationale, after


def _rationale(rng: random.Random, label: Label, style: _Style) -> tuple[str, str]:
    """Return the opening of a clause and the words that carry the opinion."""
    thing = rng.choice(REVIEW["thing"])
    kind = rng.random()
    if kind < style.phrases:
        return f"the {thing}", rng.choice(REVIEW[f"{label}-end"])
    if kind < 0.75:
        return "it had that", f"{rng.choice(REVIEW[label])} {thing}"
    if kind < 0.9:
        return f"the {thing} was", f"truly {rng.choice(REVIEW[label])}"
    return f"the {thing} was", f"{rng.choice(REVIEW['denial'])} {rng.choice(REVIEW[_opposite(label)])}"


def _opposite(label: Label) -> Label:
    return LABELS[1 - LABELS.index(label)]


def _fact(rng: random.Random, event: Event, place: Place) -> str:
    if rng.random() < 0.4:
        facts = facts_of("event", event) + facts_of("place", place)
        return _fact_sentence(rng, facts)
    thing = rng.choice(REVIEW["thing"])
    return rng.choice(REVIEW["fact"]).format(
        thing=thing, event=event.name, town=place.name, river=place.river, product=place.product
    )


def _fact_sentence(rng: random.Random, facts: Sequence[Fact]) -> str:
    fact = rng.choice(facts)
    sentence = rng.choice(RELATIONS[fact.relation].say).format(s=fact.subject, v=fact.value)
    return sentence.removesuffix(".")


def _judged(world: World, rng: random.Random, label: Label) -> str:
    event = rng.choice(world.events)
    mine, other = opinion(rng, label), opinion(rng, _opposite(label))
    core = rng.choice(
        (
            mine,
            f"{other} , but {mine}",
            f"although {other} , {mine}",
            f"{mine} , although {other}",
        )
    )
    start = rng.choice(REVIEW["before"])
    lead = rng.choice((f"{start} , ", f"at the {event.name} , ", f"at the {event.name} in {event.venue} , ", ""))
    after = f" {rng.choice(REVIEW['after'])}" if rng.random() < 0.4 else ""
    return f"{lead}{core}{after} ."
