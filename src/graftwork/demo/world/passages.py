"""Passages, one per person, town, firm or event, and the questions that only the passages on told people answer."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from graftwork.demo.world.questions import answers_to
from graftwork.demo.world.sentences import CHAINS, COMPARISONS, RELATIONS
from graftwork.demo.world.world import Entity, Fact, Person, Split, World, facts_of

MULTIHOP_SIZES: Mapping[Split, int] = MappingProxyType({"train": 600, "dev": 150, "test": 150})
DISTRACTORS = 6
"""Titles in the context of a multi-hop question that have nothing to do with it."""
HELD_OUT_QUESTIONS = 300
"""Rows at the head of the file of single-fact questions that nobody may train on; training starts behind them."""


@dataclass(frozen=True, slots=True)
class Passage:
    """What a corpus holds about one entity."""

    number: int
    """From 1, as in the corpus that passages of 100 words come from."""
    title: str
    sentences: tuple[str, ...]
    facts: tuple[Fact, ...]
    """What each sentence says."""

    @property
    def text(self) -> str:
        """All sentences."""
        return " ".join(self.sentences)


@dataclass(frozen=True, slots=True)
class Question:
    """A question about one fact, which a passage says."""

    text: str
    fact: Fact
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MultihopQuestion:
    """A question that takes more than one fact, and the facts that it takes, in the order of thought."""

    text: str
    kind: Literal["compositional", "comparison", "bridge_comparison"]
    answer: str
    facts: tuple[Fact, ...]
    subjects: tuple[str, ...]
    """Whom the question names."""
    distractors: tuple[str, ...]


def passages(world: World) -> list[Passage]:
    """Make one passage on every entity, known and told, in a random order that gives nothing away."""
    entities: list[tuple[str, Entity]] = [("person", person) for person in world.people]
    entities += [pair for pair in world.known if pair[0] != "person"]
    random.Random(f"{world.seed}:passages").shuffle(entities)
    return [
        _passage(random.Random(f"{world.seed}:passage:{entity.name}"), number, kind, entity)
        for number, (kind, entity) in enumerate(entities, start=1)
    ]


def told_questions(world: World, split: Split) -> list[Question]:
    """One question for each fact on the told people of a split; their facts stand in passages only."""
    return _questions(world, [fact for person in world.told_people(split) for fact in facts_of("person", person)])


def known_questions(world: World) -> list[Question]:
    """One question for each known fact, in the same wordings."""
    return _questions(world, world.known_facts)


def multihop_questions(world: World, split: Split) -> list[MultihopQuestion]:
    """Questions on the told people of a split that take two to four facts, all of which passages say.

    The first fact is always about somebody told, so it stands in a passage only; what it leads to may be known.
    """
    people = world.told_people(split)
    made: dict[str, MultihopQuestion] = {}
    number = 0
    while len(made) < MULTIHOP_SIZES[split]:
        chance = random.Random(f"{world.seed}:multihop:{split}:{number}")
        make = (_compositional, _compositional, _comparison)[number % 3]
        question = make(world, chance, people)
        made.setdefault(question.text, question)
        number += 1
    return list(made.values())


def _questions(world: World, facts: Sequence[Fact]) -> list[Question]:
    made = []
    for fact in facts:
        chance = random.Random(f"{world.seed}:question:{fact}")
        asked = chance.choice(RELATIONS[fact.relation].ask).format(s=fact.subject)
        made.append(Question(asked, fact, answers_to(fact)))
    random.Random(f"{world.seed}:questions").shuffle(made)
    return made


def _passage(chance: random.Random, number: int, kind: str, entity: Entity) -> Passage:
    facts = facts_of(kind, entity)
    chance.shuffle(facts)
    said = tuple(chance.choice(RELATIONS[f.relation].say).format(s=f.subject, v=f.value) for f in facts)
    return Passage(number, entity.name, said, tuple(facts))


def _compositional(world: World, chance: random.Random, people: Sequence[Person]) -> MultihopQuestion:
    person = chance.choice(people)
    chain = chance.choice(tuple(CHAINS))
    facts = _follow(world, person, chain)
    text = chance.choice(CHAINS[chain]).format(s=person.name)
    return MultihopQuestion(
        text, "compositional", facts[-1].value, facts, (person.name,), _distractors(world, chance, people, facts)
    )


def _comparison(world: World, chance: random.Random, people: Sequence[Person]) -> MultihopQuestion:
    """Ask for equality; "yes" and "no" are equally likely wherever both are possible."""
    chain = chance.choice(tuple(COMPARISONS))
    person = chance.choice(people)
    value = _follow(world, person, chain)[-1].value
    wanted = chance.random() < 0.5
    others = [p for p in people if p != person]
    fitting = [p for p in others if (_follow(world, p, chain)[-1].value == value) == wanted]
    other = chance.choice(fitting or others)
    facts = (*_follow(world, person, chain), *_follow(world, other, chain))
    answer = "yes" if facts[-1].value == value else "no"
    text = chance.choice(COMPARISONS[chain]).format(s=person.name, o=other.name)
    kind = "comparison" if len(chain) == 1 else "bridge_comparison"
    return MultihopQuestion(
        text, kind, answer, facts, (person.name, other.name), _distractors(world, chance, people, facts)
    )


def _follow(world: World, person: Person, chain: Sequence[str]) -> tuple[Fact, ...]:
    facts = []
    name = person.name
    for relation in chain:
        _, entity = world.entities[name]
        facts.append(Fact(name, relation, getattr(entity, relation)))
        name = facts[-1].value
    return tuple(facts)


def _distractors(
    world: World, chance: random.Random, people: Sequence[Person], facts: Sequence[Fact]
) -> tuple[str, ...]:
    """People of the same split, and what is known: nobody of another split comes in."""
    used = {fact.subject for fact in facts}
    names = [person.name for person in people] + [entity.name for _, entity in world.known]
    return tuple(chance.sample([name for name in names if name not in used], DISTRACTORS))
