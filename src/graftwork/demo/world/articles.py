"""Running text about what is known in the offline world: one short article per person, town, firm or event."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from graftwork.demo.world.sentences import RELATIONS
from graftwork.demo.world.world import Entity, Fact, Split, World, facts_of

EDITIONS: Mapping[Split, int] = MappingProxyType({"train": 6, "dev": 1, "test": 1})
"""Articles on one entity in each split; they say the same facts in other words and another order."""


@dataclass(frozen=True, slots=True)
class Article:
    """A title and sentences, punctuation set off by blanks."""

    title: str
    sentences: tuple[str, ...]


def articles(world: World, split: Split) -> list[Article]:
    """Make the articles of a split, in random order; people who are told of appear in none."""
    made = []
    for edition in range(EDITIONS[split]):
        for kind, entity in world.known:
            chance = random.Random(f"{world.seed}:article:{split}:{edition}:{entity.name}")
            made.append(_article(world, chance, kind, entity))
    random.Random(f"{world.seed}:articles:{split}").shuffle(made)
    return made


def _article(world: World, chance: random.Random, kind: str, entity: Entity) -> Article:
    """The entity's own facts first, then those of the towns and firms that they lead to."""
    facts = facts_of(kind, entity)
    chance.shuffle(facts)
    linked = [name for name in dict.fromkeys(fact.value for fact in facts) if name in world.entities]
    more = [fact for name in linked for fact in facts_of(*world.entities[name])]
    chosen = facts + chance.sample(more, min(len(more), 5))
    return Article(entity.name, tuple(_sentence(chance, fact) for fact in chosen))


def _sentence(chance: random.Random, fact: Fact) -> str:
    said = chance.choice(RELATIONS[fact.relation].say).format(s=fact.subject, v=fact.value)
    return f"{said.removesuffix('.')} ."
