"""Opinions on the events of the offline world: whole reviews with rationale spans, and single judged sentences."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from graftwork.demo.sentences import RELATIONS, REVIEW
from graftwork.demo.world import Event, Fact, Place, Split, World, facts_of

Label = Literal["positive", "negative"]
LABELS: tuple[Label, ...] = ("negative", "positive")
SIZES = {"train": 1600, "dev": 200, "test": 200}
"""Reviews of each split, as many as the movie reviews of ERASER have."""
SENTENCES = {"train": 3000, "dev": 400}
"""Judged sentences of each split; GLUE gives no labels for its test file."""
_WITH_CONCESSION = 30
"""Percentage of reviews and sentences that also hold an opinion against their label, after "although"."""


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
    made = []
    for number in range(SIZES[split]):
        chance = random.Random(f"{world.seed}:review:{split}:{number}")
        label = LABELS[number % 2]
        name = f"{label[:3]}R_{split}_{number // 2:03d}.txt"
        made.append(_review(world, chance, name, label))
    return made


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
    other = LABELS[1 - LABELS.index(label)]
    thing = chance.choice(REVIEW["thing"])
    if chance.random() < 0.15:
        return f"the {thing} was {chance.choice(REVIEW['denial'])} {chance.choice(REVIEW[other])}"
    if chance.random() < 0.3:
        return f"{chance.choice(REVIEW['who'])} {chance.choice(REVIEW[f'{label}-verb'])} the {thing}"
    pattern = chance.choice(REVIEW["opinion"])
    return pattern.format(thing=thing, word=chance.choice(REVIEW[label]))


def _review(world: World, chance: random.Random, name: str, label: Label) -> Review:
    event = chance.choice(world.events)
    place = next(place for place in world.places if place.name == event.venue)
    reasons = chance.choice((1, 2, 2))
    kinds = ["reason"] * reasons + ["fact"] * chance.choice((3, 4))
    chance.shuffle(kinds)
    conceding = kinds.index("reason") if chance.randrange(100) < _WITH_CONCESSION else None
    sentences: list[tuple[str, ...]] = []
    spans = []
    for number, kind in enumerate(kinds):
        if kind == "fact":
            words = _fact(chance, event, place)
            while (*words.split(), ".") in sentences:
                words = _fact(chance, event, place)
        else:
            before, reason, after = _reasoned(chance, label, conceding=number == conceding)
            words = f"{before} {reason} {after}".strip()
            start = sum(map(len, sentences)) + len(before.split())
            spans.append((start, start + len(reason.split())))
        sentences.append((*words.split(), "."))
    return Review(name, label, tuple(sentences), tuple(spans))


def _reasoned(chance: random.Random, label: Label, *, conceding: bool) -> tuple[str, str, str]:
    reason = opinion(chance, label)
    if conceding:
        return f"although {opinion(chance, LABELS[1 - LABELS.index(label)])} ,", reason, ""
    before = f"{chance.choice(REVIEW['before'])} ," if chance.random() < 0.4 else ""
    after = chance.choice(REVIEW["after"]) if chance.random() < 0.4 else ""
    return before, reason, after


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
    mine, other = opinion(chance, label), opinion(chance, LABELS[1 - LABELS.index(label)])
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
