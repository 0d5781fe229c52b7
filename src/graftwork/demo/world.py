"""A small closed world from a seed, and writers that put it on disk in the formats of real data sets.

Everything offline starts here. The world is people, towns, employers and events with one value per relation; sentences
and questions come from templates. People are either *known* (their facts appear in questions and plain text, so a model
can learn them) or *told* (their facts appear in passages only, so a model must read them).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from itertools import islice, product
from pathlib import Path
from types import MappingProxyType
from typing import Literal

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")
SEPARATOR = r" \n "
"""Joins question and rest in UnifiedQA text: a backslash and the letter n, not a line break."""


@dataclass(frozen=True, slots=True)
class Relation:
    """One kind of fact and all the ways to speak of it; {s} is the subject, {v} the value."""

    kind: str
    """What the subject is: person, place, employer or event."""
    values: str
    """Name of the pool that holds the values."""
    keyword: str
    """A word for the relation that no sentence uses."""
    ask: tuple[str, ...]
    say: tuple[str, ...]
    check: tuple[str, ...]
    """Questions that yes or no answers."""
    also: tuple[str, ...] = ()
    """Other acceptable answers."""


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


@dataclass(frozen=True)
class World:
    """All that exists, as `build_world` made it."""

    seed: int
    places: tuple[Place, ...]
    employers: tuple[Employer, ...]
    events: tuple[Event, ...]
    people: tuple[Person, ...]

    @property
    def known(self) -> tuple[tuple[str, Person | Place | Employer | Event], ...]:
        """All that questions and plain text speak of, with its kind."""
        known = [person for person in self.people if not person.told]
        groups = (("person", known), ("place", self.places), ("employer", self.employers), ("event", self.events))
        return tuple((kind, entity) for kind, entities in groups for entity in entities)

    @cached_property
    def known_facts(self) -> tuple[Fact, ...]:
        """Facts that questions and plain text speak of."""
        return tuple(fact for kind, entity in self.known for fact in _facts_of(kind, entity))

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
        return _WORDS[values]


def _read_words(text: str) -> Mapping[str, tuple[str, ...]]:
    words: dict[str, tuple[str, ...]] = {}
    for line in text.strip().splitlines():
        name, _, listed = line.partition(": ")
        words[name] = (*words.get(name, ()), *listed.split())
    return MappingProxyType(words)


def _read_relations(text: str) -> Mapping[str, Relation]:
    relations = {}
    for block in text.strip().split("\n\n"):
        head, *lines = block.splitlines()
        name, kind, values, keyword = head.split()
        texts: dict[str, tuple[str, ...]] = {}
        for line in lines:
            key, _, listed = line.partition(": ")
            texts[key] = (*texts.get(key, ()), *listed.split(" | "))
        relations[name] = Relation(kind, values, keyword, **texts)
    return MappingProxyType(relations)


_WORDS = _read_words("""
region: northmark southmark eastmark westmark midland coastland highland lakeland
river: ambe brell cador drune esk fenwater garle hollow isen jarrow kell lorne
product: honey cheese salt wool copper glass lace cider pottery silver marble tea timber pearls saffron paper
goods: boats clocks candles ropes lamps barrels hats gloves bells kites chairs needles mirrors wheels drums maps
month: january february march april may june july august september october november december
trade: baker tailor smith potter weaver carpenter miller painter printer gardener sailor teacher doctor lawyer
trade: cook mason fisher hunter shepherd barber glazier tanner dyer cooper
pet: goat cat dog parrot rabbit tortoise horse donkey duck goose owl ferret hedgehog canary lizard pigeon
firm: mill works forge yard press house
feast: fair feast race parade market concert
""")

RELATIONS = _read_relations("""
home person place address
ask: where does {s} live? | in which town does {s} live? | what is the home of {s}? | which town does {s} call home?
ask: name the town where {s} lives. | where is the house of {s}?
say: {s} lives in {v}. | the home of {s} is {v}. | {v} is where {s} lives. | the house of {s} stands in {v}.
check: does {s} live in {v}? | is {v} the home of {s}?
also: in {v}

birthplace person place origin
ask: where was {s} born? | in which town was {s} born? | what is the birthplace of {s}?
ask: which town did {s} come from? | name the town where {s} was born. | where did the life of {s} begin?
say: {s} was born in {v}. | the birthplace of {s} is {v}. | {v} is where {s} was born. | the life of {s} began in {v}.
check: was {s} born in {v}? | is {v} the birthplace of {s}?
also: in {v}

trade person trade profession
ask: what does {s} do for a living? | what is the trade of {s}? | what work does {s} do? | which trade did {s} learn?
ask: name the trade of {s}. | what is {s} by trade?
say: {s} is a {v}. | the trade of {s} is that of a {v}. | {s} learned to be a {v}. | {s} earns money as a {v}.
check: is {s} a {v}? | does {s} earn money as a {v}?
also: a {v} | as a {v}

