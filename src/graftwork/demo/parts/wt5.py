"""The demonstration of explained predictions: what some explained reviews and some explained pairs teach."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from graftwork.core.run_folder import RunFolder
from graftwork.demo import shipped_model
from graftwork.demo.parts.part import Part, Stage, Summary
from graftwork.methods.wt5 import WT5
from graftwork.metrics.results import Results
from graftwork.pipeline.evaluation import evaluate
from graftwork.pipeline.loading import load
from graftwork.pipeline.runner import run_recipe
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.recipe import RunConfig, label
from graftwork.settings.training import TrainingSettings

MODEL = "encoder_decoder"


@dataclass(frozen=True)
class Experiment:
    """One data set of the offline world, and how long its examples are."""

    name: str
    mixture: str
    """Name of the mixtures, with a gap for the number of explained examples."""
    counts: tuple[int, ...]
    task: str
    steps: int
    learning_rate: float
    max_input_tokens: int
    max_target_tokens: int
    score: str
    """The metric of reasons."""

    def point(self, count: int) -> dict[str, str]:
        """The setting of a number of explained examples."""
        return {"train.mixture": self.mixture.format(count)}


REVIEWS = Experiment(
    "reviews",
    "movie_rationales_{}_explanations",
    (100, 1000),
    "movie_rationales_eval_v010",
    500,
    1e-2,
    80,
    40,
    "token_f1",
)
PAIRS = Experiment("pairs", "world/pairs_{}_explanations", (1000,), "esnli_eval_v010", 350, 1e-2, 40, 24, "bleu")


class WT5Part(Part):
    """Labels and reasons against the number of explained examples."""

    method = "wt5"
    intro = (
        "A tiny T5 learns to judge reviews of invented events and to mark the words that it judges by, and to say how "
        "two sentences relate and why. Only some of its training examples have a reason; the others have their label "
        "alone. Scores are of held-out examples, and beside them stands what random spans of the right number and "
        "length would reach. Constrained generation can write nothing but a label and words of the text, so that "
        "every span is found by construction; whether it is a good one is another question."
    )

    def stages(self) -> Sequence[Stage]:
        """Training on reviews and on pairs, and the reviews once more with constrained answers."""
        counts = ", ".join(map(str, REVIEWS.counts))
        return (
            Stage(f"fine-tuning on reviews of which {counts} have their reasons marked", lambda: self._learn(REVIEWS)),
            Stage("answering once more, held to labels and words of the text", self._constrain),
            Stage(
                f"fine-tuning on sentence pairs of which {PAIRS.counts[0]} have a written reason",
                lambda: self._learn(PAIRS),
            ),
        )

    def runs(self) -> Sequence[RunFolder]:
        """Reviews and pairs."""
        return self._run(REVIEWS), self._run(PAIRS)

    def summary(self) -> Summary:
        """Labels and reasons of both."""
        most = REVIEWS.counts[-1]
        free, held = self.scores(REVIEWS, most), self.scores(REVIEWS, most, constrained=True)
        pairs = self.scores(PAIRS, PAIRS.counts[-1])
        seconds = sum(
            phase["train_runtime"]
            for experiment in (REVIEWS, PAIRS)
            for count in experiment.counts
            for phase in Results.read(self._single(experiment, count).results_file).training.values()
        )
        return Summary(
            changed="nothing in the model; the word explain before an input asks for a reason behind the label",
            cost=f"{len(REVIEWS.counts) + len(PAIRS.counts)} trainings, {seconds:.0f} s in all; a reason takes some "
            "more words to generate",
            gained=f"with {most} explained reviews, {_number(free['accuracy'])} % of the labels are right, "
            f"{_number(free['spans_found'])} % of the marked spans stand in the text ({_number(held['spans_found'])} % "
            f"constrained), and their token F1 is {_number(free['token_f1'])}, against "
            f"{_number(free['chance_token_f1'])} of random spans; reasons for sentence pairs reach a BLEU of "
            f"{_number(pairs['bleu'])}",
            table=[self._row(experiment, count) for experiment in (REVIEWS, PAIRS) for count in experiment.counts],
        )

    def scores(self, experiment: Experiment, count: int, *, constrained: bool = False) -> Mapping[str, float]:
        """What one training reached on held-out examples."""
        point: dict[str, object] = dict(experiment.point(count))
        if constrained:
            point["method.constrained"] = True
        return Results.read(self._run(experiment).results_file).scores(experiment.task, label(point))

    def _run(self, experiment: Experiment) -> RunFolder:
        return RunFolder(self.folder / experiment.name)

    def _single(self, experiment: Experiment, count: int) -> RunFolder:
        """Where the recipe puts the run of one point."""
        return RunFolder(self._run(experiment).path / label(experiment.point(count)).replace("/", "_"))

    def _evaluation(self, experiment: Experiment) -> EvaluationSettings:
        return EvaluationSettings(
            tasks=(experiment.task,),
            split="validation",
            max_input_tokens=experiment.max_input_tokens,
            max_new_tokens=experiment.max_target_tokens,
            batch_size=100,
            limit=6 if self.quick else None,
        )

    def recipe(self, experiment: Experiment) -> RunConfig:
        """The run of one experiment, over all numbers of explained examples."""
        training = TrainingSettings(
            mixture=experiment.mixture.format(experiment.counts[0]),
            max_steps=2 if self.quick else experiment.steps,
            per_device_train_batch_size=32,
            optim="adafactor",
            learning_rate=experiment.learning_rate,
            warmup_steps=50,
            lr_scheduler_type="linear",
            max_grad_norm=None,
            max_input_tokens=experiment.max_input_tokens,
            max_target_tokens=experiment.max_target_tokens,
            save_steps=100,
        )
        return RunConfig(
            model=shipped_model(MODEL),
            method={"name": "wt5"},
            data=str(self.world.resolve()),
            train=training,
            evaluate=self._evaluation(experiment),
            dtype="float32",
            over={"train.mixture": tuple(experiment.mixture.format(count) for count in experiment.counts)},
        )

    def _learn(self, experiment: Experiment) -> None:
        run_recipe(self.recipe(experiment), self._run(experiment).path)

    def _constrain(self) -> None:
        results: Results | None = None
        for count in REVIEWS.counts:
            run = self._single(REVIEWS, count)
            point = {**REVIEWS.point(count), "method.constrained": True}
            held = replace(load(run.path), methods=(WT5(constrained=True),))
            part = evaluate(
                held, settings=self._evaluation(REVIEWS), data=self.world, run=run.path, name=label(point), point=point
            )
            results = part if results is None else results.merged(part)
        if results is not None:
            file = self._run(REVIEWS).results_file
            # what was answered freely stands last, and is what the page shows
            results.merged(Results.read(file)).write(file)

    def _row(self, experiment: Experiment, count: int) -> dict[str, str]:
        free = self.scores(experiment, count)
        held = self.scores(experiment, count, constrained=True) if experiment is REVIEWS else {}
        return {
            "data": experiment.name,
            "explained": str(count),
            "label accuracy": _number(free["accuracy"]),
            "reasons": f"{_number(free[experiment.score])} {experiment.score.replace('_', ' ')}",
            "random spans": _number(free.get("chance_token_f1", math.nan)),
            "spans found": _number(free.get("spans_found", math.nan)),
            "constrained reasons": _number(held.get(experiment.score, math.nan)),
            "constrained spans found": _number(held.get("spans_found", math.nan)),
        }


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1f}"
