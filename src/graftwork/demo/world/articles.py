"""Short articles about the known entities of the offline world: people, towns, firms and events."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from graftwork.demo.world.sentences import RELATIONS
from graftwork.demo.world.world import Entity, Fact, Split, World, facts_of

EDITIONS: Mapping[Split, int] = MappingProxyType({"train": 6, "dev": 1, "test": 1})
"""Number of articles per entity in each split; they state the same facts with other templates, in another order."""


@dataclass(frozen=True, slots=True)
class Article:
    """Title and sentences; punctuation is separated by spaces."""

    title: str
    sentences: tuple[str, ...]


def articles(world: World, split: Split) -> list[Article]:
    """Generate the articles of a split in random order; unseen people appear in none of them."""
    made: list[Article] = []
    for edition in range(EDITIONS[split]):
        for kind, entity in world.known:
            rng = random.Random(f"{world.seed}:article:{split}:{edition}:{entity.name}")
            made.append(_article(world, rng, kind, entity))
    random.Random(f"{world.seed}:articles:{split}").shuffle(made)
    return made


def _article(world: World, rng: random.Random, kind: str, entity: Entity) -> Article:
    """Facts of the entity first, then up to five facts of the towns and firms that they mention."""
    facts = facts_of(kind, entity)
    rng.shuffle(facts)
    linked = [name for name in dict.fromkeys(fact.value for fact in facts) if name in world.entities]
    more = [fact for name in linked for fact in facts_of(*world.entities[name])]
    chosen = facts + rng.sample(more, min(len(more), 5))
    return Article(entity.name, tuple(_sentence(rng, fact) for fact in chosen))


def _sentence(rng: random.Random, fact: Fact) -> str:
    sentence = rng.choice(RELATIONS[fact.relation].say).format(s=fact.subject, v=fact.value)
    return f"{sentence.removesuffix('.')} ."
