"""Words and templates of the offline world: what there is, and every way to ask and to say it. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


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


WORDS = _read_words("""
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
