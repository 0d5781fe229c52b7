"""Questions about the offline world in UnifiedQA text, and the plain sentences that say its facts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from graftwork.demo.world.sentences import RELATIONS
from graftwork.demo.world.world import Fact, Split, World, facts_of, number_of, split_of

SEPARATOR = r" \n "
"""Joins question and rest in UnifiedQA text: a backslash and the letter n, not a line break."""
_DESCRIBE = ("describe {s}.", "tell me about {s}.", "what should one know about {s}?")
_PROFILES: Mapping[str, str] = MappingProxyType(
    {
        "person": "a {trade} from {birthplace}",
        "place": "a town in {region} known for {product}",
        "employer": "a firm in {town} that makes {goods}",
        "event": "held in {venue} in {month}",
    }
)


@dataclass(frozen=True, slots=True)
class Row:
    """One question with its answers, the first of which is the target."""

    question: str
    rest: str
    """Options or passage; empty if there is nothing but the question."""
    answers: tuple[str, ...]

    @property
    def input(self) -> str:
        """The text that a model reads."""
        return f"{self.question}{SEPARATOR}{self.rest}" if self.rest else self.question


def fact_rows(world: World, split: Split) -> list[Row]:
    """Closed-book questions: dev and test ask for known facts in a wording that train never uses for that fact."""
    return [Row(ask.format(s=fact.subject), "", answers_to(fact)) for fact, ask in _asked(world, split)]


def choice_rows(world: World, split: Split) -> list[Row]:
    """Multiple choice over known facts, one right value among four."""
    rows = []
    for fact, ask in _asked(world, split):
        chance = random.Random(f"{world.seed}:choice:{fact}:{ask}")
        others = [value for value in world.pool(fact.relation) if value != fact.value]
        options = [fact.value, *chance.sample(others, 3)]
        chance.shuffle(options)
        listed = " ".join(f"({letter}) {option}" for letter, option in zip("abcd", options, strict=True))
        rows.append(Row(ask.format(s=fact.subject), listed, (fact.value,)))
    return rows


def yesno_rows(world: World, split: Split) -> list[Row]:
    """Questions that yes or no answers, half and half; a subject belongs to one split."""
    rows = []
    for fact in world.known_facts:
        if split_of(world.seed, "yesno", fact.subject) != split:
            continue
        for number, check in enumerate(RELATIONS[fact.relation].check):
            chance = random.Random(f"{world.seed}:yesno:{fact}:{number}")
            wrong = chance.choice([value for value in world.pool(fact.relation) if value != fact.value])
            rows.append(Row(check.format(s=fact.subject, v=fact.value), "", ("yes",)))
            rows.append(Row(check.format(s=fact.subject, v=wrong), "", ("no",)))
    return rows


def keyword_rows(world: World, split: Split) -> list[Row]:
    """Known facts asked by a keyword that stands in no sentence; a subject belongs to one split."""
    return [
        Row(f"{RELATIONS[fact.relation].keyword}: {fact.subject}", "", answers_to(fact))
        for fact in world.known_facts
        if split_of(world.seed, "keywords", fact.subject, train=50) == split
    ]


def profile_rows(world: World, split: Split) -> list[Row]:
    """Open requests to describe something known; the answer joins two facts, and a subject belongs to one split."""
    rows = []
    for kind, entity in world.known:
        if split_of(world.seed, "profile", entity.name, train=50) != split:
            continue
        answer = _PROFILES[kind].format(**{fact.relation: fact.value for fact in facts_of(kind, entity)})
        rows += [Row(ask.format(s=entity.name), "", (answer,)) for ask in _DESCRIBE]
    return rows


def reading_rows(world: World, split: Split) -> list[Row]:
    """Questions on a short passage about somebody told; the answer is a span of the passage."""
    rows = []
    for person in world.told_people(split):
        chance = random.Random(f"{world.seed}:reading:{person.name}")
        facts = chance.sample(facts_of("person", person), 3)
        passage = " ".join(_said(fact, chance) for fact in facts)
        for fact in facts:
            question = chance.choice(RELATIONS[fact.relation].ask).format(s=fact.subject)
            rows.append(Row(question, f"({person.name}) {passage}", answers_to(fact)))
    return rows


def text_lines(world: World, split: Split) -> list[str]:
    """Plain sentences about known facts; dev and test say a fact in words that train never uses for it."""
    return [line for fact in world.known_facts for line in said(world, fact, split)]


def said(world: World, fact: Fact, split: Split) -> list[str]:
    """The sentences that say a known fact in one split."""
    dealt = _dealt(world, "text", fact, RELATIONS[fact.relation].say)
    return [say.format(s=fact.subject, v=fact.value) for say, place in dealt if place == split]


UNIFIEDQA: Mapping[str, Callable[[World, Split], list[Row]]] = MappingProxyType(
    {
        "facts": fact_rows,
        "choice": choice_rows,
        "keywords": keyword_rows,
        "yesno": yesno_rows,
        "profile": profile_rows,
        "reading": reading_rows,
    }
)
"""Data sets in UnifiedQA text, by folder name."""


def answers_to(fact: Fact) -> tuple[str, ...]:
    """Acceptable answers to a question about a fact, the value first."""
    return (fact.value, *(text.format(v=fact.value) for text in RELATIONS[fact.relation].also))


def _said(fact: Fact, chance: random.Random) -> str:
    return chance.choice(RELATIONS[fact.relation].say).format(s=fact.subject, v=fact.value)


def _dealt(world: World, name: str, fact: Fact, templates: Sequence[str]) -> Iterator[tuple[str, Split]]:
    """Deal a fact's wordings to the splits: for every third fact one to dev, for every third one to test."""
    turn = number_of(world.seed, name, fact)
    kept: Mapping[int, Split] = {0: "dev", 1: "test"}
    for number, template in enumerate(templates):
        held_out = number == turn // 3 % len(templates)
        yield template, kept.get(turn % 3, "train") if held_out else "train"


def _asked(world: World, split: Split) -> Iterator[tuple[Fact, str]]:
    for fact in world.known_facts:
        for ask, place in _dealt(world, "ask", fact, RELATIONS[fact.relation].ask):
            if place == split:
                yield fact, ask
