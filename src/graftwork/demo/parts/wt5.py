"""Demonstration of WT5: explained predictions learned from partly explained reviews and sentence pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from graftwork.core.example import Example
from graftwork.core.files import read_json, write_json
from graftwork.core.run_folder import RunFolder
from graftwork.demo import shipped_model
from graftwork.demo.comparing import label_of, right_answers, weight_bytes
from graftwork.demo.parts.part import Part, Scale, Stage, Summary
from graftwork.evaluation.prediction import predict_texts
from graftwork.methods.wt5 import WT5
from graftwork.metrics.cost import interleaved_times
from graftwork.metrics.results import Results, update_results
from graftwork.pipeline.evaluation import evaluate
from graftwork.pipeline.loading import load, load_model
from graftwork.pipeline.runner import run_recipe
from graftwork.reporting.verdicts import MIB, Comparison, compare_scores, compare_times
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.recipe import RunConfig, label
from graftwork.settings.training import TrainingSettings
from graftwork.tasks.loading import load_tasks

MODEL = "encoder_decoder"
LABELS_TASK = "movie_rationales_v010_no_expl"
LABELS_ALONE = "label alone"
TIMES_FILE = "times.json"
TIMED = 32
"""Number of reviews in the measurement of time."""
ROUNDS = 5
SHORT_STEPS = 150


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

    shortened = f"{SHORT_STEPS} of {REVIEWS.steps} steps on one mixture, without sentence pairs"

    @property
    def experiments(self) -> tuple[Experiment, ...]:
        """Data sets to learn, with the counts and steps of the scale."""
        if self.scale is Scale.SHORT:
            return (replace(REVIEWS, counts=REVIEWS.counts[-1:], steps=SHORT_STEPS),)
        return REVIEWS, PAIRS

    def stages(self) -> Sequence[Stage]:
        """Fine-tuning on reviews, constrained generation on reviews, fine-tuning on sentence pairs."""
        reviews, *others = self.experiments
        counts = ", ".join(map(str, reviews.counts))
        return (
            Stage(
                f"fine-tuning on reviews, {counts} of them with explanations",
                partial(self._learn, reviews),
                self.sized(12, 16, 110),
            ),
            Stage(
                "generating again, constrained to labels and words of the text, and labels alone",
                self._constrain,
                self.sized(2, 2, 3),
            ),
            *(
                Stage(
                    f"fine-tuning on sentence pairs, {pairs.counts[0]} of them with explanations",
                    partial(self._learn, pairs),
                    self.sized(5, 17, 17),
                )
                for pairs in others
            ),
        )

    def runs(self) -> Sequence[RunFolder]:
        """The runs on reviews and on sentence pairs."""
        return tuple(map(self._run, self.experiments))

    def summary(self) -> Summary:
        """Label and explanation scores of both data sets."""
        most = REVIEWS.counts[-1]
        free, held = self.scores(REVIEWS, most), self.scores(REVIEWS, most, constrained=True)
        seconds = sum(
            phase["train_runtime"]
            for experiment in self.experiments
            for count in experiment.counts
            for phase in Results.read(self._single(experiment, count).results_file).training.values()
        )
        run, name = self._single(REVIEWS, most), label(REVIEWS.point(most))
        explained = right_answers(run, REVIEWS.task, name, parse=label_of)
        alone = right_answers(self._alone, LABELS_TASK, LABELS_ALONE, parse=label_of)
        times = read_json(self.folder / TIMES_FILE)
        weights = [size / MIB for size in times["bytes"]]
        pairs = [self.scores(PAIRS, PAIRS.counts[-1])] if PAIRS in self.experiments else []
        return Summary(
            changed="no change of the model; the prefix explain before an input requests an explanation after "
            "the label",
            accuracy=compare_scores(
                f"label accuracy with an explanation, {most} explained reviews",
                alone,
                explained,
                "reviews",
                baseline="label alone",
            ),
            time=compare_times(
                f"answering {TIMED} reviews with label and explanation",
                times["alone"],
                times["explained"],
                baseline="label alone",
            ),
            memory=Comparison("weights", weights[0], weights[1], "MiB", 1, "counted exactly", higher_is_better=False),
            others=(
                Comparison(
                    "token F1 of the explanations",
                    free["chance_token_f1"],
                    free["token_f1"],
                    "%",
                    len(explained),
                    "reviews",
                    higher_is_better=True,
                    baseline="random spans",
                ),
            ),
            facts=(
                f"{_number(free['spans_found'])} % of the spans occur in the text, {_number(held['spans_found'])} % "
                f"with constrained generation, whose token F1 is {_number(held['token_f1'])}",
                f"Training takes {seconds:.0f} s in total",
                *(f"Explanations of sentence pairs reach a BLEU of {_number(pair['bleu'])}" for pair in pairs),
            ),
            table=[self._row(experiment, count) for experiment in self.experiments for count in experiment.counts],
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

    @property
    def _alone(self) -> RunFolder:
        """Run folder of the answers without explanations."""
        return RunFolder(self.folder / "labels")

    def _learn(self, experiment: Experiment) -> None:
        run_recipe(self.recipe(experiment), self._run(experiment).path)

    def _constrain(self) -> None:
        results: Results | None = None
        for count in self.experiments[0].counts:
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
        self._answer_with_labels_alone()

    def _answer_with_labels_alone(self) -> None:
        """Evaluate the model with the most explanations without asking for one, and time both kinds of answers."""
        converted = load(self._single(REVIEWS, REVIEWS.counts[-1]).path)
        settings = replace(self._evaluation(REVIEWS), tasks=(LABELS_TASK,))
        evaluate(converted, settings=settings, data=self.world, run=self._alone.path, name=LABELS_ALONE)
        inputs: dict[str, Sequence[Example]] = {}
        for name, task in (("alone", LABELS_TASK), ("explained", REVIEWS.task)):
            ((_, examples),) = load_tasks([task], self.world, "validation", 0)
            inputs[name] = examples.first(TIMED).rows
        runs = {name: partial(predict_texts, converted, rows, settings, digest="") for name, rows in inputs.items()}
        for run in runs.values():
            run()
        dense, _ = load_model(shipped_model(MODEL), dtype="float32")
        sizes = [weight_bytes(dense), weight_bytes(converted.model)]
        write_json(self.folder / TIMES_FILE, {**interleaved_times(runs, ROUNDS), "bytes": sizes})

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
