"""Demonstration of Sparsefinder: a tiny encoder fine-tuned with entmax, and predictors of its attention graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from graftwork.core.files import read_json
from graftwork.core.run_folder import RunFolder
from graftwork.demo import shipped_model
from graftwork.demo.parts.part import Part, Stage, Summary
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import Converted, write_model
from graftwork.methods.sparsefinder import Sparsefinder
from graftwork.methods.sparsefinder.modules import Rule, override_rules, sparsefinder_modules
from graftwork.metrics.results import Results, record_training
from graftwork.pipeline.evaluation import evaluate
from graftwork.pipeline.loading import load, load_model
from graftwork.pipeline.training import train
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.recipe import RunConfig, write_run
from graftwork.settings.training import TrainingSettings

MODEL = "encoder"
TASK = "wikitext/2_raw"
TOKENS = 128
TARGET_SPARSITY = 0.9
STEPS = 120
ANNEAL_STEPS = 24
HELD_OUT = 24
COST_LENGTHS = (256, 512, 1024, 2048)
SOFTMAX, ENTMAX = "softmax, fine-tuned", "entmax, fine-tuned"
PREDICTED = f"entmax along its predicted graph, {TARGET_SPARSITY:g} sparse"
LEARNED = {"distance", "cos", "kmeans"}
"""Curve names of the paper's learned predictors."""
SHOWN = 0.9
"""Sparsity at which the summary reports recall."""


