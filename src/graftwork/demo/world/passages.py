"""Passages, one per entity, and the questions about unseen people, which only passages answer."""

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
"""Number of unrelated titles in the context of a multi-hop question."""
HELD_OUT_QUESTIONS = 300
"""Number of rows at the start of the single-fact question file reserved for evaluation; train rows follow them."""


@dataclass(frozen=True, slots=True)
class Passage:
    """Passage about one entity."""

    number: int
    """Id in the corpus, starting at 1 as in DPR's `psgs_w100.tsv`."""
    title: str
    sentences: tuple[str, ...]
    facts: tuple[Fact, ...]
    """Fact stated by each sentence."""

    @property
    def text(self) -> str:
        """All sentences, joined by spaces."""
        return " ".join(self.sentences)


@dataclass(frozen=True, slots=True)
class Question:
    """Question about one fact that is stated in a passage."""

    text: str
    fact: Fact
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MultihopQuestion:
    """Question that needs several facts; `facts` lists them in reasoning order."""

    text: str
    kind: Literal["compositional", "comparison", "bridge_comparison"]
    answer: str
    facts: tuple[Fact, ...]
    subjects: tuple[str, ...]
    """Names of the people in the question."""
    distractors: tuple[str, ...]


def passages(world: World) -> list[Passage]:
    """Generate one passage per entity, known and unseen, shuffled so that the order carries no information."""
    entities: list[tuple[str, Entity]] = [("person", person) for person in world.people]
    entities += [pair for pair in world.known if pair[0] != "person"]
    random.Random(f"{world.seed}:passages").shuffle(entities)
    return [
        _passage(random.Random(f"{world.seed}:passage:{entity.name}"), number, kind, entity)
        for number, (kind, entity) in enumerate(entities, start=1)
    ]


def unseen_questions(world: World, split: Split) -> list[Question]:
    """Generate one question per fact about the unseen people of a split, whose facts appear in passages only."""
    return _questions(world, [fact for person in world.unseen_people(split) for fact in facts_of("person", person)])


def known_questions(world: World) -> list[Question]:
    """Generate one question per known fact, from the same templates."""
    return _questions(world, world.known_facts)


def multihop_questions(world: World, split: Split) -> list[MultihopQuestion]:
    """Generate questions about the unseen people of a split that need two to four facts, all of them in passages.

    The first fact is always about an unseen person and appears in a passage only; later facts may be known.
    """
    people = world.unseen_people(split)
    made: dict[str, MultihopQuestion] = {}
    number = 0
    while len(made) < MULTIHOP_SIZES[split]:
        rng = random.Random(f"{world.seed}:multihop:{split}:{number}")
        make = (_compositional, _compositional, _comparison)[number % 3]
        question = make(world, rng, people)
        made.setdefault(question.text, question)
        number += 1
    return list(made.values())


def _questions(world: World, facts: Sequence[Fact]) -> list[Question]:
    made: list[Question] = []
    for fact in facts:
        rng = random.Random(f"{world.seed}:question:{fact}")
        text = rng.choice(RELATIONS[fact.relation].ask).format(s=fact.subject)
        made.append(Question(text, fact, answers_to(fact)))
    random.Random(f"{world.seed}:questions").shuffle(made)
    return made


def _passage(rng: random.Random, number: int, kind: str, entity: Entity) -> Passage:
    facts = facts_of(kind, entity)
    rng.shuffle(facts)
    sentences = tuple(rng.choice(RELATIONS[f.relation].say).format(s=f.subject, v=f.value) for f in facts)
    return Passage(number, entity.name, sentences, tuple(facts))


def _compositional(world: World, rng: random.Random, people: Sequence[Person]) -> MultihopQuestion:
    person = rng.choice(people)
    chain = rng.choice(tuple(CHAINS))
    facts = _follow(world, person, chain)
    text = rng.choice(CHAINS[chain]).format(s=person.name)
    return MultihopQuestion(
        text, "compositional", facts[-1].value, facts, (person.name,), _distractors(world, rng, people, facts)
    )


def _comparison(world: World, rng: random.Random, people: Sequence[Person]) -> MultihopQuestion:
    """Generate an equality question; "yes" and "no" are equally likely wherever both are possible."""
    chain = rng.choice(tuple(COMPARISONS))
    person = rng.choice(people)
    value = _follow(world, person, chain)[-1].value
    wanted = rng.random() < 0.5
    others = [p for p in people if p != person]
    fitting = [p for p in others if (_follow(world, p, chain)[-1].value == value) == wanted]
    other = rng.choice(fitting or others)
    facts = (*_follow(world, person, chain), *_follow(world, other, chain))
    answer = "yes" if facts[-1].value == value else "no"
    text = rng.choice(COMPARISONS[chain]).format(s=person.name, o=other.name)
    kind = "comparison" if len(chain) == 1 else "bridge_comparison"
    return MultihopQuestion(
        text, kind, answer, facts, (person.name, other.name), _distractors(world, rng, people, facts)
    )


def _follow(world: World, person: Person, chain: Sequence[str]) -> tuple[Fact, ...]:
    facts: list[Fact] = []
    name = person.name
    for relation in chain:
        _, entity = world.entities[name]
        facts.append(Fact(name, relation, getattr(entity, relation)))
        name = facts[-1].value
    return tuple(facts)


def _distractors(world: World, rng: random.Random, people: Sequence[Person], facts: Sequence[Fact]) -> tuple[str, ...]:
    """Sample unrelated titles among the unseen people of the same split and the known entities."""
    used = {fact.subject for fact in facts}
    names = [person.name for person in people] + [entity.name for _, entity in world.known]
    return tuple(rng.sample([name for name in names if name not in used], DISTRACTORS))
