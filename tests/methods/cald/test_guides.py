"""Guides: teacher and schedule of each, frozen parts, losses, and exact resumption."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftwork.core.digests import changed_sources
from graftwork.errors import CheckpointMismatchError, ConfigError
from graftwork.methods.cald import Cald, CaldConfig
from graftwork.methods.cald import guides as guides_module
from graftwork.methods.cald.distances import layer_distances, layer_loss, output_divergence
from graftwork.methods.cald.guides import FixedTeacher, MovingTeacher, Waypoints, snapshot_at, sorted_snapshots
from graftwork.methods.cald.modules import LinformerAttention
from graftwork.pipeline.loading import load
from graftwork.surgery.modules import GRAFT
from graftwork.training.checkpoints import PHASE_FILE, last_checkpoint
from methods.cald.runs import (
    KilledError,
    assert_close,
    during_batch,
    examples,
    kill,
    log,
    model,
    start,
    state,
    terminate,
    train,
    values,
)


def settings_of(guide, dense):
    """Settings that each guide requires."""
    return {
        "dense": {},
        "unguided": {},
        "target": {"teacher": str(dense)},
        "trajectory": {"teacher_update_cycle": 2, "save_teacher": True},
        "waypoint": {"snapshots": str(dense / "train" / "distill" / "checkpoint-*")},
        "hybrid": {"teacher": str(dense), "distill_steps": 5},
    }[guide] | {"guide": guide}


GUIDES = ["dense", "unguided", "target", "trajectory", "waypoint", "hybrid"]


DEFAULT_RESUMES = [("target", "killed", 1), ("trajectory", "SIGTERM", 2)]
"""Combinations of the default suite; the others are long tests."""
RESUMES = [
    pytest.param(*each, marks=() if each in DEFAULT_RESUMES else pytest.mark.long)
    for each in ((guide, how, steps) for guide in GUIDES for how, steps in (("killed", 1), ("SIGTERM", 2)))
]


@pytest.mark.parametrize(("guide", "how", "accumulation"), RESUMES)
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(guide, how, accumulation, dense, tmp_path):
    """See `settings_of` for the guides."""
    config = settings_of(guide, dense)
    # an epoch has 10 or 5 updates: the kill resumes in the middle of one, the signal at the end of one
    settings = values(gradient_accumulation_steps=accumulation)
    expected = train(start(0.1, **config), tmp_path / "whole", settings)
    stopped = 6 * accumulation if how == "killed" else 5 * accumulation - 1
    with (
        during_batch(stopped, kill if how == "killed" else terminate),
        pytest.raises(KilledError if how == "killed" else KeyboardInterrupt),
    ):
        train(start(0.1, **config), tmp_path / "cut", settings)
    place = tmp_path / "cut" / "train" / "distill"
    assert last_checkpoint(place).name == ("checkpoint-4" if how == "killed" else "checkpoint-5")
    resumed = train(start(0.1, **config), tmp_path / "cut", settings)
    assert_close(resumed, expected, 0)
    rows, others = log(tmp_path / "cut"), log(tmp_path / "whole")
    assert [row["step"] for row in rows] == list(range(1, 11))
    keys = ("step", "loss", "ce", "layer", "teacher/loss", "teacher/lr", "teacher/step", "teacher/snapshot")
    assert [{key: row.get(key) for key in keys} for row in rows] == [
        {key: row.get(key) for key in keys} for row in others
    ]
    if guide == "trajectory":
        teachers = [load_file(tmp_path / name / "train/distill/teacher/model.safetensors") for name in ("cut", "whole")]
        assert_close(*teachers, 0)


def test_a_trajectory_teacher_is_an_independent_dense_run(tmp_path):
    settings = values(weight_decay=0.01, warmup_steps=2, max_grad_norm=0.5)
    expected = train(start(guide="dense"), tmp_path / "dense", settings)
    train(start(guide="trajectory", save_teacher=True), tmp_path / "student", settings)
    found = load_file(tmp_path / "student" / "train/distill/teacher/model.safetensors")
    assert_close(found, state(expected))


@pytest.mark.parametrize(("cycle", "updates"), [(1, 10), (2, 5), (3, 3)])
def test_a_trajectory_teacher_is_updated_every_n_updates_of_the_whole_run(cycle, updates, tmp_path):
    # five updates per epoch; the count continues across epochs
    settings = values(gradient_accumulation_steps=2)
    train(start(guide="trajectory", teacher_update_cycle=cycle), tmp_path / "run", settings)
    rows = log(tmp_path / "run")
    saved = torch.load(last_checkpoint(tmp_path / "run/train/distill") / PHASE_FILE, weights_only=True)
    assert saved["updates"] == updates
    assert saved["schedule"]["_last_lr"] == [0.0, 0.0]
    done = [row["teacher/step"] for row in rows]
    assert done == [float((row["step"] - 1) // cycle) for row in rows]


def test_the_reference_schedule_of_the_teacher_does_not_reach_zero(tmp_path):
    train(start(guide="trajectory", teacher_update_cycle=2, teacher_schedule="reference"), tmp_path / "run", values())
    saved = torch.load(last_checkpoint(tmp_path / "run/train/distill") / PHASE_FILE, weights_only=True)
    assert saved["schedule"]["_last_lr"] == pytest.approx([0.5e-2] * 2)


def test_the_teacher_starts_as_the_source_and_is_not_changed_by_the_student(tmp_path, monkeypatch):
    seen, kept = [], MovingTeacher.outputs

    def outputs(self, batch):
        found = kept(self, batch)
        seen.append((batch, found))
        return found

    monkeypatch.setattr(MovingTeacher, "outputs", outputs)
    for weight in (1.0, 30.0):
        train(start(guide="trajectory", layer_weight=weight, save_teacher=True), tmp_path / str(weight), values())
    batch, found = seen[0]
    with torch.no_grad():
        expected = model()(**batch, output_hidden_states=True)
    torch.testing.assert_close(found.logits, expected.logits)
    teachers = [load_file(tmp_path / name / "train/distill/teacher/model.safetensors") for name in ("1.0", "30.0")]
    assert_close(*teachers, 0)


def test_hybrid_guidance_ends_after_distill_steps(dense, tmp_path, monkeypatch):
    calls, kept = [], FixedTeacher.outputs
    monkeypatch.setattr(FixedTeacher, "outputs", lambda self, batch: calls.append(1) or kept(self, batch))
    settings = values(max_steps=6, gradient_accumulation_steps=2)
    train(start(guide="hybrid", teacher=str(dense), distill_steps=3), tmp_path / "run", settings)
    assert len(calls) == 6
    assert [row["step"] for row in log(tmp_path / "run") if "layer" in row] == [1, 2, 3]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_fixed_teacher_is_frozen_and_uses_dropout_only_in_train_mode(mode, dense, tmp_path, monkeypatch):
    guides, kept = [], FixedTeacher.begin
    monkeypatch.setattr(FixedTeacher, "begin", lambda self, run: guides.append(self) or kept(self, run))
    converted = start(0.3, guide="target", teacher=str(dense), teacher_mode=mode)
    train(converted, tmp_path / "run", values(max_steps=3))
    teacher = guides[0].teacher
    assert teacher.training == (mode == "train")
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    assert_close(state(teacher), load_file(dense / "model" / "model.safetensors"), 0)
    batch = {"input_ids": torch.arange(3, 9)[None]}
    one, other = (guides[0].outputs(batch).logits for _ in range(2))
    assert torch.equal(one, other) == (mode == "eval")


def test_with_zero_weights_there_is_no_teacher_and_the_loss_is_the_task_loss(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(FixedTeacher, "outputs", lambda self, batch: pytest.fail("a teacher forward ran"))
    train(start(guide="target", teacher=str(dense), layer_weight=0.0), tmp_path / "run", values(max_steps=2))
    assert [row["loss"] for row in log(tmp_path / "run")] == pytest.approx(
        [row["ce"] for row in log(tmp_path / "run")], abs=1e-4
    )


def test_a_student_starts_from_its_target_or_from_its_source(dense, tmp_path):
    target = load_file(dense / "model" / "model.safetensors")
    for place, expected in (("target", target), ("source", state(model()))):
        converted = start(guide="target", teacher=str(dense), student_init=place)
        train(converted, tmp_path / place, values(max_steps=1, learning_rate=1e-12))
        found = {name: value for name, value in state(converted.model).items() if GRAFT not in name}
        assert_close(found, expected)


def test_snapshots_are_split_over_updates_as_published():
    names = [f"epoch_{number}" for number in range(10)]
    assert [snapshot_at(s, 100, names, "equal_split") for s in (0, 9, 10, 89, 90, 99)] == [0, 0, 1, 8, 9, 9]
    assert [snapshot_at(s, 103, names, "equal_split") for s in (89, 90, 102)] == [8, 9, 9]
    assert [snapshot_at(s, 10, names[:3], "equal_split") for s in range(10)] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    steps = [f"step_{number}" for number in range(10_000, 100_000, 10_000)]
    ahead = [snapshot_at(s, 100_000, steps, "next_ahead") for s in (0, 9_999, 10_000, 89_999, 90_000, 99_999)]
    assert ahead == [0, 0, 1, 8, 8, 8]
    with pytest.raises(ConfigError, match="does not end with a number"):
        snapshot_at(0, 10, ["first", "second"], "next_ahead")


def test_snapshots_are_sorted_by_number(tmp_path):
    for name in ("epoch_10", "epoch_9", "epoch_0"):
        (tmp_path / name).mkdir()
    found = [Path(name).name for name in sorted_snapshots(str(tmp_path / "epoch_*"))]
    assert found == ["epoch_0", "epoch_9", "epoch_10"]
    with pytest.raises(ConfigError, match="Found no path for the snapshots"):
        sorted_snapshots(str(tmp_path / "step_*"))


def test_waypoints_are_loaded_in_order(dense, tmp_path, monkeypatch):
    loaded, kept = [], guides_module.weights.load_dense
    monkeypatch.setattr(
        guides_module.weights,
        "load_dense",
        lambda model, file, rule: loaded.append(file.parent.name) or kept(model, file, rule),
    )
    train(start(**settings_of("waypoint", dense)), tmp_path / "run", values())
    assert loaded == [f"checkpoint-{number}" for number in (2, 4, 6, 8, 10)]
    assert [row["teacher/snapshot"] for row in log(tmp_path / "run")] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_invalid_teachers_are_refused_before_training(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(Cald, "measure", lambda *arguments: {})
    snapshots = tmp_path / "snapshots"
    for number in (1, 2):
        folder = snapshots / f"epoch_{number}"
        folder.mkdir(parents=True)
        tensors = load_file(dense / "model" / "model.safetensors")
        if number == 2:
            tensors["classifier.weight"] = torch.zeros(3, 16)
        save_file(tensors, folder / "model.safetensors")
    refused = [
        (CheckpointMismatchError, r"epoch_2.*classifier.weight \[3, 16\] instead of \[2, 16\]", snapshots / "epoch_*"),
        (ConfigError, "5 snapshots .* and 3 updates", dense / "train" / "distill" / "checkpoint-*"),
        (ConfigError, "Found no path", tmp_path / "nowhere-*"),
    ]
    for number, (kind, words, pattern) in enumerate(refused):
        with pytest.raises(kind, match=words) as error:
            train(start(guide="waypoint", snapshots=str(pattern)), tmp_path / f"run{number}", values(max_steps=3))
        assert "\n" not in str(error.value)
        assert not log(tmp_path / f"run{number}")
    with pytest.raises(ConfigError, match=r"example of 16 tokens\. Expected at most 10"):
        train(start(positions=10), tmp_path / "long", values(), examples(lengths=(4, 16)))


def test_resuming_with_other_snapshots_is_refused(dense, tmp_path):
    config = settings_of("waypoint", dense)
    with during_batch(5, terminate), pytest.raises(KeyboardInterrupt):
        train(start(**config), tmp_path / "run", values())
    guide = Waypoints(CaldConfig(**config))
    guide.names = sorted_snapshots(config["snapshots"])[1:]
    with pytest.raises(CheckpointMismatchError, match="Expected the 5 with which this run started"):
        guide.load_state({"snapshots": sorted_snapshots(config["snapshots"])})


def test_the_objective_reproduces_the_numbers_of_the_specification():
    plain, scaled = CaldConfig(scale_output_loss=False), CaldConfig()
    for student, teacher, expected in (((2.0, 0.0), (0.0, 2.0), 0.462117), ((4.0, 0.0), (0.0, 0.0), 0.433781)):
        pair = torch.tensor([student]), torch.tensor([teacher])
        assert float(output_divergence(*pair, plain)) == pytest.approx(expected, abs=1e-6)
        assert float(output_divergence(*pair, scaled)) == pytest.approx(4 * expected, abs=2e-6)
    states = torch.tensor([[[1.0, 2], [3, 4]]]), torch.tensor([[[1.0, 0], [0, 4]]])
    one = layer_distances((states[0],), (states[1],), None, CaldConfig())
    assert float(one[0]) == pytest.approx(3.25)
    two = layer_distances((states[0],) * 2, (states[1],) * 2, None, CaldConfig())
    assert float(layer_loss(two, CaldConfig())) == pytest.approx(6.5)
    assert float(layer_loss(two, CaldConfig(layer_reduction="mean"))) == pytest.approx(3.25)
    assert list(layer_distances((states[0],) * 4, (states[1],) * 4, None, CaldConfig(skip_first_layers=1))) == [1, 2, 3]


def test_padding_is_excluded_from_the_distance_by_default():
    generator = torch.Generator().manual_seed(0)
    student, teacher, other = (torch.randn(2, 5, 3, generator=generator) for _ in range(3))
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    changed = torch.where(mask[..., None], teacher, other)
    for masked in (True, False):
        config = CaldConfig(mask_layer_loss=masked)
        one, two = (layer_distances((student,), (each,), mask, config)[0] for each in (teacher, changed))
        assert torch.equal(one, two) == masked
    real = layer_distances((student,), (teacher,), mask, CaldConfig())[0]
    torch.testing.assert_close(real, (student - teacher)[mask].square().mean())
    assert CaldConfig(compat="reference").loss_is_masked is False
    assert CaldConfig(compat="reference", mask_layer_loss=True).loss_is_masked is True
    assert CaldConfig(compat="reference").teacher_drops_out


@pytest.mark.parametrize("rows", [104_743, 363_846, 67_349, 25_000])
def test_a_warm_up_of_six_percent_equals_the_published_steps(rows):
    published = {104_743: 1964, 363_846: 6823, 67_349: 1263, 25_000: 469}
    for batch, accumulation in ((32, 1), (16, 2)):
        batches = -(-rows // batch)
        updates = 10 * -(-batches // accumulation)
        assert round(0.06 * updates) == published[rows]


def test_the_warm_up_reaches_the_trainer(tmp_path):
    train(start(), tmp_path / "run", values(max_steps=40, warmup_ratio=0.1, learning_rate=1.0, save_steps=40))
    rate = {row["step"]: row["learning_rate"] for row in log(tmp_path / "run")}
    # the log has the rate used by an update; the rate of update 23 is the schedule after 22
    assert [rate[step] for step in (1, 2, 5, 23)] == pytest.approx([0.0, 0.25, 1.0, 0.5])
    train(start(compat="reference"), tmp_path / "reference", values(max_steps=25, learning_rate=1.0))
    rate = {row["step"]: row["learning_rate"] for row in log(tmp_path / "reference")}
    assert [rate[step] for step in (1, 2)] == pytest.approx([0.0, 1.0])


def test_one_large_batch_equals_two_accumulated_ones(tmp_path):
    rows, found = examples(lengths=(6, 6)), {}
    for name, batch, accumulation in (("one", 4, 1), ("two", 2, 2)):
        # SGD: AdamW amplifies rounding errors of zero gradients, such as that of a dense key bias
        settings = values(
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, optim="sgd", max_steps=5
        )
        converted = start(guide="trajectory", save_teacher=True)
        train(converted, tmp_path / name, settings, rows)
        found[name] = state(converted.model), load_file(tmp_path / name / "train/distill/teacher/model.safetensors")
    for one, two in zip(found["one"], found["two"], strict=True):
        assert_close(one, two)


def test_only_compression_matrices_are_trained_during_freeze_steps(tmp_path):
    before = state(start().model)
    for steps, others in ((2, False), (3, True)):
        converted = start(freeze_steps=2)
        train(converted, tmp_path / str(steps), values(max_steps=steps, lr_scheduler_type="constant", weight_decay=0.1))
        moved = {name for name, value in state(converted.model).items() if not torch.equal(value, before[name])}
        assert {name for name in before if GRAFT in name} <= moved
        assert bool({name for name in moved if GRAFT not in name}) == others


def test_a_shared_matrix_is_in_the_optimizer_once_and_decays_once(tmp_path, monkeypatch):
    from graftwork.training.trainer import PhaseTrainer

    trainers, kept = [], PhaseTrainer.create_optimizer

    def create(self, *arguments, **options):
        trainers.append(self)
        return kept(self, *arguments, **options)

    monkeypatch.setattr(PhaseTrainer, "create_optimizer", create)
    converted = start(share="layer")
    matrix = next(m for m in converted.model.modules() if isinstance(m, LinformerAttention)).projection
    train(converted, tmp_path / "run", values(max_steps=1, weight_decay=0.25))
    groups = trainers[0].optimizer.param_groups
    holding = [group["weight_decay"] for group in groups for each in group["params"] if each is matrix]
    assert holding == [0.25]


def test_bfloat16_trains_every_guide_with_float32_weights(dense, tmp_path):
    for guide in ("target", "trajectory"):
        converted = start(**settings_of(guide, dense))
        train(converted, tmp_path / guide, values(bf16=True, max_steps=3))
        assert {parameter.dtype for parameter in converted.model.parameters()} == {torch.float32}
        assert all(row["layer"] > 0 for row in log(tmp_path / guide))


def test_measure_returns_the_distance_to_the_teacher_per_layer(dense):
    loaded = load(dense)
    batch = {"input_ids": torch.arange(3, 9)[None], "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    same = Cald(rank=16, positions=16, initialization="identity", teacher=str(dense))
    copied = copy.deepcopy(loaded.model)
    same.apply(copied)
    near = same.measure(copied, batch)
    assert set(near) == {"distance", "distance/0", "distance/1", "distance/2"}
    assert near["distance"] < 1e-9
    other = Cald(rank=4, teacher=str(dense))
    far = copy.deepcopy(loaded.model)
    other.apply(far)
    measured = other.measure(far, batch)
    assert measured["distance/0"] == 0
    assert measured["distance"] == pytest.approx(measured["distance/1"] + measured["distance/2"])
    assert Cald(rank=4).measure(far, batch) == {}


def test_a_run_records_its_guide_as_json(dense, tmp_path):
    train(start(**settings_of("hybrid", dense)), tmp_path / "run", values(max_steps=2))
    claimed = json.loads((tmp_path / "run/train/distill/settings.json").read_text())
    assert claimed["methods"][0]["guide"] == "hybrid"
    assert claimed["methods"][0]["distill_steps"] == 5


@pytest.mark.parametrize("guide", ["target", "waypoint"])
def test_a_teacher_that_changed_since_the_start_is_refused_and_reported(guide, dense, tmp_path):
    copied = tmp_path / "dense"
    shutil.copytree(dense, copied)
    config, settings = settings_of(guide, copied), values(max_steps=8)
    with during_batch(6, kill), pytest.raises(KilledError):
        train(start(**config), tmp_path / "run", settings)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    train(start(**config), tmp_path / "run", settings)
    place = tmp_path / "run" / "train" / "distill"
    assert changed_sources(place) == []
    files = sorted(copied.rglob("*.safetensors"))
    for file in files:
        tensors = load_file(file)
        name = sorted(tensors)[0]
        tensors[name][..., -1] += 1e-3
        save_file(tensors, file, metadata={"format": "pt"})
    assert {Path(path).name for path in changed_sources(place)} == {"model.safetensors"}
    with pytest.raises(CheckpointMismatchError, match="have changed since this training started"):
        train(start(**config), tmp_path / "other", settings)
