"""Demonstration of WT5: explained predictions learned from partly explained reviews and sentence pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from graftwork.core.run_folder import RunFolder
from graftwork.demo import shipped_model
from graftwork.demo.parts.part import Part, Stage, Summary
from graftwork.methods.wt5 import WT5
from graftwork.metrics.results import Results, update_results
from graftwork.pipeline.evaluation import evaluate
from graftwork.pipeline.loading import load
from graftwork.pipeline.runner import run_recipe
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.recipe import RunConfig, label
from graftwork.settings.training import TrainingSettings

MODEL = "encoder_decoder"


@dataclass(frozen=True)
class Experiment:
    """Training settings for one data set of the offline world."""

    name: str
    mixture: str
    """Name template of the mixtures, formatted with the number of explained examples."""
    counts: tuple[int, ...]
    task: str
    steps: int
    learning_rate: float
    max_input_tokens: int
    max_target_tokens: int
    score: str
    """Metric of the explanations."""

    def point(self, count: int) -> dict[str, str]:
        """Sweep point for a number of explained examples."""
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
    """Label and explanation scores against the number of explained examples."""

    method = "wt5"
    intro = (
        "A tiny T5 learns to classify reviews of invented events and to quote the words that support the label, and to "
        "classify sentence pairs and explain the label. Only some of its training examples have an explanation; the "
        "others have a label only. Scores are on held-out examples, next to a baseline of random spans of equal number "
        "and length. Constrained generation permits only a label and words of the text, so that every span is found by "
        "construction; the token F1 measures its quality."
    )

    def stages(self) -> Sequence[Stage]:
        """Fine-tuning on reviews, constrained generation on reviews, fine-tuning on sentence pairs."""
        counts = ", ".join(map(str, REVIEWS.counts))
        return (
            Stage(f"fine-tuning on reviews, {counts} of them with explanations", lambda: self._learn(REVIEWS)),
            Stage("generating again, constrained to labels and words of the text", self._constrain),
            Stage(
                f"fine-tuning on sentence pairs, {PAIRS.counts[0]} of them with explanations",
                lambda: self._learn(PAIRS),
            ),
        )

    def runs(self) -> Sequence[RunFolder]:
        """The runs on reviews and on sentence pairs."""
        return self._run(REVIEWS), self._run(PAIRS)

    def summary(self) -> Summary:
        """Label and explanation scores of both data sets."""
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
            changed="no change of the model; the prefix explain before an input requests an explanation after "
            "the label",
            cost=f"{len(REVIEWS.counts) + len(PAIRS.counts)} fine-tunings, {seconds:.0f} s in total; an explanation "
            "adds tokens to the output",
            gained=f"with {most} explained reviews, {_number(free['accuracy'])} % of the labels are correct, "
            f"{_number(free['spans_found'])} % of the spans occur in the text ({_number(held['spans_found'])} % "
            f"constrained), and their token F1 is {_number(free['token_f1'])}, compared with "
            f"{_number(free['chance_token_f1'])} for random spans; explanations of sentence pairs reach a BLEU of "
            f"{_number(pairs['bleu'])}",
            table=[self._row(experiment, count) for experiment in (REVIEWS, PAIRS) for count in experiment.counts],
        )

    def scores(self, experiment: Experiment, count: int, *, constrained: bool = False) -> Mapping[str, float]:
        """Scores of one fine-tuning on held-out examples."""
        point: dict[str, object] = dict(experiment.point(count))
        if constrained:
            point["method.constrained"] = True
        return Results.read(self._run(experiment).results_file).scores(experiment.task, label(point))

    def _run(self, experiment: Experiment) -> RunFolder:
        return RunFolder(self.folder / experiment.name)

    def _single(self, experiment: Experiment, count: int) -> RunFolder:
        """Run folder of one sweep point of the recipe."""
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
        """Recipe of one experiment, swept over the number of explained examples."""
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
            constrained = results
            # unconstrained answers come last, because the report shows the last ones
            update_results(self._run(REVIEWS), lambda free: constrained if free is None else constrained.merged(free))

    def _row(self, experiment: Experiment, count: int) -> dict[str, str]:
        free = self.scores(experiment, count)
        held: Mapping[str, float] = self.scores(experiment, count, constrained=True) if experiment is REVIEWS else {}
        return {
            "data": experiment.name,
            "explained": str(count),
            "label accuracy": _number(free["accuracy"]),
            "explanations": f"{_number(free[experiment.score])} {experiment.score.replace('_', ' ')}",
            "random spans": _number(free.get("chance_token_f1", math.nan)),
            "spans found": _number(free.get("spans_found", math.nan)),
            "constrained explanations": _number(held.get(experiment.score, math.nan)),
            "constrained spans found": _number(held.get("spans_found", math.nan)),
        }


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1f}"


PART = WT5Part
