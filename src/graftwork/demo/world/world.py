"""A small closed world from a seed: people, towns, employers and events with one value per relation.

Everything offline starts here. People are either *known* (their facts appear in questions and plain text, so a model
can learn them) or *told* (their facts appear in passages only, so a model must read them). `sentences` holds the
templates, `questions`, `reviews`, `pairs`, `articles` and `passages` turn facts into examples, and `writers` puts them
on disk in the formats of real data sets.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import islice, product
from typing import Literal

from graftwork.demo.world.sentences import RELATIONS, WORDS

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")


@dataclass(frozen=True, slots=True)
class Fact:
    """Subject, relation, value."""

    subject: str
    relation: str
    value: str


@dataclass(frozen=True, slots=True)
class Place:
    """A town."""

    name: str
    region: str
    river: str
    product: str


@dataclass(frozen=True, slots=True)
class Employer:
    """A firm in a town."""

    name: str
    town: str
    goods: str


@dataclass(frozen=True, slots=True)
class Event:
    """A yearly event in a town."""

    name: str
    venue: str
    month: str


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody who lives in the world."""

    name: str
    home: str
    birthplace: str
    trade: str
    employer: str
    pet: str
    told: bool
    """True if passages alone speak of this person."""


Entity = Person | Place | Employer | Event


@dataclass(frozen=True)
class World:
    """All that exists, as `build_world` made it."""

    seed: int
    places: tuple[Place, ...]
    employers: tuple[Employer, ...]
    events: tuple[Event, ...]
    people: tuple[Person, ...]

    @property
    def known(self) -> tuple[tuple[str, Entity], ...]:
        """All that questions and plain text speak of, with its kind."""
        known = [person for person in self.people if not person.told]
        groups = (("person", known), ("place", self.places), ("employer", self.employers), ("event", self.events))
        return tuple((kind, entity) for kind, entities in groups for entity in entities)

    @cached_property
    def entities(self) -> Mapping[str, tuple[str, Entity]]:
        """Kind and entity of every name, known or told."""
        told = [("person", person) for person in self.people if person.told]
        return {entity.name: (kind, entity) for kind, entity in (*self.known, *told)}

    @cached_property
    def known_facts(self) -> tuple[Fact, ...]:
        """Facts that questions and plain text speak of."""
        return tuple(fact for kind, entity in self.known for fact in facts_of(kind, entity))

    def told_people(self, split: Split) -> tuple[Person, ...]:
        """People whom only the passages of one split mention."""
        return tuple(p for p in self.people if p.told and split_of(self.seed, p.name) == split)

    def pool(self, relation: str) -> tuple[str, ...]:
        """All values that a relation can take, in a fixed order."""
        values = RELATIONS[relation].values
        if values == "place":
            return tuple(place.name for place in self.places)
        if values == "employer":
            return tuple(employer.name for employer in self.employers)
        return WORDS[values]


def build_world(
    seed: int = 0,
    *,
    known_people: int = 96,
    told_people: int = 640,
    places: int = 24,
    employers: int = 24,
    events: int = 32,
) -> World:
    """Make a world from a seed; equal arguments give equal worlds in every process.

    Args:
        seed: Decides every name and every value.
        known_people: Number of people whose facts questions and plain text speak of.
        told_people: Number of people who appear in passages only, over all splits.
        places: Number of towns.
        employers: Number of firms.
        events: Number of yearly events.

    Returns:
        The world; names are lower-case and unique within their kind.
    """
    chance = random.Random(f"graftwork:{seed}")
    names = iter(invented_names(chance, known_people + places + 96 + 48 + 32))
    known_first, town_names, told_first, last, firm, feast = (
        list(islice(names, count)) for count in (known_people, places, 96, 48, 16, 16)
    )
    # a first name belongs to one known person, which makes what is known easier to learn; those told share theirs
    full_names = [(first, chance.choice(last)) for first in known_first]
    full_names += chance.sample(list(product(told_first, last)), told_people)
    towns = tuple(Place(n, *(chance.choice(WORDS[p]) for p in ("region", "river", "product"))) for n in town_names)
    firms = tuple(
        Employer(f"{a} {b}", chance.choice(town_names), chance.choice(WORDS["goods"]))
        for a, b in chance.sample(list(product(firm, WORDS["firm"])), employers)
    )
    feasts = tuple(
        Event(f"{a} {b}", chance.choice(town_names), chance.choice(WORDS["month"]))
        for a, b in chance.sample(list(product(feast, WORDS["feast"])), events)
    )
    people = tuple(
        Person(
            name=f"{a} {b}",
            home=chance.choice(town_names),
            birthplace=chance.choice(town_names),
            trade=chance.choice(WORDS["trade"]),
            employer=chance.choice(firms).name,
            pet=chance.choice(WORDS["pet"]),
            told=number >= known_people,
        )
        for number, (a, b) in enumerate(full_names)
    )
    return World(seed, towns, firms, feasts, people)


def split_of(seed: int, *key: object, train: int = 70) -> Split:
    """Assign a key to a split for good: `train` percent to train, the rest to dev and test in equal parts."""
    percent = number_of(seed, "split", *key) % 100
    if percent < train:
        return "train"
    return "dev" if percent < (100 + train) / 2 else "test"


def facts_of(kind: str, entity: Entity) -> list[Fact]:
    """All facts whose subject is an entity of a kind."""
    return [Fact(entity.name, name, getattr(entity, name)) for name, r in RELATIONS.items() if r.kind == kind]


def number_of(*key: object) -> int:
    """A number that any key leads to, the same in every process."""
    # hash() differs from process to process, blake2b does not
    return int.from_bytes(blake2b(":".join(map(str, key)).encode(), digest_size=8).digest())


def invented_names(chance: random.Random, count: int) -> list[str]:
    """Names that no language has, all different."""
    shapes = product(
        "bdfghklmnprstv", ("a", "e", "i", "o", "u", "ai", "ou"), ("l", "m", "n", "r", "s", "v", "nd", "rt")
    )
    stems = ["".join(shape) for shape in shapes]
    endings = ("a", "o", "en", "ik", "ow", "is")
    return [stem + chance.choice(endings) for stem in chance.sample(stems, count)]
