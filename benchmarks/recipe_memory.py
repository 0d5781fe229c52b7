"""Write the estimated memory of every recipe into its file: `python benchmarks/recipe_memory.py [NAME…]`.

The figures are those of `graftwork estimate RECIPE`. Where a training does not fit into the memory that its model size
is meant for, the batch of one device is lowered and the accumulation raised by the same factor; where not even one row
fits, the line names the number of devices.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from graftwork.pipeline.estimation.fitting import RESERVE

RECIPES = Path(__file__).parent.parent / "src" / "graftwork" / "recipes"
SMALL, LARGE = 24e9, 80e9
"""Memory of one device in bytes, for models of up to 1.5 billion parameters and for larger ones."""
LABEL = "# Memory:  "


@dataclass(frozen=True)
class Figures:
    """Memory of one recipe in bytes, with the batch that it was estimated for."""

    training: int | None
    evaluation: int | None
    batch: int
    devices: int
    memory: float

    def line(self) -> str:
        """Comment of the recipe's file."""
        parts = []
        if self.training is not None:
            parts.append(f"training {self.training / 1e9:.1f} GB")
        if self.evaluation is not None:
            parts.append(f"evaluation {self.evaluation / 1e9:.1f} GB")
        where = "one device" if self.devices == 1 else f"{self.devices} devices with the weights sharded"
        return f"{LABEL} {', '.join(parts)} (estimated): {where} of {self.memory / 1e9:.0f} GB"


def figures(name: str) -> Figures:
    """Estimate a recipe, with the largest batch per device that divides its own and fits."""
    from graftwork.pipeline.estimation.estimate import Estimator, Shape
    from graftwork.pipeline.estimation.plans import plan_of
    from graftwork.settings.recipe import load_recipe

    recipe, plan = load_recipe(name), plan_of(name)
    classes = ("no", "yes") if name.startswith("cald/") else plan.labels
    estimator = Estimator(plan.model, Shape("cuda", plan.dtype, classes))
    evaluation = parameters = None
    if recipe.evaluate is not None:
        parameters, memory, _ = estimator.inference(plan.methods, plan.evaluate)
        evaluation = memory.peak
    training, batch = None, plan.train.per_device_train_batch_size
    limit = SMALL if (parameters or 0) < 1.5e9 else LARGE
    if recipe.train is not None:
        training = peak(estimator, plan.methods, plan.train)
        while training > limit * (1 - RESERVE) and batch > 1:
            batch = max(size for size in range(1, batch) if batch % size == 0)
            lowered = replace(plan.train, per_device_train_batch_size=batch)
            # with a token budget, the accumulation follows from it
            if plan.train.tokens_per_batch is None:
                lowered = replace(lowered, gradient_accumulation_steps=plan.train.sequences_per_step // batch)
            training = peak(estimator, plan.methods, lowered)
    highest = max(training or 0, evaluation or 0)
    return Figures(training, evaluation, batch, -(-highest // int(limit * (1 - RESERVE))), limit)


def peak(estimator: Any, methods: Any, settings: Any) -> int:
    """Return the highest peak of a training, in bytes."""
    memory = estimator.training(methods, settings)[2]
    return 0 if memory is None else memory.peak


def rewritten(text: str, found: Figures) -> str:
    """Put the figures into the text of a recipe: its comment, its batch per device and its accumulation."""
    lines = [line for line in text.splitlines() if not line.startswith(LABEL)]
    start = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    lines.insert(start, found.line())
    text = "\n".join(lines) + "\n"
    before = re.search(r"per_device_train_batch_size: (\d+)", text)
    if before and int(before[1]) != found.batch:
        times = int(before[1]) // found.batch
        text = text.replace(before[0], f"per_device_train_batch_size: {found.batch}")
        text = re.sub(r"(gradient_accumulation_steps: )(\d+)", lambda match: f"{match[1]}{int(match[2]) * times}", text)
    return text


def signature(text: str) -> str:
    """Settings that decide the memory, without comments, names of tasks and published numbers."""
    kept = re.split(r"\n(?:published|over|seed):", re.sub(r"(?m)^#.*\n", "", text))[0]
    ignored = "tasks|select|bank|teacher|split|learning_rate|max_steps|num_train_epochs|save_steps|limit"
    return re.sub(rf"(?m)^ +(?:- .*|(?:{ignored}):.*)\n?", "", kept)


def main() -> None:
    """Rewrite all recipes, or those whose names match one of the patterns given."""
    patterns = sys.argv[1:] or ["*"]
    known: dict[str, Figures] = {}
    for path in sorted(RECIPES.rglob("*.yaml")):
        name = f"{path.parent.name}/{path.stem}"
        if any(fnmatch(name, pattern) for pattern in patterns):
            text = path.read_text(encoding="utf-8")
            key = f"{path.parent.name} {signature(text)}"
            if key not in known:
                known[key] = figures(name)
            path.write_text(rewritten(text, known[key]), encoding="utf-8")
            print(name, known[key].line(), flush=True)


if __name__ == "__main__":
    main()
