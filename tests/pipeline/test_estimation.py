"""Memory estimates: compared with real runs on a CPU, and as the command prints them."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import graftwork as gw
from graftwork.cli.app import run
from graftwork.core import devices
from graftwork.errors import ConfigError
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import Converted
from graftwork.metrics.memory import MemoryRecorder
from graftwork.pipeline.estimation import announcement
from graftwork.pipeline.estimation.building import read_config, shapes
from graftwork.pipeline.estimation.estimate import Estimator, SampleTokenizer, Shape, estimate
from graftwork.pipeline.estimation.fitting import fit, parse_bytes
from graftwork.pipeline.estimation.plans import plan_of
from graftwork.pipeline.estimation.training import take_update, training_run
from graftwork.pipeline.phases import phases_of
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.training import TrainingSettings
from graftwork.training.batching import BatchSize
from tiny_models import tiny_model

SETTINGS = TrainingSettings(per_device_train_batch_size=4, max_input_tokens=40, max_target_tokens=8)


def estimated(family: str, method: gw.Method | None, settings: TrainingSettings = SETTINGS):
    config = tiny_model(family).config
    estimator = Estimator(config, Shape("cpu", "float32"))
    return estimator.training([] if method is None else [method], settings)[2]


@pytest.mark.parametrize(
    ("family", "method"),
    [("llama", None), pytest.param("t5", gw.TopK(attention_k=8), marks=pytest.mark.long)],
)
def test_the_peak_of_an_update_is_that_of_the_allocator(family, method):
    expected = estimated(family, method)
    model = tiny_model(family).float()
    converted = Converted(model) if method is None else convert(model, method)
    phase = phases_of(converted)[0]
    size = BatchSize(4, 40, 8)
    with training_run(model, phase, SETTINGS, size, SampleTokenizer()) as started:
        take_update(started, phase, 1)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            take_update(started, phase, 1)
    measured = highest(profiler)
    # the allocator's counter starts at zero: what was there before is the weights and the optimiser's state
    assert expected.peak - expected.weights - expected.optimizer == pytest.approx(measured, rel=0.1)


def highest(profiler: profile) -> int:
    """Highest sum of allocations and releases that the profiler recorded."""
    total = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


def test_weights_gradients_and_optimizer_are_those_of_the_model():
    memory = estimated("bert", None)
    model = tiny_model("bert")
    sizes = {p.untyped_storage()._cdata: p.numel() * 4 for p in model.parameters()}
    buffers = {b.untyped_storage()._cdata: b.numel() * b.element_size() for b in model.buffers()}
    assert memory.weights == sum((sizes | buffers).values())
    assert memory.gradients <= sum(sizes.values())
    assert memory.optimizer == pytest.approx(2 * memory.gradients, rel=0.01)


def test_checkpointing_and_smaller_batches_need_less():
    whole = estimated("llama", None)
    assert estimated("llama", None, replace(SETTINGS, gradient_checkpointing=True)).activations < whole.activations
    assert estimated("llama", None, replace(SETTINGS, per_device_train_batch_size=1)).activations < whole.activations


def test_rows_compare_the_method_with_the_dense_model_and_lora():
    rows = estimate(
        tiny_model("llama").config,
        gw.ReGrad(rank=2),
        train=replace(SETTINGS, per_device_train_batch_size=1),
        evaluate=EvaluationSettings(batch_size=2, max_input_tokens=16, max_new_tokens=4),
        shape=Shape("cuda", "float32", passage_tokens=12),
        passages=10,
    )
    assert [row.name for row in rows] == ["regrad", "dense", "lora"]
    regrad, dense, lora = rows
    assert regrad.training.gradients < dense.training.gradients
    # the adapter of rank 16 is as wide as the tiny model
    assert (lora.parameters, lora.trained) == (dense.parameters, 7424)
    assert regrad.inference.peak > dense.inference.peak
    # bfloat16 gradients of rank 2 for gate, up and down of one layer of width 16 and 24, and a real index
    assert regrad.stored["bank"] == 10 * 2 * 3 * 2 * (16 + 24)
    assert 10 * 100 < regrad.stored["index"] < 10 * 2000
    # keys and values of 2 layers, 2 rows, 2 heads of width 4 in float32; the last new token is never fed back
    assert dense.inference.cache == 2 * 2 * 2 * 2 * 4 * (16 + 4 - 1) * 4


@pytest.mark.parametrize("name", sorted(shapes()))
def test_shipped_shapes_are_configurations(name):
    config = read_config(name)
    assert config.architectures
    assert all(read_config(each).to_dict() == config.to_dict() for each in shapes()[name]["checkpoints"])


@pytest.mark.long
def test_fit_proposes_the_largest_batch_that_fits():
    config = tiny_model("llama").config
    estimator = Estimator(config, Shape("cuda", "float32"))
    settings = replace(SETTINGS, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    memory = 4_000_000
    found = fit(estimator, (), settings, memory)
    assert found.batch >= 1
    assert found.peak <= 0.9 * memory
    assert found.settings["per_device_train_batch_size"] * found.settings["gradient_accumulation_steps"] == 16
    more = replace(settings, per_device_train_batch_size=found.batch + 1)
    assert estimator.training((), more)[2].peak > 0.9 * memory
    small = fit(estimator, (), settings, 100_000)
    assert (small.batch, "devices" in small.needs) == (0, True)


@pytest.mark.long
def test_fit_proposes_the_most_passages_at_once_that_fit():
    estimator = Estimator(tiny_model("llama").config, Shape("cuda", "float32", passage_tokens=24))
    method, settings = (
        gw.ReGrad(rank=2),
        replace(SETTINGS, per_device_train_batch_size=2, gradient_accumulation_steps=1),
    )

    def peak(size: int) -> int:
        return estimator.training([method.chunked(size, 2)], settings)[2].peak

    peaks = {size: peak(size) for size in range(1, 7)}
    assert sorted(peaks.values()) == list(peaks.values())
    room = (peaks[3] + peaks[4]) // 2
    found = fit(estimator, [method], settings, int(room / 0.9) + 1)
    assert (found.settings["per_device_train_batch_size"], found.method, found.peak) == (2, {"meta_chunk": 3}, peaks[3])
    # two questions with three passages each
    assert fit(estimator, [method], settings, 10**9).method == {"meta_chunk": "all"}
    assert fit(estimator, [gw.ReGrad(rank=2, meta_chunk=2)], settings, 10**9).method == {}


@pytest.mark.parametrize(("text", "size"), [("24GB", 24 * 10**9), ("1.5 GiB", 3 * 2**29), ("80gb", 80 * 10**9)])
def test_sizes_have_units(text, size):
    assert parse_bytes(text) == size


def test_a_size_without_a_unit_is_an_error():
    with pytest.raises(ConfigError, match="24GB"):
        parse_bytes("24")


def test_a_recipe_is_a_plan():
    plan = plan_of("regrad/llama-3.2-1b-instruct_general", None, None, ["train.bf16=false"])
    assert (plan.model, plan.methods[0].name, plan.train.bf16) == ("meta-llama/Llama-3.2-1B-Instruct", "regrad", False)
    with pytest.raises(ConfigError, match="section"):
        plan_of("t5-base", None, None, ["model.x=1"])
    with pytest.raises(ConfigError, match="no method"):
        plan_of("t5-base", None, None, ["method.rank=1"])
    with pytest.raises(ConfigError, match="chosen from examples"):
        plan_of("t5-base", "topk", None, ["method.feed_forward_k=auto:0.9"])


def test_the_command_prints_labelled_json(tmp_path, capsys):
    tiny_model("bert").config.save_pretrained(tmp_path)
    command = ["estimate", str(tmp_path / "config.json"), "--no-compare", "--json", "--device", "cpu"]
    command += ["--per-device-train-batch-size", "2", "--max-input-tokens", "16"]
    assert run(command) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["label"] == "estimated"
    assert row["training"]["peak"] > row["training"]["weights"]
    assert run(["estimate", str(tmp_path / "nothing.json")]) == 2
    assert "config.json" in capsys.readouterr().err


def test_a_training_announces_its_memory_and_warns_of_a_small_device(monkeypatch, capsys, caplog):
    monkeypatch.setattr(announcement, "SMALL", 0)
    monkeypatch.setattr(announcement, "device_memory", lambda device: 1000)
    with caplog.at_level(logging.WARNING):
        announcement.announce(Converted(tiny_model("bert")), SETTINGS)
    assert "(estimated)" in capsys.readouterr().err
    assert "run out of memory" in caplog.text
    monkeypatch.setattr(announcement, "Estimator", None)
    announcement.announce(Converted(tiny_model("bert")), SETTINGS)
    assert "could not be estimated" in capsys.readouterr().err


def test_recorded_real_and_fake_updates_agree():
    expected = estimated("bert", None)
    with MemoryRecorder() as recorder:
        model = tiny_model("bert").float()
        phase = phases_of(Converted(model))[0]
        with training_run(model, phase, SETTINGS, BatchSize(4, 40, 8), None) as started:
            take_update(started, phase, 1)
            recorder.reset_peak()
            take_update(started, phase, 1)
    assert recorder.peak_bytes == pytest.approx(expected.peak, rel=0.02)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("has", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_an_estimate_for_a_cpu_has_the_type_in_which_a_cpu_loads_the_model(has, dtype, monkeypatch):
    monkeypatch.setattr(devices, "has_instructions", lambda dtype: has)
    assert Estimator("llama-3.2-1b", Shape("cpu")).dtype == dtype
    assert Estimator("llama-3.2-1b", Shape("cpu", "float16")).dtype == torch.float16
    assert Estimator("llama-3.2-1b", Shape("cuda")).dtype == torch.bfloat16
