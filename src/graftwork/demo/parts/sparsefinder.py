"""Demonstration of Sparsefinder: a tiny encoder fine-tuned with entmax, and predictors of its attention graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from graftwork.core.files import read_json, write_json
from graftwork.core.run_folder import RunFolder
from graftwork.demo import shipped_model
from graftwork.demo.parts.part import Part, Stage, Summary
from graftwork.evaluation.language_modelling import score_chunks, text_chunks
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import Converted, write_model
from graftwork.methods.sparsefinder import Sparsefinder
from graftwork.methods.sparsefinder.modules import Rule, override_rules, sparsefinder_modules
from graftwork.metrics.results import Results, record_training
from graftwork.pipeline.evaluation import evaluate
from graftwork.pipeline.loading import load, load_model
from graftwork.pipeline.training import train
from graftwork.reporting.verdicts import MIB, Comparison, compare_scores, compare_times
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.recipe import RunConfig, write_run
from graftwork.settings.training import TrainingSettings
from graftwork.tasks.loading import load_tasks

MODEL = "encoder"
TASK = "wikitext/2_raw"
TOKENS = 128
TARGET_SPARSITY = 0.9
STEPS = 120
SHORT_STEPS = 50
SHORT_METHODS = ("window", "distance", "bigbird")
ANNEAL_STEPS = 24
HELD_OUT = 24
COST_LENGTHS = (256, 512, 1024, 2048)
SOFTMAX, ENTMAX = "softmax, fine-tuned", "entmax, fine-tuned"
PREDICTED = f"entmax along its predicted graph, {TARGET_SPARSITY:g} sparse"
LEARNED = {"distance", "cos", "kmeans"}
"""Curve names of the paper's learned predictors."""
CHUNKS_FILE = "chunks.json"
SDPA, OWN = "SDPA (softmax)", "own graph"
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

    shortened = f"{SHORT_STEPS} of {STEPS} steps, {len(SHORT_METHODS)} predictors with fewer windows"

    def stages(self) -> Sequence[Stage]:
        """Softmax control, training, comparison of predictors and timing."""
        return (
            Stage("fine-tuning with softmax, for comparison", self._softmax, self.sized(4, 9, 17)),
            Stage("fine-tuning with entmax, then projections and thresholds", self._learn, self.sized(6, 17, 41)),
            Stage("comparing predictors, and timing executors against length", self._compare, self.sized(10, 15, 39)),
        )

    def runs(self) -> Sequence[RunFolder]:
        """The run of the entmax encoder."""
        return (self._run,)

    def summary(self) -> Summary:
        """Recall and perplexity of the best predictor and of the window, and the time of the run's own graph."""
        table = read_json(self._run.graphs / "table.json")
        scores = read_json(self._run.graphs / "scores.json")
        at = min((score["at"] for score in scores if score["at"]), key=lambda sparsity: abs(sparsity - SHOWN))
        rows = [score for score in scores if score["at"] == at]
        learned = max((row for row in rows if row["method"] in LEARNED), key=lambda row: row["recall"])
        others = [row for row in rows if row["method"] == "window"] or [scores[0]]
        results = Results.read(self._run.results_file)
        chunks = read_json(self.folder / CHUNKS_FILE)
        dense = chunks[SOFTMAX]
        time, memory = self._cost()
        return Summary(
            changed=f"{max(results.changes.values())} attention layers use 1.5-entmax along predicted graphs; "
            f"entmax alone gives {table['gold_sparsity']:.0%} of all pairs weight zero",
            accuracy=compare_scores(
                f"accuracy of masked tokens, {PREDICTED}",
                dense["token_accuracy"],
                chunks[PREDICTED]["token_accuracy"],
                "chunks of text",
                baseline=SOFTMAX,
            ),
            time=time,
            memory=memory,
            others=tuple(
                compare_scores(
                    f"loss of masked tokens, {name}",
                    dense["loss"],
                    chunks[name]["loss"],
                    "chunks of text",
                    unit="",
                    higher_is_better=False,
                    baseline=SOFTMAX,
                )
                for name in (ENTMAX, PREDICTED)
            ),
            facts=(
                f"At sparsity {at:g}, {_found(learned)}, {_found(others[0])}; with all scores the perplexity "
                f"is {scores[0]['perplexity']:.2f}",
            ),
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
            "samples": int(self.sized(8, 48, 96)),
            "projection_epochs": int(self.sized(1, 5, 8)),
            "anneal_steps": int(self.sized(1, ANNEAL_STEPS // 2, ANNEAL_STEPS)),
        }

    @cached_property
    def _training(self) -> TrainingSettings:
        return TrainingSettings(
            tasks=(TASK,),
            max_steps=self.steps(SHORT_STEPS, STEPS),
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
        self._record_chunks(SOFTMAX, trained.converted)

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
            self._record_chunks(ENTMAX, trained.converted)
        evaluate(trained.converted, settings=self._evaluation, data=self._data, run=run.path, name=PREDICTED)
        self._record_chunks(PREDICTED, trained.converted)
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
            methods=None if self.full else ["window", "distance"] if self.quick else list(SHORT_METHODS),
            windows=(None, 5, 15) if self.full else (None, 5),
            cost_lengths=COST_LENGTHS[:1] if self.quick else COST_LENGTHS if self.full else COST_LENGTHS[1::2],
        )

    def _record_chunks(self, name: str, converted: Converted) -> None:
        """Write the accuracy and the loss of every chunk of the held-out text, for intervals."""
        ((_, examples),) = load_tasks([TASK], self._data, "test", 0)
        chunks, collate = text_chunks(converted, examples.rows, self._evaluation)
        scores = [score_chunks(converted, chunks, collate, [number], batch_size=1) for number in range(len(chunks))]
        file = self.folder / CHUNKS_FILE
        own = {
            score: {str(number): found[score] for number, found in enumerate(scores)}
            for score in ("token_accuracy", "loss")
        }
        write_json(file, {**(read_json(file) if file.exists() else {}), name: own})

    def _cost(self) -> tuple[Comparison, Comparison]:
        """Compare time and memory of one attention layer along the run's own graph at the greatest length."""
        rows = [row for row in read_json(self._run.graphs / "executors.json") if not row["backward"]]
        length = max(row["length"] for row in rows)
        found = [row for row in rows if row["length"] == length]
        dense = next(row for row in found if row["label"] == SDPA)
        blocks = next(row for row in found if row["label"].startswith(OWN))
        executor = "all scores computed" if blocks["kept"] is None else f"{blocks['kept']:.0%} of the blocks computed"
        name = (
            f"one attention layer at {length} tokens along its own graph ({blocks['sparsity']:.0%} sparse, recall "
            f"{blocks['recall']:.2f}, mass {blocks['mass']:.2f}, {executor}), prediction included"
        )
        times = [[row["low"], *[row["seconds"]] * max(1, row["rounds"] - 2), row["high"]] for row in (dense, blocks)]
        memory = Comparison(
            f"peak memory of {name}",
            dense["peak_bytes"] / MIB,
            blocks["peak_bytes"] / MIB,
            "MiB",
            1,
            "measured once",
            higher_is_better=False,
            baseline=SDPA,
        )
        return compare_times(name, *times, baseline=SDPA), memory


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