employer person employer boss
ask: who does {s} work for? | which firm does {s} work for? | what is the employer of {s}?
ask: who pays the wages of {s}? | name the employer of {s}. | which firm hired {s}?
say: {s} works for {v}. | the employer of {s} is {v}. | {v} pays the wages of {s}. | {v} hired {s}.
check: does {s} work for {v}? | did {v} hire {s}?
also: for {v}

pet person pet companion
ask: which animal does {s} keep? | what pet does {s} have? | what is the pet of {s}? | which animal belongs to {s}?
ask: name the pet of {s}. | what animal does {s} feed every day?
say: {s} keeps a {v}. | the pet of {s} is a {v}. | {s} feeds a {v} every day. | a {v} belongs to {s}.
check: does {s} keep a {v}? | is the pet of {s} a {v}?
also: a {v}

region place region county
ask: in which region is {s}? | which region does {s} belong to? | what is the region of {s}? | name the region of {s}.
say: {s} is a town in {v}. | {s} belongs to {v}. | the region of {s} is {v}.
check: is {s} in {v}?
also: in {v}

river place river stream
ask: which river flows through {s}? | what river is {s} on? | what is the river of {s}? | name the river of {s}.
say: the {v} flows through {s}. | {s} is on the river {v}. | the river of {s} is the {v}.
check: does the {v} flow through {s}?
also: the {v} | the river {v}

product place product speciality
ask: what is {s} known for? | what does {s} sell? | what comes from {s}? | name the product of {s}.
say: {s} is known for {v}. | {s} sells {v}. | the best {v} comes from {s}.
check: is {s} known for {v}?

town employer place site
ask: where is {s}? | in which town is {s}? | what is the town of {s}? | name the town of {s}.
say: {s} is a firm in {v}. | the town of {s} is {v}. | {v} is where {s} is.
check: is {s} a firm in {v}?
also: in {v}

goods employer goods wares
ask: what does {s} make? | which goods does {s} make? | what are the goods of {s}? | name the goods of {s}.
say: {s} makes {v}. | the goods of {s} are {v}. | people buy {v} from {s}.
check: does {s} make {v}?

venue event place setting
ask: where is the {s} held? | which town holds the {s}? | what is the venue of the {s}? | name the venue of the {s}.
say: the {s} is held in {v}. | {v} holds the {s}. | the venue of the {s} is {v}.
check: is the {s} held in {v}?
also: in {v}