class SparsefinderPart(Part):
    """Recall and perplexity against sparsity for every predictor, graphs of one head, and the cost of executors."""

    method = "sparsefinder"
    intro = (
        "A tiny RoBERTa, pretrained with masked language modelling on articles about the invented world, is fine-tuned "
        "with entmax instead of softmax, which gives most pairs of tokens a weight of exactly zero; a control model is "
        "fine-tuned with softmax. Small projections then learn to predict the non-zero pairs before any score is "
        "computed. Below, these predictors are compared with windows, random patterns and published patterns, on "
        "articles that were used neither for training nor for selection."
    )

    def stages(self) -> Sequence[Stage]:
        """Softmax control, training, comparison of predictors and timing."""
        return (
            Stage("fine-tuning with softmax, for comparison", self._softmax),
            Stage("fine-tuning with entmax, then projections and thresholds", self._learn),
            Stage("comparing predictors, and timing executors against length", self._compare),
        )

    def runs(self) -> Sequence[RunFolder]:
        """The run of the entmax encoder."""
        return (self._run,)

    def summary(self) -> Summary:
        """Recall and perplexity of the best predictor and of the window, and the time of gathered blocks."""
        table = read_json(self._run.graphs / "table.json")
        scores = read_json(self._run.graphs / "scores.json")
        at = min((score["at"] for score in scores if score["at"]), key=lambda sparsity: abs(sparsity - SHOWN))
        rows = [score for score in scores if score["at"] == at]
        learned = max((row for row in rows if row["method"] in LEARNED), key=lambda row: row["recall"])
        others = [row for row in rows if row["method"] == "window"] or [scores[0]]
        results = Results.read(self._run.results_file)
        softmax, entmax = (results.scores(TASK, name)["perplexity"] for name in (SOFTMAX, ENTMAX))
        return Summary(
            changed=f"{max(results.changes.values())} attention layers use 1.5-entmax along predicted graphs; "
            f"entmax alone gives {table['gold_sparsity']:.0%} of all pairs weight zero",
            cost=f"after the same fine-tuning, perplexity is {softmax:.2f} with softmax and {entmax:.2f} with entmax; "
            f"{self._cost()}",
            gained=f"at sparsity {at:g}, {_found(learned)}, {_found(others[0])}; with all scores the perplexity "
            f"is {scores[0]['perplexity']:.2f}",
            table=[_row(score) for score in scores],
        )

    @cached_property
    def _run(self) -> RunFolder:
        return RunFolder(self.folder / "encoder")

    @property
    def _data(self) -> str:
        return str((self.world / "wikitext").resolve())

    def _settings(self) -> dict[str, Any]:
        return {
            "grouping": "distance",
            "target_sparsity": TARGET_SPARSITY,
            "window_size": 5,
            "add_cls_mask": True,
            "exclude_fixed": True,
            "loss": "logistic",
            "samples": 8 if self.quick else 96,
            "projection_epochs": 1 if self.quick else 8,
            "anneal_steps": 1 if self.quick else ANNEAL_STEPS,
        }

    @cached_property
    def _training(self) -> TrainingSettings:
        return TrainingSettings(
            tasks=(TASK,),
            max_steps=2 if self.quick else STEPS,
            max_input_tokens=TOKENS,
            learning_rate=5e-4,
            per_device_train_batch_size=16,
            save_steps=50,
            logging_steps=20,
        )

    @cached_property
    def _evaluation(self) -> EvaluationSettings:
        return EvaluationSettings(
            tasks=(TASK,), split="test", max_input_tokens=TOKENS, limit=4 if self.quick else HELD_OUT, batch_size=16
        )

    def _softmax(self) -> None:
        """Fine-tune a control model without the method on the same text for the same steps, in a separate folder."""
        control = RunFolder(self.folder / "softmax")
        model, tokenizer = load_model(shipped_model(MODEL), dtype="float32")
        untouched = Converted(model, tokenizer=tokenizer)
        evaluate(untouched, settings=self._evaluation, data=self._data, run=self._run.path, name="softmax, as shipped")
        trained = train(untouched, self._training, data=self._data, run=control.path)
        evaluate(trained.converted, settings=self._evaluation, data=self._data, run=self._run.path, name=SOFTMAX)

    def _learn(self) -> None:
        run, method = self._run, self._settings()
        write_run(
            run.run_file,
            RunConfig(
                model=shipped_model(MODEL),
                method={"name": "sparsefinder", **method},
                data=self._data,
                train=self._training,
                evaluate=self._evaluation,
            ),
        )
        if not run.model.exists():
            model, tokenizer = load_model(shipped_model(MODEL), dtype="float32")
            # the run already contains the results of the control model, which `save` would refuse
            write_model(convert(model, Sparsefinder(**method), tokenizer=tokenizer), run)
        trained = train(load(run.path), self._training, data=self._data, run=run.path)
        with override_rules(trained.converted.model, _all_scores(trained.converted.model)):
            evaluate(trained.converted, settings=self._evaluation, data=self._data, run=run.path, name=ENTMAX)
        evaluate(trained.converted, settings=self._evaluation, data=self._data, run=run.path, name=PREDICTED)
        record_training(run, trained.phases)

    def _compare(self) -> None:
        from graftwork.methods.sparsefinder.graph_report import compare_graphs

        run = self._run
        if (run.graphs / "report.json").exists():
            return
        compare_graphs(
            load(run.path),
            [TASK],
            data=self._data,
            split="test",
            max_input_tokens=TOKENS,
            samples=4 if self.quick else HELD_OUT,
            methods=["window", "distance"] if self.quick else None,
            windows=(None, 5) if self.quick else (None, 5, 15),
            cost_lengths=COST_LENGTHS[:1] if self.quick else COST_LENGTHS,
        )

    def _cost(self) -> str:
        rows = read_json(self._run.graphs / "executors.json")
        length = max(row["length"] for row in rows if row["label"] == "dense entmax")
        forward = {row["label"]: row for row in rows if row["length"] == length and not row["backward"]}
        blocks, dense = forward["blocks, prediction included"], forward["dense entmax"]
        return (
            f"at {length} tokens, gathered blocks with {blocks['kept']:.0%} of the blocks took "
            f"{1000 * blocks['seconds']:.0f} ms, prediction included; dense entmax {1000 * dense['seconds']:.0f} ms, "
            f"softmax (SDPA) {1000 * forward['SDPA (softmax)']['seconds']:.0f} ms"
        )


def _all_scores(model: Any) -> dict[str, Rule]:
    """Rules that compute all scores: no graph in any module."""
    return {
        path: Rule(replace(graft.config, grouping=None), graft.learned())
        for path, graft in sparsefinder_modules(model).items()
    }


def _found(score: Mapping[str, Any]) -> str:
    return f"{score['method']} finds {score['recall']:.2f} of the true pairs (perplexity {score['perplexity']:.2f})"


def _row(score: Mapping[str, Any]) -> Mapping[str, str]:
    return {
        "graph": score["method"],
        "window": str(score["window"] or "–"),
        "sparsity": f"{score['sparsity']:.3f}",
        "recall": f"{score['recall']:.3f}",
        "perplexity": f"{score['perplexity']:.3f}",
        "accuracy": f"{score['token_accuracy']:.1f}",
    }


PART = SparsefinderPart
