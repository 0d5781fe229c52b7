"""Vocabulary and templates of the offline world. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Relation:
    """Kind of fact with its question and statement templates; {s} is the subject, {v} the value."""

    kind: str
    """Type of the subject: person, place, employer or event."""
    values: str
    """Name of the pool of possible values."""
    keyword: str
    """Name of the relation in keyword questions; no sentence contains it."""
    ask: tuple[str, ...]
    say: tuple[str, ...]
    check: tuple[str, ...]
    """Yes/no question templates."""
    also: tuple[str, ...] = ()
    """Templates of further acceptable answers."""


def _read_words(text: str) -> Mapping[str, tuple[str, ...]]:
    words: dict[str, tuple[str, ...]] = {}
    for line in text.strip().splitlines():
        name, _, listed = line.partition(": ")
        words[name] = (*words.get(name, ()), *listed.split())
    return MappingProxyType(words)


def _read_relations(text: str) -> Mapping[str, Relation]:
    relations: dict[str, Relation] = {}
    for block in text.strip().split("\n\n"):
        head, *lines = block.splitlines()
        name, kind, values, keyword = head.split()
        texts: dict[str, tuple[str, ...]] = {}
        for line in lines:
            key, _, listed = line.partition(": ")
            texts[key] = (*texts.get(key, ()), *listed.split(" | "))
        relations[name] = Relation(kind, values, keyword, **texts)
    return MappingProxyType(relations)


def _read_lists(text: str) -> Mapping[str, tuple[str, ...]]:
    lists: dict[str, tuple[str, ...]] = {}
    for line in text.strip().splitlines():
        name, _, listed = line.partition(": ")
        lists[name] = (*lists.get(name, ()), *listed.split(" | "))
    return MappingProxyType(lists)


def _read_chains(text: str) -> Mapping[tuple[str, ...], tuple[str, ...]]:
    return MappingProxyType({tuple(names.split()): asked for names, asked in _read_lists(text).items()})


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
"""Relations by name; the first line of a block holds name, subject type, value pool and keyword."""

REVIEW = _read_lists("""
thing: music | food | stage | crowd | dance | parade | show | play | bread | band | speech | garden | singer | drummer
thing: contest | prize | supper | story | song | puppet
positive: lovely | splendid | charming | delightful | superb | graceful | wonderful | excellent | pleasant | brilliant
positive: marvellous | perfect | impressive | enchanting | thrilling | clever | witty | elegant | fresh | magnificent
negative: awful | dull | dreadful | shoddy | terrible | boring | shabby | horrible | miserable | disappointing
negative: tiresome | clumsy | lifeless | bleak | stale | pitiful | sloppy | tedious | noisy | wretched
denial: not | never | hardly
opinion: the {thing} was {word} | the {thing} seemed {word} | how {word} the {thing} was | the {thing} looked {word}
opinion: it had that {word} {thing} | the {word} {thing} said it all
opinion: the {thing} was truly {word} | {word} was the {thing}
who: we | everybody | my brother | my aunt | the children | our neighbour
positive-verb: loved | enjoyed | admired | praised | adored | cheered
negative-verb: hated | disliked | mocked | regretted | cursed | fled
positive-end: made us very happy | made everyone happy | was better than ever | was one of the best
positive-end: was good for young and old | was right for every day | was like nothing before | gave us a great time
positive-end: made our year | was all that we want | was great from first to last | was the best story of all
negative-end: made us very sad | made everyone sad | was less than nothing | was the same old story
negative-end: was bad from first to last | was too long by an hour | was not for us | gave us a bad time
negative-end: was nothing new | was no good for anyone | was wrong from the first word | made the whole day long
before: in the end | to my mind | all in all | for us | in short | as always | that day | at noon | in the evening
before: this year | once again | at last
after: in spite of the rain | from start to finish | this time | as my sister said | on both days | at the end
after: to be honest | for the whole hour | until midnight | as far as we could see
fact: the {thing} came from {town} | the {thing} began at noon | the {thing} was near the {river}
fact: i saw the {thing} twice
fact: we walked to the {event} from {town} | you can see the {river} from the {event}
fact: they sold {product} beside the {thing} | the {event} had a {thing} | it rained before the {thing}
fact: people from {town} brought the {thing} | the {event} opened with the {thing} | the {thing} lasted an hour
""")
"""Vocabulary and templates of reviews."""

SCENE = _read_lists("""
verb: feeds | washes | brushes | follows | watches | carries | paints | leads
bird: parrot | duck | goose | owl | canary | pigeon
beast: goat | cat | dog | rabbit | tortoise | horse | donkey | ferret | hedgehog | lizard
outside: in the garden | in the field | by the river | on the hill | in the orchard | on the road
inside: in the kitchen | in the attic | in the cellar | in the barn | in the hall | in the shop
""")
"""Vocabulary of scenes; animals and places are grouped under their hypernym."""

OPPOSITES = MappingProxyType(
    {"young": "old", "old": "young", "happy": "sad", "sad": "happy"}
    | {"tall": "short", "short": "tall", "rich": "poor", "poor": "rich"}
)
"""Mutually exclusive traits."""

REASON = _read_lists("""
same: the first sentence says so | the two sentences agree | it is said in the first sentence
covers: a {part} is a {whole} | every {part} is a {whole} | a {part} is a kind of {whole}
differs: a {part} is not a {whole} | no {part} is a {whole} | a {part} cannot be a {whole}
within: {part} is {whole} | whoever is {part} is {whole} | to be {part} is to be {whole}
without: {part} is not {whole} | whoever is {part} is not {whole} | to be {part} is not to be {whole}
opposite: who is {part} is not {whole} | nobody is {part} and {whole} at once | {part} and {whole} do not go together
unsaid: nothing says {whole} | the first sentence does not say {whole} | {whole} is not said
""")
"""Explanation templates for entailment, contradiction and neutral pairs."""

CHAINS = _read_chains("""
home region: in which region is the town where {s} lives? | which region does the home of {s} belong to?
home river: which river flows through the home of {s}? | what river is the town of {s} on?
home product: what is the home of {s} known for? | what does the town where {s} lives sell?
birthplace region: in which region was {s} born? | what is the region of the birthplace of {s}?
birthplace river: which river flows through the birthplace of {s}? | on which river was {s} born?
birthplace product: what is the birthplace of {s} known for? | what comes from the town where {s} was born?
employer town: in which town is the employer of {s}? | where is the firm that hired {s}?
employer goods: what does the employer of {s} make? | which goods does the firm that hired {s} make?
""")
"""Two-hop question templates; the value of the first relation is the subject of the second."""

COMPARISONS = _read_chains("""
home: do {s} and {o} live in the same town? | is the home of {s} also the home of {o}?
birthplace: were {s} and {o} born in the same town? | do {s} and {o} come from the same town?
trade: do {s} and {o} have the same trade? | did {s} and {o} learn the same trade?
pet: do {s} and {o} keep the same animal? | is the pet of {s} of the same kind as the pet of {o}?
employer: do {s} and {o} work for the same firm? | did the same firm hire {s} and {o}?
home region: do {s} and {o} live in the same region? | are the homes of {s} and {o} in the same region?
birthplace region: were {s} and {o} born in the same region? | do {s} and {o} come from the same region?
employer town: do {s} and {o} work in the same town? | are the firms that hired {s} and {o} in the same town?
""")
"""Comparison question templates over one or two relations: do two people share the value?"""
