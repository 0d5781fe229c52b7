"""Entailment pairs with written reasons: one scene, a sentence about it, and why it follows, may be or cannot be."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from types import MappingProxyType
from typing import Literal

from graftwork.demo.world.sentences import OPPOSITES, REASON, SCENE, WORDS
from graftwork.demo.world.world import Split, World, split_of

Verdict = Literal["entailment", "neutral", "contradiction"]
VERDICTS: tuple[Verdict, ...] = ("entailment", "neutral", "contradiction")
SIZES: Mapping[str, int] = MappingProxyType({"train": 3900, "dev": 300, "test": 300})


@dataclass(frozen=True, slots=True)
class Pair:
    """Two sentences, their relation, and reasons: one in the training split, three in the others."""

    name: str
    premise: str
    hypothesis: str
    verdict: Verdict
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Scene:
    """Somebody does something with an animal; None is left unsaid."""

    trait: str | None
    who: str
    verb: str
    animal: str
    place: str | None

    def __str__(self) -> str:
        who = f"{self.trait} {self.who}" if self.trait else self.who
        where = f" {self.place}" if self.place else ""
        return f"{_article(who)} {self.verb} {_article(self.animal)}{where} ."


@dataclass(frozen=True, slots=True)
class _Twist:
    """Premise and hypothesis, and the wordings of the reason, to be filled with two words."""

    premise: _Scene
    hypothesis: _Scene
    reason: str
    part: str = ""
    whole: str = ""


def pairs(world: World, split: Split) -> list[Pair]:
    """Make the pairs of a split, a third of each verdict.

    The hypothesis alone does not give the verdict away: what it says of the animal, the place or the person has to be
    compared with what the premise says of the same. A premise belongs to one split.
    """
    made: list[Pair] = []
    missing = Counter(dict.fromkeys(VERDICTS, SIZES[split] // len(VERDICTS)))
    for number in count():
        if not missing.total():
            break
        chance = random.Random(f"{world.seed}:pair:{number}")
        verdict = VERDICTS[number % len(VERDICTS)]
        twist = chance.choice(_TWISTS[verdict])(_scene(chance), verdict, chance)
        premise = str(twist.premise)
        if not missing[verdict] or split_of(world.seed, "pair", premise) != split:
            continue
        missing[verdict] -= 1
        wordings = [f"{text.format(part=twist.part, whole=twist.whole)} ." for text in REASON[twist.reason]]
        reasons = (chance.choice(wordings),) if split == "train" else tuple(wordings)
        name = f"{number:06d}.scene#0r1{verdict[0]}"
        made.append(Pair(name, premise, str(twist.hypothesis), verdict, reasons))
    return made


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _scene(chance: random.Random) -> _Scene:
    return _Scene(
        trait=chance.choice(tuple(OPPOSITES)) if chance.random() < 0.5 else None,
        who=chance.choice(WORDS["trade"]),
        verb=chance.choice(SCENE["verb"]),
        animal=chance.choice(SCENE["bird"] + SCENE["beast"]),
        place=chance.choice(SCENE["outside"] + SCENE["inside"]) if chance.random() < 0.5 else None,
    )


def _about_animal(scene: _Scene, verdict: Verdict, chance: random.Random) -> _Twist:
    kind = "bird" if scene.animal in SCENE["bird"] else "beast"
    other = "beast" if kind == "bird" else "bird"
    if verdict == "entailment":
        return _Twist(scene, replace(_less(scene, chance), animal=kind), "covers", scene.animal, kind)
    animal = chance.choice((other, other, chance.choice(SCENE[other])))
    return _Twist(scene, replace(_less(scene, chance), animal=animal), "differs", scene.animal, animal)


def _about_place(scene: _Scene, verdict: Verdict, chance: random.Random) -> _Twist:
    side = chance.choice(("outside", "inside"))
    if verdict == "neutral":
        there = chance.choice((side, side, chance.choice(SCENE[side])))
        premise = replace(scene, place=None)
        return _Twist(premise, replace(_less(premise, chance), place=there), "unsaid", whole=there)
    premise = replace(scene, place=chance.choice(SCENE[side]))
    if verdict == "entailment":
        return _Twist(premise, replace(_less(premise, chance), place=side), "within", premise.place or "", side)
    other = "inside" if side == "outside" else "outside"
    return _Twist(premise, replace(_less(premise, chance), place=other), "without", premise.place or "", other)


def _about_trait(scene: _Scene, verdict: Verdict, chance: random.Random) -> _Twist:
    trait = chance.choice(tuple(OPPOSITES))
    if verdict == "neutral":
        premise = replace(scene, trait=None)
        return _Twist(premise, replace(_less(premise, chance), trait=trait), "unsaid", whole=trait)
    premise = replace(scene, trait=trait)
    if verdict == "entailment":
        return _Twist(premise, replace(_less(premise, chance), trait=trait), "same")
    opposite = OPPOSITES[trait]
    return _Twist(premise, replace(_less(premise, chance), trait=opposite), "opposite", trait, opposite)


def _less(scene: _Scene, chance: random.Random) -> _Scene:
    """Leave something unsaid, which stays true."""
    return replace(
        scene,
        trait=scene.trait if chance.random() < 0.5 else None,
        place=scene.place if chance.random() < 0.5 else None,
    )


_TWISTS: Mapping[Verdict, tuple[Callable[[_Scene, Verdict, random.Random], _Twist], ...]] = MappingProxyType(
    {
        "entailment": (_about_animal, _about_place, _about_trait),
        "neutral": (_about_place, _about_trait),
        "contradiction": (_about_animal, _about_place, _about_trait),
    }
)
