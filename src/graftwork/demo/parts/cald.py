"""Demonstration of CALD: one encoder converted under every guide, and latency against length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from graftwork.core.run_folder import RunFolder
from graftwork.demo import shipped_model
from graftwork.demo.comparing import right_answers
from graftwork.demo.parts.part import Part, Scale, Stage, Summary
from graftwork.errors import GraftworkError
from graftwork.evaluation.costs import measure_costs, sharing_copy
from graftwork.grafting.conversion import convert
from graftwork.methods.cald import Cald
from graftwork.metrics.results import CostRow, Results, merge_results, update_results
from graftwork.pipeline.evaluation import evaluate
from graftwork.pipeline.loading import load, load_model
from graftwork.pipeline.runner import run_recipe
from graftwork.reporting.curves import read_curves
from graftwork.reporting.verdicts import compare_costs, compare_scores
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.recipe import RunConfig
from graftwork.settings.training import TrainingSettings

MODEL = "encoder"
TASK = "reviews/imdb"
GUIDES = ("unguided", "target", "trajectory", "waypoint", "hybrid")
SHORT_GUIDES = ("unguided", "target")
TOKENS = 72
"""Maximum length of a review."""
RANK = 8
STEPS = 240
SHORT_STEPS = 180
SNAPSHOT_STEPS = 60
LAYER_WEIGHT = 3.0
COST_LENGTHS = (32, 64, 128, 256, 512)
DENSE = "dense"
PROJECTED, COMPRESSED = f"projected, rank {RANK}", f"compressed first, rank {RANK}"
TOLERANCE = 1e-4


class CALDPart(Part):
    """Every guide with the same number of steps, and latency against length."""

    method = "cald"
    intro = (
        "A tiny RoBERTa, pretrained on the invented world, learns to classify reviews as positive or negative. It is "
        f"fine-tuned once with dense attention, and once per guide with attention over {RANK} slots instead of about "
        "44 tokens, for the same number of steps. The curves show reviews held out of training, the distance is that "
        "of the hidden states to those of the dense fine-tuned model, and the scores are on the test reviews. The "
        "guides target and hybrid start from the fine-tuned weights, so that their total training is twice as long as "
        "that of the dense model and of the other guides."
    )

    shortened = f"{SHORT_STEPS} of {STEPS} steps, {len(SHORT_GUIDES)} of {len(GUIDES)} guides"

    @property
    def guides(self) -> tuple[str, ...]:
        """Guides to compare."""
        return SHORT_GUIDES if self.scale is Scale.SHORT else GUIDES

    def stages(self) -> Sequence[Stage]:
        """Dense fine-tuning, every guide, comparison, cost."""
        return (
            Stage(f"fine-tuning the dense encoder on {TASK}", partial(self._train, DENSE), self.sized(9, 11, 14)),
            *(
                Stage(
                    f"converting to rank {RANK} while fine-tuning, guide {guide}",
                    partial(self._train, guide),
                    self.sized(8, 13, 20),
                )
                for guide in self.guides
            ),
            Stage("evaluating all models, and their distance to the dense model", self._compare, 3),
            Stage("measuring latency, time and memory against length", self._cost, self.sized(2, 5, 5)),
        )

    def runs(self) -> Sequence[RunFolder]:
        """The comparison, which contains the compared runs."""
        return (RunFolder(self.folder / "guides"),)

    def summary(self) -> Summary:
        """Comparison of every guide with the dense model."""
        run = self.runs()[0]
        results = Results.read(run.results_file)
        distances = {guide: results.measures[guide]["distance"] for guide in self.guides}
        best = max(self.guides, key=lambda guide: self._accuracy(results, guide))
        time, memory = compare_costs(results, DENSE, COMPRESSED)
        answers = {name: right_answers(run, TASK, name) for name in (DENSE, best, "unguided")}
        return Summary(
            changed=f"{max(results.changes.values())} layers attend to {RANK} slots, in which "
            f"{self._added():,} new parameters combine up to {TOKENS} tokens; all other weights are kept and "
            "fine-tuned",
            accuracy=compare_scores(
                f"accuracy on test reviews, guide {best}", answers[DENSE], answers[best], "reviews"
            ),
            time=time,
            memory=memory,
            others=(
                compare_scores(
                    "accuracy on test reviews, without a guide", answers[DENSE], answers["unguided"], "reviews"
                ),
                *compare_costs(results, DENSE, PROJECTED),
            ),
            facts=(
                f"The layers are {distances['unguided'] / distances['target']:.1f} times closer to those of the dense "
                "model with the guide target than without a guide",
                _crossing(results.cost),
            ),
            table=[
                {
                    "setting": name,
                    "accuracy": f"{self._accuracy(results, name):.1f}",
                    "distance": f"{distances[name]:.3g}" if name in distances else "0",
                    "seconds": f"{results.training[name]['train_runtime']:.0f}",
                }
                for name in (DENSE, *self.guides)
            ],
        )

    def _run(self, guide: str) -> RunFolder:
        return RunFolder(self.folder / "guides" / guide)

    def _method(self, guide: str) -> dict[str, Any]:
        dense = self._run(DENSE).path.resolve()
        steps = self.steps(SHORT_STEPS, STEPS)
        own: Mapping[str, Mapping[str, Any]] = {
            "waypoint": {"snapshots": str(dense / "train" / "distill" / "checkpoint-*")},
            "hybrid": {"distill_steps": max(1, steps // 3)},
        }
        weight = {} if guide in (DENSE, "unguided") else {"layer_weight": LAYER_WEIGHT}
        # the teacher is also set for guides without the fine-tuned model, for the comparison of hidden states
        teacher = {} if guide == DENSE else {"teacher": str(dense)}
        slots = {"rank": RANK, "positions": TOKENS}
        return {"name": "cald", "guide": guide, **slots, **weight, **teacher, **own.get(guide, {})}

    def _train(self, guide: str) -> None:
        training = TrainingSettings(
            tasks=(TASK,),
            max_steps=self.steps(SHORT_STEPS, STEPS),
            learning_rate=6e-4,
            warmup_ratio=0.06 if self.full else 0.2,
            max_grad_norm=None,
            per_device_train_batch_size=16,
            max_input_tokens=TOKENS,
            logging_steps=10,
            validation=0.05,
            eval_steps=int(self.sized(1, SNAPSHOT_STEPS, SNAPSHOT_STEPS // 2)),
            save_steps=1 if self.quick else SNAPSHOT_STEPS,
            save_total_limit=None if guide == DENSE else 1,
        )
        config = RunConfig(
            model=shipped_model(MODEL),
            method=self._method(guide),
            data=str(self.world.resolve()),
            train=training,
            dtype="float32",
        )
        run_recipe(config, self._run(guide).path)

    def _compare(self) -> None:
        place = self.runs()[0]
        settings = EvaluationSettings(
            tasks=(TASK,), split="test", max_input_tokens=TOKENS, batch_size=64, limit=6 if self.quick else None
        )
        for guide in (DENSE, *self.guides):
            run = self._run(guide)
            results = evaluate(load(run.path), settings=settings, data=self.world, run=place.path, name=guide)
            closing = Results.read(run.results_file).training
            own = replace(results, training={guide: closing["distill"]}, curves={guide: read_curves(run)})
            merge_results(place, replace(own, model=shipped_model(MODEL)))

    def _cost(self) -> None:
        run = self.runs()[0]
        results = Results.read(run.results_file)
        if results.cost:
            return
        dense, _ = load_model(shipped_model(MODEL), dtype="float32", labels=("negative", "positive"))
        projected = Cald(rank=RANK, form="projected")
        compressed = Cald(rank=RANK, form="compressed")
        variants = {
            DENSE: dense,
            PROJECTED: convert(sharing_copy(dense), projected).model,
            COMPRESSED: convert(sharing_copy(dense), compressed).model,
        }
        _check_forms(variants)
        lengths = COST_LENGTHS[:1] if self.quick else COST_LENGTHS if self.full else COST_LENGTHS[::2]
        cost = measure_costs(variants, lengths)
        update_results(run, lambda recorded: replace(recorded or results, cost=cost))

    def _accuracy(self, results: Results, name: str) -> float:
        return results.scores(TASK, name)["accuracy"]

    def _added(self) -> int:
        model = load(self._run("unguided").path).model
        from graftwork.surgery.modules import GRAFT

        return sum(value.numel() for name, value in model.named_parameters() if GRAFT in name.split("."))


def _check_forms(variants: Mapping[str, Any]) -> None:
    import torch

    ids = torch.arange(4, 4 + COST_LENGTHS[0])[None]
    with torch.no_grad():
        one, other = (variants[name].eval()(input_ids=ids).logits for name in (PROJECTED, COMPRESSED))
    difference = float((one - other).abs().max())
    if not difference <= TOLERANCE:
        raise GraftworkError(
            f"The forms projected and compressed differ by {difference:.2g}; expected at most {TOLERANCE:.0e}. Please "
            "report this with the output of `graftwork doctor`."
        )


def _crossing(rows: Sequence[CostRow]) -> str:
    """Smallest measured length from which the compressed form is faster than the dense model."""
    seconds = {(row.label, row.length): row.forward_seconds or row.seconds for row in rows}
    lengths = sorted({row.length for row in rows})
    slower = [length for length in lengths if seconds[COMPRESSED, length] >= seconds[DENSE, length]]
    since = next((length for length in lengths if length > max(slower, default=0)), None)
    found = "never faster than dense" if since is None else f"faster than dense from {since} tokens on"
    return f"With {COMPRESSED}, the model is {found} among the measured lengths"


PART = CALDPart
