"""Every stage of every method on GPUs that need not exist: no mixing of devices, no host synchronisation in a layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from fake_placement import spread
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import Converted
from graftwork.methods import NAMES
from graftwork.metrics.memory import MemoryRecorder
from graftwork.pipeline.estimation.building import fake_model
from graftwork.pipeline.estimation.estimate import SampleTokenizer, recording
from graftwork.pipeline.estimation.inference import measure_inference
from graftwork.pipeline.estimation.training import take_update, training_run
from graftwork.pipeline.phases import phases_of
from graftwork.settings.training import TrainingSettings
from graftwork.training.batching import BatchSize
from tiny_models import tiny_model

SIZE = BatchSize(2, 24, 6, passage_tokens=12, passages=2)

ALLOWED = {
    "value methods/cald/guides.py:outputs": "loss of the moving teacher for the training log, once a batch",
    "value methods/sparsefinder/modules.py:_is_active": "state of a module, after a change only",
    "value methods/sparsefinder/losses.py:sample_negatives": "number of sampled keys in the loss of the projections",
    "value methods/wt5/phases.py:_mean": "losses of labels and explanations for the training log, once a batch",
}
"""Host synchronisations outside layers, with the reason why each is accepted."""
GENERATION = "value transformers/generation/"
"""Host synchronisations of `generate`: checks of its arguments once a call, and the end of all rows once a token."""


@dataclass(frozen=True)
class Stages:
    """One method with settings on one family."""

    method: str
    family: str
    settings: dict[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] | None = None

    def __str__(self) -> str:
        words = [f"{key}={value}" for key, value in self.settings.items()]
        return "-".join([self.method, self.family, *words])


CASES = [
    Stages("dense", "llama"),
    Stages("topk", "llama", {"attention_k": 8, "feed_forward_k": 8}),
    Stages("topk", "t5", {"attention_k": 8, "feed_forward_k": 8}),
    Stages("topk", "bert", {"feed_forward_k": 0.25, "attention_k": 8}),
    Stages("cald", "roberta", {"rank": 8, "guide": "trajectory"}, ("no", "yes")),
    Stages("cald", "roberta", {"rank": 8, "guide": "target", "teacher": "none"}, ("no", "yes")),
    Stages("cald", "roberta", {"mixer": "feature_map"}),
    Stages("sparsefinder", "bert", {"alpha": 1.5}),
    Stages("sparsefinder", "llama", {"alpha": 1.5}),
    Stages("sparsefinder", "bert", {"grouping": "quantize"}),
    Stages("wt5", "t5", {"explanation_weight": 2.0, "z_loss": 1e-4}),
    Stages("regrad", "llama", {"rank": 2, "meta_order": 2}),
    Stages("regrad", "llama", {"rank": 2, "meta_order": 1}),
]
PLACES = {
    "one": TrainingSettings(),
    "two": TrainingSettings(),
    "bf16": TrainingSettings(bf16=True),
    "checkpointing": TrainingSettings(bf16=True, gradient_checkpointing=True, gradient_accumulation_steps=2),
}


def run_stages(case: Stages, place: str, recorder: MemoryRecorder) -> None:
    """Convert, train for two updates in every phase with parameters, and answer one batch."""
    settings = PLACES[place]
    dtype = torch.bfloat16 if place == "bf16" else torch.float32
    config = tiny_model(case.family).config
    # attention dropout and recomputed passages exclude each other
    config.attention_dropout = 0.0
    methods = () if case.method == "dense" else (NAMES.get(case.method)(**case.settings),)

    def build() -> Converted:
        model = fake_model(config, dtype=dtype, device="cuda:0", labels=case.labels)
        converted = Converted(spread(model) if place == "two" else model)
        for method in methods:
            converted = convert(converted, method)
        return converted

    with recording(recorder):
        for number in range(len(phases_of(build()))):
            converted = build()
            phase = phases_of(converted)[number]
            if not phase.parameters(converted.model):
                continue
            own = phase.settings(settings)
            with training_run(converted.model, phase, own, SIZE, SampleTokenizer()) as run:
                for _ in range(2):
                    take_update(run, phase, own.gradient_accumulation_steps)
        measure_inference(build(), SIZE, recorder)


QUICK = {("topk", "bert", "bf16"), ("sparsefinder", "bert", "two"), ("regrad", "llama", "one")}
"""Cases of the default suite; all others are long."""


def all_cases() -> list[Any]:
    found = []
    quick = set(QUICK)
    for case in CASES:
        for place in PLACES:
            key = (case.method, case.family, place)
            marks = [] if key in quick and case.settings.get("meta_order", 1) == 1 else [pytest.mark.long]
            quick.discard(key if not marks else ())
            if case.settings.get("meta_order") == 2 and place == "two" and not torch.cuda.is_available():
                # without a device, the second derivative of a copy between devices loses the device
                marks.append(pytest.mark.skip(reason="second derivatives on two GPUs need a build with CUDA"))
            found.append(pytest.param(case, place, marks=marks, id=f"{case}-{place}"))
    return found


@pytest.mark.parametrize(("case", "place"), all_cases())
def test_every_stage_runs_on_gpus_without_waiting_for_them(case, place):
    recorder = MemoryRecorder()
    run_stages(case, place, recorder)
    unexpected = {
        site: count for site, count in recorder.syncs.items() if site not in ALLOWED and not site.startswith(GENERATION)
    }
    assert not unexpected
    assert recorder.peak["cuda:0"] > 0
    assert (recorder.peak.get("cuda:1", 0) > 0) == (place == "two")
