"""Stages besides training and generation on GPUs that need not exist: encoding, prediction of graphs, calibration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fake_placement import spread
from graftwork.core.example import Example
from graftwork.evaluation.sampling import Sampling, TokenSampler
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import Converted
from graftwork.methods import NAMES
from graftwork.methods.cald import calibration as ranks
from graftwork.methods.regrad.encoding.gradients import passage_gradients
from graftwork.methods.sparsefinder import gathering
from graftwork.methods.sparsefinder.modules import SparsefinderAttention, sparsefinder_modules
from graftwork.metrics.fake_tensors import fake_tensors
from graftwork.metrics.memory import MemoryRecorder
from graftwork.pipeline.estimation.building import fake_model
from graftwork.training.batching import BatchSize, sample_batch
from tiny_models import tiny_model

PLACES = {"one": torch.float32, "two": torch.float32, "bf16": torch.bfloat16}


def build(family: str, method: str | None, place: str, **settings: Any) -> Converted:
    """Convert a model without weights on one GPU, or on two."""
    model = fake_model(tiny_model(family).config, dtype=PLACES[place], device="cuda:0")
    converted = Converted(spread(model) if place == "two" else model)
    return converted if method is None else convert(converted, NAMES.get(method)(**settings))


def device_of(tensor: torch.Tensor) -> str:
    return str(tensor.device)


@pytest.mark.parametrize("place", PLACES)
def test_passages_are_encoded_on_the_device_of_the_model(place):
    with fake_tensors(), MemoryRecorder() as recorder:
        model = build("llama", "regrad", place, rank=2).model
        ids = torch.ones(3, 12, dtype=torch.long, device="cuda:0")
        values, losses = passage_gradients(model, ids, torch.ones_like(ids))
    assert device_of(values) == device_of(losses) == "cuda:0"
    assert values.dtype == losses.dtype == torch.float32
    # the check for short passages reads one number, and adapters scale by none
    assert set(recorder.syncs) == {"value methods/regrad/encoding/gradients.py:passage_gradients"}
    assert (recorder.peak["cuda:1"] > 0) == (place == "two")


def test_only_sampled_rows_leave_the_device_during_generation():
    with fake_tensors(), MemoryRecorder() as recorder:
        scores = torch.randn(4, 50, device="cuda:0")
        ids = torch.ones(4, 3, dtype=torch.long, device="cuda:0")
        greedy = TokenSampler([None] * 4)
        assert not greedy.rows
        found = TokenSampler([Sampling(0.7), None, Sampling(1.0), None])(ids, scores)
    assert device_of(found) == "cuda:0"
    assert recorder.syncs == {"copy evaluation/sampling.py:__call__": 2}


GRAPHS = [
    ("bert", {"grouping": "quantize"}),
    ("bert", {"grouping": "distance", "threshold": 0.5}),
    ("bert", {"grouping": "kmeans"}),
    ("bert", {"grouping": "gold"}),
    ("llama", {"grouping": "quantize"}),
    ("llama", {"grouping": "distance", "threshold": 0.5}),
    ("t5", {"grouping": "window", "window_size": 5, "attention_kinds": ("self",)}),
]


@pytest.mark.long
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("executor", ["dense", "blocks"])
@pytest.mark.parametrize(("family", "settings"), GRAPHS, ids=lambda value: str(value))
def test_graphs_are_predicted_on_the_device_of_their_layer(family, settings, executor, place, monkeypatch):
    if (family, place) == ("t5", "two"):
        pytest.skip("transformers adds T5's bias to a mask on another device in the attention that is not converted")
    monkeypatch.setattr(SparsefinderAttention, "_is_active", lambda _: True)
    # numbers of key blocks are values: every row takes one
    monkeypatch.setattr(gathering, "unique", lambda widths: widths[:1])
    monkeypatch.setattr(gathering, "integers", lambda _: [1])
    predicted: list[str] = []

    def seen(module: SparsefinderAttention, *arguments: Any) -> Any:
        graph = original(module, *arguments)
        predicted.append(device_of(graph.dense(arguments[0].query.device)))
        return graph

    with fake_tensors(), MemoryRecorder() as recorder, torch.no_grad():
        converted = build(family, "sparsefinder", place, executor=executor, **settings)
        model: Any = converted.model
        original = SparsefinderAttention.current_graph
        monkeypatch.setattr(SparsefinderAttention, "current_graph", seen)
        batch = sample_batch(model, BatchSize(2, 24, 6))
        model(**batch)
    assert len(predicted) == len(sparsefinder_modules(model))
    assert set(predicted) == ({"cuda:0", "cuda:1"} if place == "two" else {"cuda:0"})
    assert not {site: count for site, count in recorder.syncs.items() if site.startswith("copy")}


@pytest.mark.parametrize("place", PLACES)
def test_calibration_of_cald_stays_on_the_devices_of_the_model(place):
    with fake_tensors(), MemoryRecorder():
        dense = build("roberta", None, place).model
        sample = [{"input_ids": torch.ones(2, 12, dtype=torch.long), "attention_mask": torch.ones(2, 12)}] * 2
        student = build("roberta", "cald", place, rank=8, share="layer").model
        ranks.initialize(student, dense, sample)
        found = ranks.mean_attention(dense, sample)
        assert [layer.path for layer in ranks.suggest_ranks(dense, sample)] == list(found)


class Words:
    """Tokenizer of one token per word, in batches of token ids."""

    pad_token_id = eos_token_id = bos_token_id = 0
    padding_side = "right"

    def __call__(self, text: Any, *_: Any, **__: Any) -> dict[str, Any]:
        if isinstance(text, str):
            return {"input_ids": [1] * len(text.split()), "attention_mask": [1] * len(text.split())}
        rows = [self(each) for each in text]
        return {name: [row[name] for row in rows] for name in rows[0]}


@pytest.mark.parametrize("place", PLACES)
def test_calibration_of_topk_stays_on_the_devices_of_the_model(place):
    rows = [Example("0", "one two three four", "five"), Example("1", "six seven", "eight")]
    with fake_tensors(), MemoryRecorder():
        model: nn.Module = build("llama", None, place).model
        method = NAMES.get("topk")(attention_k="auto:0.95")
        calibrated: Any = method.calibrate(model, Words(), rows)
    assert len(calibrated.config.attention_k) == tiny_model("llama").config.num_hidden_layers


COMPILED = [
    ("llama", "topk", {"attention_k": 8, "feed_forward_k": 8}, True),
    ("roberta", "cald", {"rank": 8}, True),
    ("bert", "sparsefinder", {"alpha": 1.5}, True),
    ("bert", "sparsefinder", {"grouping": "quantize"}, True),
    # the current update is a context variable, which ends a compiled part
    ("llama", "regrad", {"rank": 2}, False),
]


@pytest.mark.long
# torch warns of its own functions while it traces
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["one", "bf16"])
@pytest.mark.parametrize(("family", "method", "settings", "whole"), COMPILED, ids=lambda value: str(value))
def test_compilation_traces_the_forward_pass_for_cuda(family, method, settings, whole, dtype, monkeypatch):
    monkeypatch.setattr(SparsefinderAttention, "_is_active", lambda _: True)
    parts: list[set[str]] = []

    def backend(module: Any, inputs: Any) -> Any:
        values = [node.meta.get("example_value") for node in module.graph.nodes]
        parts.append({device_of(value) for value in values if isinstance(value, torch.Tensor)})
        return module.forward

    torch._dynamo.reset()
    with fake_tensors(), torch.no_grad():
        model: Any = build(family, method, dtype, **settings).model.eval()
        ids = torch.ones(2, 24, dtype=torch.long, device="cuda:0")
        options = {"use_cache": False} if family == "llama" else {}
        outputs = torch.compile(model, backend=backend, fullgraph=whole)(input_ids=ids, **options)
    assert device_of(outputs[0]) == "cuda:0"
    assert parts
    assert len(parts) == 1 or not whole
    assert set().union(*parts) == {"cuda:0"}
