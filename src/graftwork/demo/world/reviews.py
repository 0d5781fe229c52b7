"""Opinions on the events of the offline world: whole reviews with rationale spans, and single judged sentences."""

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
"""Reviews of each split, as many as the movie reviews of ERASER have."""
SENTENCES = {"train": 3000, "dev": 400}
"""Judged sentences of each split; GLUE gives no labels for its test file."""


@dataclass(frozen=True, slots=True)
class _Manner:
    """How reviews speak, as shares of one."""

    phrases: float
    """Reasons that are a set phrase; the rest names a quality in one or two words."""
    concessions: float
    """Reviews that also hold an opinion against their label, after "although"."""
    reasons: tuple[int, ...] = (1, 2, 2)
    """Numbers of reasons, each as often as it stands here."""


# rarer words in reasons, or two of them in most reviews, take more training than a demonstration has time for
_LABELLED = _Manner(phrases=1.0, concessions=0.2, reasons=(1,))
_UNLABELLED = _Manner(phrases=0.5, concessions=0.3)


@dataclass(frozen=True, slots=True)
class Review:
    """A text of one event with the reasons for its label."""

    name: str
    label: Label
    sentences: tuple[tuple[str, ...], ...]
    """Tokens of each sentence, the full stop included."""
    spans: tuple[tuple[int, int], ...]
    """Where the reasons stand among all tokens, in reading order; ends are exclusive."""

    @property
    def tokens(self) -> tuple[str, ...]:
        """All tokens in order."""
        return tuple(token for sentence in self.sentences for token in sentence)

    @property
    def text(self) -> str:
        """One sentence a line."""
        return "\n".join(" ".join(sentence) for sentence in self.sentences)


def reviews(world: World, split: Split) -> list[Review]:
    """Make the reviews of a split; half are positive, and the reasons always speak for the label.

    Sentences that state facts name the same things as the opinions do, and a part of the reviews concedes something
    after "although", so neither the place in the text nor the thing spoken of gives a reason away.
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
    """Make other reviews, whose text alone is for pretraining; they name qualities more often."""
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
    """Sentences with 1 for praise and 0 for blame; many praise one thing, blame another and mean the latter.

    "A but B" means B, "although A , B" means B, and a negated opinion means its opposite. So the same words lead to
    both labels, and their order decides.

    Returns:
        Sentence and label; no sentence is in two splits.
    """
    made: list[tuple[str, int]] = []
    seen = {text for text, _ in judged_sentences(world, "train")} if split == "dev" else set()
    number = 0
    while len(made) < SENTENCES[split]:
        chance = random.Random(f"{world.seed}:sentence:{split}:{number}")
        label = LABELS[number % 2]
        text = _judged(world, chance, label)
        if text not in seen:
            seen.add(text)
            made.append((text, LABELS.index(label)))
        number += 1
    return made


def opinion(chance: random.Random, label: Label) -> str:
    """A clause that praises or blames one thing."""
    other = _opposite(label)
    thing = chance.choice(REVIEW["thing"])
    if chance.random() < 0.15:
        return f"the {thing} was {chance.choice(REVIEW['denial'])} {chance.choice(REVIEW[other])}"
    if chance.random() < 0.3:
        return f"{chance.choice(REVIEW['who'])} {chance.choice(REVIEW[f'{label}-verb'])} the {thing}"
    pattern = chance.choice(REVIEW["opinion"])
    return pattern.format(thing=thing, word=chance.choice(REVIEW[label]))


def _review(world: World, chance: random.Random, name: str, label: Label, manner: _Manner) -> Review:
    event = chance.choice(world.events)
    place = next(place for place in world.places if place.name == event.venue)
    reasons = chance.choice(manner.reasons)
    kinds = ["reason"] * reasons + ["fact"] * chance.choice((3, 4))
    chance.shuffle(kinds)
    conceding = kinds.index("reason") if chance.randrange(100) < 100 * manner.concessions else None
    sentences: list[tuple[str, ...]] = []
    spans: list[tuple[int, int]] = []
    said: list[str] = []
    for number, kind in enumerate(kinds):
        if kind == "fact":
            words = _fact(chance, event, place)
            while (*words.split(), ".") in sentences:
                words = _fact(chance, event, place)
        else:
            before, reason, after = _reasoned(chance, label, manner, conceding=number == conceding)
            while reason in said:
                before, reason, after = _reasoned(chance, label, manner, conceding=number == conceding)
            said.append(reason)
            words = f"{before} {reason} {after}".strip()
            start = sum(map(len, sentences)) + len(before.split())
            spans.append((start, start + len(reason.split())))
        sentences.append((*words.split(), "."))
    return Review(name, label, tuple(sentences), tuple(spans))


def _reasoned(chance: random.Random, label: Label, manner: _Manner, *, conceding: bool) -> tuple[str, str, str]:
    """A sentence in three parts, of which the middle one is the reason."""
    opening, reason = _reason(chance, label, manner)
    if conceding:
        return f"although {' '.join(_reason(chance, _opposite(label), manner))} , {opening}", reason, ""
    before = f"{chance.choice(REVIEW['before'])} , " if chance.random() < 0.4 else ""
    after = chance.choice(REVIEW["after"]) if chance.random() < 0.4 else ""
    return f"{before}{opening}", reason, after


def _reason(chance: random.Random, label: Label, manner: _Manner) -> tuple[str, str]:
    """The opening of a clause, and the words that praise or blame."""
    thing = chance.choice(REVIEW["thing"])
    kind = chance.random()
    if kind < manner.phrases:
        return f"the {thing}", chance.choice(REVIEW[f"{label}-end"])
    if kind < 0.75:
        return "it had that", f"{chance.choice(REVIEW[label])} {thing}"
    if kind < 0.9:
        return f"the {thing} was", f"truly {chance.choice(REVIEW[label])}"
    return f"the {thing} was", f"{chance.choice(REVIEW['denial'])} {chance.choice(REVIEW[_opposite(label)])}"


def _opposite(label: Label) -> Label:
    return LABELS[1 - LABELS.index(label)]


def _fact(chance: random.Random, event: Event, place: Place) -> str:
    if chance.random() < 0.4:
        facts = facts_of("event", event) + facts_of("place", place)
        return _spoken(chance, facts)
    thing = chance.choice(REVIEW["thing"])
    return chance.choice(REVIEW["fact"]).format(
        thing=thing, event=event.name, town=place.name, river=place.river, product=place.product
    )


def _spoken(chance: random.Random, facts: Sequence[Fact]) -> str:
    fact = chance.choice(facts)
    said = chance.choice(RELATIONS[fact.relation].say).format(s=fact.subject, v=fact.value)
    return said.removesuffix(".")


def _judged(world: World, chance: random.Random, label: Label) -> str:
    event = chance.choice(world.events)
    mine, other = opinion(chance, label), opinion(chance, _opposite(label))
    core = chance.choice(
        (
            mine,
            f"{other} , but {mine}",
            f"although {other} , {mine}",
            f"{mine} , although {other}",
        )
    )
    start = chance.choice(REVIEW["before"])
    lead = chance.choice((f"{start} , ", f"at the {event.name} , ", f"at the {event.name} in {event.venue} , ", ""))
    after = f" {chance.choice(REVIEW['after'])}" if chance.random() < 0.4 else ""
    return f"{lead}{core}{after} ."
