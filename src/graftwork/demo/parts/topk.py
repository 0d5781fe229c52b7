"""Demonstration of top-k layers: a sweep over k without training, costs, and fine-tuning with top-k layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

from graftwork.core.config import to_plain
from graftwork.core.run_folder import RunFolder
from graftwork.demo import shipped_model
from graftwork.demo.comparing import right_answers
from graftwork.demo.parts.part import Part, Stage, Summary
from graftwork.errors import GraftworkError
from graftwork.evaluation.costs import measure_costs, sharing_copy
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import save
from graftwork.methods.topk import TopK
from graftwork.metrics.results import Results, record_training, update_results
from graftwork.pipeline.evaluation import evaluate
from graftwork.pipeline.loading import load, load_model
from graftwork.pipeline.runner import run_recipe
from graftwork.pipeline.sweeps import sweep
from graftwork.pipeline.training import train
from graftwork.reporting.verdicts import compare_costs, compare_scores
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.recipe import RunConfig, write_run
from graftwork.settings.training import TrainingSettings

MODEL = "encoder_decoder"
SWEEP_TASKS = ("world/facts", "world/choice")
FINETUNE_TASK = "world/keywords"
FINETUNE_K = 64
ATTENTION_K = 16
FINETUNE_STEPS = 200
SHORT_STEPS = 140
COST_LENGTHS = (128, 512, 1024)
MAX_NEW_TOKENS = 12
SHORT_KS = (256, FINETUNE_K, 16, 4)
DENSE = "dense"


class TopKPart(Part):
    """Accuracy and cost against k, and fine-tuning with top-k layers."""

    method = "topk"
    intro = (
        "A tiny T5, pretrained on a small invented world, answers questions about it: first dense, then with "
        "feed-forward layers that keep only the k largest hidden units, without any training. Below, the model is "
        "fine-tuned with these layers on keyword questions, a format that is not in its pretraining; the people in the "
        "test questions differ from those in the fine-tuning data."
    )

    shortened = f"{SHORT_STEPS} of {FINETUNE_STEPS} steps, fewer values of k"

    def stages(self) -> Sequence[Stage]:
        """Sweep, cost, fine-tuning."""
        return (
            Stage(
                "evaluating the pretrained model, dense and with top-k feed-forward layers",
                self._sweep,
                self.sized(3, 3, 5),
            ),
            Stage("measuring time and memory against length", self._cost, self.sized(1, 6, 17)),
            Stage(
                f"fine-tuning with feed_forward_k={FINETUNE_K} on {FINETUNE_TASK}",
                self._finetune,
                self.sized(4, 5, 8),
            ),
        )

    def runs(self) -> Sequence[RunFolder]:
        """The sweep and the fine-tuned model."""
        return RunFolder(self.folder / "sweep"), RunFolder(self.folder / "finetune")

    def summary(self) -> Summary:
        """Comparison of the dense model with k hidden units.

        Raises:
            GraftworkError: If keeping all units does not reproduce the scores of the dense model.
        """
        swept, tuned = (Results.read(run.results_file) for run in self.runs())
        self._check_identity(swept)
        one, both = f"feed_forward_k={FINETUNE_K}", f"feed_forward_k={FINETUNE_K},attention_k={ATTENTION_K}"
        time, memory = compare_costs(swept, DENSE, one)
        run, tuned_run = self.runs()
        before, after = (
            tuned.scores(FINETUNE_TASK, f"{when} fine-tuning")["exact_match"] for when in ("before", "after")
        )
        return Summary(
            changed=f"{max(swept.changes.values())} feed-forward layers keep k of {self._width} hidden units; "
            "no parameter is added or changed",
            accuracy=compare_scores(
                f"exact match on {SWEEP_TASKS[0]}, {one}, without training",
                right_answers(run, SWEEP_TASKS[0], DENSE),
                right_answers(run, SWEEP_TASKS[0], one),
                "questions",
            ),
            time=time,
            memory=memory,
            others=(
                *compare_costs(swept, DENSE, both),
                compare_scores(
                    f"exact match on {FINETUNE_TASK}, fine-tuned with {one}; then the same weights without top-k",
                    right_answers(tuned_run, FINETUNE_TASK, DENSE),
                    right_answers(tuned_run, FINETUNE_TASK, one),
                    "questions",
                ),
            ),
            facts=(
                f"Fine-tuning with k = {FINETUNE_K} changes exact match on {FINETUNE_TASK} from {before:.1f} to "
                f"{after:.1f}",
            ),
            table=_table(swept),
        )

    @cached_property
    def _width(self) -> int:
        from transformers import AutoConfig

        config: Any = cast(Any, AutoConfig).from_pretrained(shipped_model(MODEL))
        return int(config.d_ff)

    @property
    def _data(self) -> str:
        return str((self.world / "unifiedqa").resolve())

    def _evaluation(self, *tasks: str) -> EvaluationSettings:
        return EvaluationSettings(
            tasks=tasks, max_new_tokens=MAX_NEW_TOKENS, batch_size=64, limit=6 if self.quick else None
        )

    def _sweep(self) -> None:
        ks: list[int | None] = [None, self._width]
        if self.full:
            while (ks[-1] or 0) > 4:
                ks.append((ks[-1] or 0) // 2)
        ks += [k for k in SHORT_KS if k not in ks]
        config = RunConfig(
            model=shipped_model(MODEL),
            method={"name": "topk"},
            data=self._data,
            evaluate=self._evaluation(*SWEEP_TASKS),
            over={"method.feed_forward_k": tuple(ks)},
        )
        run_recipe(config, self.folder / "sweep")

    def _cost(self) -> None:
        run = RunFolder(self.folder / "sweep")
        results = Results.read(run.results_file)
        if results.cost:
            return
        dense, _ = load_model(shipped_model(MODEL), dtype="float32")
        variants = {"dense": dense}
        feed_forward = TopK(feed_forward_k=FINETUNE_K)
        both = TopK(feed_forward_k=FINETUNE_K, attention_k=ATTENTION_K)
        for method in (feed_forward, both):
            settings = {key: value for key, value in to_plain(method.config).items() if key.endswith("_k") and value}
            name = ",".join(f"{key}={value}" for key, value in settings.items())
            variants[name] = convert(sharing_copy(dense), method).model
        cost = measure_costs(variants, COST_LENGTHS[: int(self.sized(1, 2, 3))])
        update_results(run, lambda recorded: replace(recorded or results, cost=cost))

    def _finetune(self) -> None:
        run = RunFolder(self.folder / "finetune")
        method = TopK(feed_forward_k=FINETUNE_K)
        evaluation = self._evaluation(FINETUNE_TASK)
        training = TrainingSettings(
            tasks=(FINETUNE_TASK,),
            max_steps=self.steps(SHORT_STEPS, FINETUNE_STEPS),
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            per_device_train_batch_size=32,
            train_sampling_strategy="group_by_length",
            save_steps=50,
            logging_steps=10,
            max_input_tokens=64,
            max_target_tokens=8,
        )
        write_run(
            run.run_file,
            RunConfig(
                model=shipped_model(MODEL),
                method={"name": "topk", "feed_forward_k": FINETUNE_K},
                data=self._data,
                train=training,
                evaluate=evaluation,
            ),
        )
        if not run.model.exists():
            model, tokenizer = load_model(shipped_model(MODEL), dtype="float32")
            converted = convert(model, method, tokenizer=tokenizer)
            save(converted, run.path)
            evaluate(converted, settings=evaluation, data=self._data, run=run.path, name="before fine-tuning")
        trained = train(load(run.path), training, data=self._data, run=run.path)
        evaluate(trained.converted, settings=evaluation, data=self._data, run=run.path, name="after fine-tuning")
        points = [{"method.feed_forward_k": k} for k in (None, FINETUNE_K, FINETUNE_K // 4, FINETUNE_K // 16)]
        sweep(trained.converted, points, evaluation, data=self._data, run=run.path)
        record_training(run, trained.phases)

    def _check_identity(self, results: Results) -> None:
        for task in SWEEP_TASKS:
            dense, full = results.scores(task, "dense"), results.scores(task, f"feed_forward_k={self._width}")
            if dense != full:
                raise GraftworkError(
                    f"{task}: keeping all {self._width} units gives {dict(full)}, the dense model {dict(dense)}. These "
                    "must be equal; please report this with the output of `graftwork doctor`."
                )


def _table(results: Results) -> list[Mapping[str, str]]:
    labels = list(dict.fromkeys(row.label for row in results.rows))
    return [
        {"setting": label}
        | {
            f"{task.removeprefix('world/')} {metric}": f"{value:.1f}"
            for task in SWEEP_TASKS
            for metric, value in results.scores(task, label).items()
        }
        for label in labels
    ]


PART = TopKPart
