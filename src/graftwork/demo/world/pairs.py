"""Natural language inference pairs with written explanations: entailment, neutral and contradiction."""

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

Label = Literal["entailment", "neutral", "contradiction"]
LABELS: tuple[Label, ...] = ("entailment", "neutral", "contradiction")
SIZES: Mapping[str, int] = MappingProxyType({"train": 3900, "dev": 300, "test": 300})


@dataclass(frozen=True, slots=True)
class Pair:
    """Premise, hypothesis, label and explanations: one in the train split, three in dev and test."""

    name: str
    premise: str
    hypothesis: str
    label: Label
    explanations: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Scene:
    """Scene of a person and an animal; a trait or place of None is not mentioned."""

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
class _Variant:
    """Premise, hypothesis, and the key of the explanation templates with the two words that fill them."""

    premise: _Scene
    hypothesis: _Scene
    explanation: str
    part: str = ""
    whole: str = ""


def pairs(world: World, split: Split) -> list[Pair]:
    """Generate the pairs of a split, one third per label.

    The hypothesis alone does not reveal the label: its animal, place or trait must be compared with that of the
    premise. Each premise belongs to one split.
    """
    made: list[Pair] = []
    missing = Counter(dict.fromkeys(LABELS, SIZES[split] // len(LABELS)))
    for number in count():
        if not missing.total():
            break
        rng = random.Random(f"{world.seed}:pair:{number}")
        label = LABELS[number % len(LABELS)]
        variant = rng.choice(_VARIANTS[label])(_scene(rng), label, rng)
        premise = str(variant.premise)
        if not missing[label] or split_of(world.seed, "pair", premise) != split:
            continue
        missing[label] -= 1
        templates = REASON[variant.explanation]
        candidates = [f"{text.format(part=variant.part, whole=variant.whole)} ." for text in templates]
        explanations = (rng.choice(candidates),) if split == "train" else tuple(candidates)
        name = f"{number:06d}.scene#0r1{label[0]}"
        made.append(Pair(name, premise, str(variant.hypothesis), label, explanations))
    return made


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _scene(rng: random.Random) -> _Scene:
    return _Scene(
        trait=rng.choice(tuple(OPPOSITES)) if rng.random() < 0.5 else None,
        who=rng.choice(WORDS["trade"]),
        verb=rng.choice(SCENE["verb"]),
        animal=rng.choice(SCENE["bird"] + SCENE["beast"]),
        place=rng.choice(SCENE["outside"] + SCENE["inside"]) if rng.random() < 0.5 else None,
    )


def _about_animal(scene: _Scene, label: Label, rng: random.Random) -> _Variant:
    kind = "bird" if scene.animal in SCENE["bird"] else "beast"
    other = "beast" if kind == "bird" else "bird"
    if label == "entailment":
        return _Variant(scene, replace(_shortened(scene, rng), animal=kind), "covers", scene.animal, kind)
    animal = rng.choice((other, other, rng.choice(SCENE[other])))
    return _Variant(scene, replace(_shortened(scene, rng), animal=animal), "differs", scene.animal, animal)


def _about_place(scene: _Scene, label: Label, rng: random.Random) -> _Variant:
    side = rng.choice(("outside", "inside"))
    if label == "neutral":
        there = rng.choice((side, side, rng.choice(SCENE[side])))
        premise = replace(scene, place=None)
        return _Variant(premise, replace(_shortened(premise, rng), place=there), "unsaid", whole=there)
    premise = replace(scene, place=rng.choice(SCENE[side]))
    if label == "entailment":
        return _Variant(premise, replace(_shortened(premise, rng), place=side), "within", premise.place or "", side)
    other = "inside" if side == "outside" else "outside"
    return _Variant(premise, replace(_shortened(premise, rng), place=other), "without", premise.place or "", other)


def _about_trait(scene: _Scene, label: Label, rng: random.Random) -> _Variant:
    trait = rng.choice(tuple(OPPOSITES))
    if label == "neutral":
        premise = replace(scene, trait=None)
        return _Variant(premise, replace(_shortened(premise, rng), trait=trait), "unsaid", whole=trait)
    premise = replace(scene, trait=trait)
    if label == "entailment":
        return _Variant(premise, replace(_shortened(premise, rng), trait=trait), "same")
    opposite = OPPOSITES[trait]
    return _Variant(premise, replace(_shortened(premise, rng), trait=opposite), "opposite", trait, opposite)


def _shortened(scene: _Scene, rng: random.Random) -> _Scene:
    """Drop the trait and the place with probability 1/2 each; the shorter sentence is entailed by the longer one."""
    return replace(
        scene,
        trait=scene.trait if rng.random() < 0.5 else None,
        place=scene.place if rng.random() < 0.5 else None,
    )


_VARIANTS: Mapping[Label, tuple[Callable[[_Scene, Label, random.Random], _Variant], ...]] = MappingProxyType(
    {
        "entailment": (_about_animal, _about_place, _about_trait),
        "neutral": (_about_place, _about_trait),
        "contradiction": (_about_animal, _about_place, _about_trait),
    }
)
