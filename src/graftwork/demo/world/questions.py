"""UnifiedQA questions about the offline world, and plain sentences that state its facts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from graftwork.demo.world.sentences import RELATIONS
from graftwork.demo.world.world import Fact, Split, World, facts_of, number_of, split_of

SEPARATOR = r" \n "
"""Separator between question and context in UnifiedQA format: a backslash and the letter n, not a line break."""
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
    """Question with its acceptable answers; the first one is the target."""

    question: str
    rest: str
    """Answer options or passage; empty for closed-book questions."""
    answers: tuple[str, ...]

    @property
    def input(self) -> str:
        """Model input: question, separator and context."""
        return f"{self.question}{SEPARATOR}{self.rest}" if self.rest else self.question


def fact_rows(world: World, split: Split) -> list[Row]:
    """Closed-book questions about known facts; dev and test use a template that train never uses for the same fact."""
    return [Row(ask.format(s=fact.subject), "", answers_to(fact)) for fact, ask in _asked(world, split)]


def choice_rows(world: World, split: Split) -> list[Row]:
    """Multiple-choice questions about known facts, one correct option of four."""
    rows: list[Row] = []
    for fact, ask in _asked(world, split):
        rng = random.Random(f"{world.seed}:choice:{fact}:{ask}")
        others = [value for value in world.pool(fact.relation) if value != fact.value]
        options = [fact.value, *rng.sample(others, 3)]
        rng.shuffle(options)
        listed = " ".join(f"({letter}) {option}" for letter, option in zip("abcd", options, strict=True))
        rows.append(Row(ask.format(s=fact.subject), listed, (fact.value,)))
    return rows


def yesno_rows(world: World, split: Split) -> list[Row]:
    """Yes/no questions, half of them "yes"; each subject belongs to one split."""
    rows: list[Row] = []
    for fact in world.known_facts:
        if split_of(world.seed, "yesno", fact.subject) != split:
            continue
        for number, check in enumerate(RELATIONS[fact.relation].check):
            rng = random.Random(f"{world.seed}:yesno:{fact}:{number}")
            wrong = rng.choice([value for value in world.pool(fact.relation) if value != fact.value])
            rows.append(Row(check.format(s=fact.subject, v=fact.value), "", ("yes",)))
            rows.append(Row(check.format(s=fact.subject, v=wrong), "", ("no",)))
    return rows


def keyword_rows(world: World, split: Split) -> list[Row]:
    """Known facts queried by a keyword that occurs in no sentence; each subject belongs to one split."""
    return [
        Row(f"{RELATIONS[fact.relation].keyword}: {fact.subject}", "", answers_to(fact))
        for fact in world.known_facts
        if split_of(world.seed, "keywords", fact.subject, train=50) == split
    ]


def profile_rows(world: World, split: Split) -> list[Row]:
    """Requests to describe a known entity, answered by two facts; each subject belongs to one split."""
    rows: list[Row] = []
    for kind, entity in world.known:
        if split_of(world.seed, "profile", entity.name, train=50) != split:
            continue
        answer = _PROFILES[kind].format(**{fact.relation: fact.value for fact in facts_of(kind, entity)})
        rows += [Row(ask.format(s=entity.name), "", (answer,)) for ask in _DESCRIBE]
    return rows


def reading_rows(world: World, split: Split) -> list[Row]:
    """Extractive questions on a short passage about an unseen person; the answer is a span of the passage."""
    rows: list[Row] = []
    for person in world.unseen_people(split):
        rng = random.Random(f"{world.seed}:reading:{person.name}")
        facts = rng.sample(facts_of("person", person), 3)
        passage = " ".join(_sentence(fact, rng) for fact in facts)
        for fact in facts:
            question = rng.choice(RELATIONS[fact.relation].ask).format(s=fact.subject)
            rows.append(Row(question, f"({person.name}) {passage}", answers_to(fact)))
    return rows


def text_lines(world: World, split: Split) -> list[str]:
    """Plain sentences about known facts; dev and test use a template that train never uses for the same fact."""
    return [line for fact in world.known_facts for line in fact_sentences(world, fact, split)]


def fact_sentences(world: World, fact: Fact, split: Split) -> list[str]:
    """Sentences that state a known fact in one split."""
    dealt = _split_templates(world, "text", fact, RELATIONS[fact.relation].say)
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
"""Generators of the UnifiedQA data sets, by folder name."""


def answers_to(fact: Fact) -> tuple[str, ...]:
    """Acceptable answers to a question about a fact; the value comes first."""
    return (fact.value, *(text.format(v=fact.value) for text in RELATIONS[fact.relation].also))


def _sentence(fact: Fact, rng: random.Random) -> str:
    return rng.choice(RELATIONS[fact.relation].say).format(s=fact.subject, v=fact.value)


def _split_templates(world: World, name: str, fact: Fact, templates: Sequence[str]) -> Iterator[tuple[str, Split]]:
    """Assign the templates of a fact to splits: one third of the facts give one to dev, one third give one to test."""
    turn = number_of(world.seed, name, fact)
    kept: Mapping[int, Split] = {0: "dev", 1: "test"}
    for number, template in enumerate(templates):
        held_out = number == turn // 3 % len(templates)
        yield template, kept.get(turn % 3, "train") if held_out else "train"


def _asked(world: World, split: Split) -> Iterator[tuple[Fact, str]]:
    for fact in world.known_facts:
        for ask, place in _split_templates(world, "ask", fact, RELATIONS[fact.relation].ask):
            if place == split:
                yield fact, ask