month event month date
ask: when is the {s} held? | in which month is the {s}? | what is the month of the {s}? | name the month of the {s}.
say: the {s} takes place in {v}. | in {v} people go to the {s}. | the month of the {s} is {v}.
check: does the {s} take place in {v}?
also: in {v}
""")
"""All kinds of fact by name; the first line of a block says name, subject, values and keyword."""

_DESCRIBE = ("describe {s}.", "tell me about {s}.", "what should one know about {s}?")
_PROFILES: Mapping[str, str] = MappingProxyType(
    {
        "person": "a {trade} from {birthplace}",
        "place": "a town in {region} known for {product}",
        "employer": "a firm in {town} that makes {goods}",
        "event": "held in {venue} in {month}",
    }
)


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
    names = iter(_invented_names(chance, known_people + places + 96 + 48 + 32))
    known_first, town_names, told_first, last, firm, feast = (
        list(islice(names, count)) for count in (known_people, places, 96, 48, 16, 16)
    )
    # a first name belongs to one known person, which makes what is known easier to learn; those told share theirs
    full_names = [(first, chance.choice(last)) for first in known_first]
    full_names += chance.sample(list(product(told_first, last)), told_people)
    towns = tuple(Place(n, *(chance.choice(_WORDS[p]) for p in ("region", "river", "product"))) for n in town_names)
    firms = tuple(
        Employer(f"{a} {b}", chance.choice(town_names), chance.choice(_WORDS["goods"]))
        for a, b in chance.sample(list(product(firm, _WORDS["firm"])), employers)
    )
    feasts = tuple(
        Event(f"{a} {b}", chance.choice(town_names), chance.choice(_WORDS["month"]))
        for a, b in chance.sample(list(product(feast, _WORDS["feast"])), events)
    )
    people = tuple(
        Person(
            name=f"{a} {b}",
            home=chance.choice(town_names),
            birthplace=chance.choice(town_names),
            trade=chance.choice(_WORDS["trade"]),
            employer=chance.choice(firms).name,
            pet=chance.choice(_WORDS["pet"]),
            told=number >= known_people,
        )
        for number, (a, b) in enumerate(full_names)
    )
    return World(seed, towns, firms, feasts, people)


def split_of(seed: int, *key: object, train: int = 70) -> Split:
    """Assign a key to a split for good: `train` percent to train, the rest to dev and test in equal parts."""
    percent = _number(seed, "split", *key) % 100
    if percent < train:
        return "train"
    return "dev" if percent < (100 + train) / 2 else "test"


def fact_rows(world: World, split: Split) -> list[Row]:
    """Closed-book questions: dev and test ask for known facts in a wording that train never uses for that fact."""
    return [Row(ask.format(s=fact.subject), "", _answers(fact)) for fact, ask in _asked(world, split)]


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
        Row(f"{RELATIONS[fact.relation].keyword}: {fact.subject}", "", _answers(fact))
        for fact in world.known_facts
        if split_of(world.seed, "keywords", fact.subject, train=50) == split
    ]


def profile_rows(world: World, split: Split) -> list[Row]:
    """Open requests to describe something known; the answer joins two facts, and a subject belongs to one split."""
    rows = []
    for kind, entity in world.known:
        if split_of(world.seed, "profile", entity.name, train=50) != split:
            continue
        answer = _PROFILES[kind].format(**{fact.relation: fact.value for fact in _facts_of(kind, entity)})
        rows += [Row(ask.format(s=entity.name), "", (answer,)) for ask in _DESCRIBE]
    return rows


def reading_rows(world: World, split: Split) -> list[Row]:
    """Questions on a short passage about somebody told; the answer is a span of the passage."""
    rows = []
    for person in world.told_people(split):
        chance = random.Random(f"{world.seed}:reading:{person.name}")
        facts = chance.sample(_facts_of("person", person), 3)
        passage = " ".join(_said(fact, chance) for fact in facts)
        for fact in facts:
            question = chance.choice(RELATIONS[fact.relation].ask).format(s=fact.subject)
            rows.append(Row(question, f"({person.name}) {passage}", _answers(fact)))
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


def write_unifiedqa(world: World, out: Path) -> list[Path]:
    """Write `unifiedqa/<dataset>/<split>.tsv` and `<split>_ans.jsonl` below a folder.

    Returns:
        The TSV files.
    """
    written = []
    for name, rows_of in UNIFIEDQA.items():
        folder = out / "unifiedqa" / name
        for split in SPLITS:
            rows = rows_of(world, split)
            _write_lines(folder / f"{split}_ans.jsonl", [json.dumps(row.answers) for row in rows])
            written.append(_write_lines(folder / f"{split}.tsv", [f"{row.input}\t{row.answers[0]}" for row in rows]))
    return written


def write_text(world: World, out: Path) -> list[Path]:
    """Write `text/train.txt` and `text/dev.txt` below a folder, one sentence a line."""
    return [_write_lines(out / "text" / f"{split}.txt", text_lines(world, split)) for split in ("train", "dev")]


def write_world(world: World, out: Path) -> list[Path]:
    """Write every format below a folder."""
    return [path for write in (write_unifiedqa, write_text) for path in write(world, out)]


def _write_lines(path: Path, lines: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    return path


def _number(*key: object) -> int:
    # hash() differs from process to process, blake2b does not
    return int.from_bytes(blake2b(":".join(map(str, key)).encode(), digest_size=8).digest())


def _invented_names(chance: random.Random, count: int) -> list[str]:
    shapes = product(
        "bdfghklmnprstv", ("a", "e", "i", "o", "u", "ai", "ou"), ("l", "m", "n", "r", "s", "v", "nd", "rt")
    )
    stems = ["".join(shape) for shape in shapes]
    endings = ("a", "o", "en", "ik", "ow", "is")
    return [stem + chance.choice(endings) for stem in chance.sample(stems, count)]


def _facts_of(kind: str, entity: Person | Place | Employer | Event) -> list[Fact]:
    return [Fact(entity.name, name, getattr(entity, name)) for name, r in RELATIONS.items() if r.kind == kind]


def _answers(fact: Fact) -> tuple[str, ...]:
    return (fact.value, *(text.format(v=fact.value) for text in RELATIONS[fact.relation].also))


def _said(fact: Fact, chance: random.Random) -> str:
    return chance.choice(RELATIONS[fact.relation].say).format(s=fact.subject, v=fact.value)


def _dealt(world: World, name: str, fact: Fact, templates: Sequence[str]) -> Iterator[tuple[str, Split]]:
    """Deal a fact's wordings to the splits: for every third fact one to dev, for every third one to test."""
    turn = _number(world.seed, name, fact)
    kept: Mapping[int, Split] = {0: "dev", 1: "test"}
    for number, template in enumerate(templates):
        held_out = number == turn // 3 % len(templates)
        yield template, kept.get(turn % 3, "train") if held_out else "train"


def _asked(world: World, split: Split) -> Iterator[tuple[Fact, str]]:
    for fact in world.known_facts:
        for ask, place in _dealt(world, "ask", fact, RELATIONS[fact.relation].ask):
            if place == split:
                yield fact, ask
