"""One function decides device, device map and data type."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from graftwork.core import devices
from graftwork.core.devices import ACCELERATOR, Placement, announce, default_device, place, trains_on_cpu
from graftwork.errors import ConfigError

SOURCE = Path(__file__).parents[2] / "src" / "graftwork"
OWNER = SOURCE / "core" / "devices.py"
LOADERS = {SOURCE / "pipeline" / "loading.py", SOURCE / "retrieval" / "text_encoder.py"}
"""Loaders of grafted models, and of the encoders of retrieval; both ask `place`."""
KINDS = ("cuda", "xpu", "mps", "npu", "hpu")
ESTIMATES = {
    "cli/estimate.py",
    "metrics/fake_tensors.py",
    "metrics/memory.py",
    "pipeline/estimation/announcement.py",
    "pipeline/estimation/estimate.py",
}
"""Files that name the kind of a device to estimate memory for, where no model is loaded."""
TRANSLATIONS = {"pipeline/harness/model.py"}
"""Files that translate the option of another program, `parallelize` of lm-eval, to a device map."""
DECISIONS = {"is_available", "current_accelerator", "device_count", "set_device_index", "current_device_index"}


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setattr(devices, "accelerators", lambda: ("fake:0", "fake:1"))


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(devices, "accelerators", tuple)
    monkeypatch.setattr(devices, "has_instructions", lambda dtype: False)
    monkeypatch.setattr(devices, "free_memory", lambda: 10_000)


def processes(monkeypatch, rank, count):
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(count))


def test_a_model_goes_to_the_accelerator_in_the_type_of_its_checkpoint(two):
    placement = place("bfloat16")
    assert placement.options() == {"dtype": "bfloat16", "device_map": {"": "fake:0"}}
    assert place("bfloat16", device="fake") == place("bfloat16", device="fake:0")


def test_each_process_has_its_own_accelerator(two, monkeypatch):
    processes(monkeypatch, 1, 2)
    assert place().device == "fake:1"
    assert place(device="fake").device == "fake:1"
    with pytest.raises(ConfigError, match="which would share it"):
        place(device="fake:0")


def test_a_device_that_is_given_wins(two):
    assert place(device="cpu").options() == {"dtype": "auto"}
    assert place(device="fake:1").device == "fake:1"
    with default_device("cpu"):
        assert place().device == "cpu"
        assert place(device="fake:1").device == "fake:1"
        assert place(device_map="auto").device == "fake:0"
    assert place().device == "fake:0"


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "fake:2", "gpu"])
def test_an_unknown_device_is_refused_with_those_that_exist(two, name):
    with pytest.raises(ConfigError, match="Expected one of: cpu, fake:0, fake:1"):
        place(device=name)


def test_an_accelerator_that_is_required_must_exist(plain, monkeypatch):
    with pytest.raises(ConfigError, match="'accelerator'"):
        place(device=ACCELERATOR)
    monkeypatch.setattr(devices, "accelerators", lambda: ("fake:0",))
    assert place(device=ACCELERATOR).device == "fake:0"


def test_a_device_and_a_device_map_contradict_each_other(two):
    with pytest.raises(ConfigError, match="Expected one of them"):
        place(device="cpu", device_map="auto")
    assert place("float16", device_map="auto").options() == {"dtype": "float16", "device_map": "auto"}


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_a_cpu_without_instructions_computes_in_float32(plain, stored, monkeypatch):
    placement = place(stored, size=1_000)
    # loaded as stored, so that the weights keep their identity
    assert (placement.dtype, placement.widened, placement.options()) == ("float32", True, {"dtype": stored})
    assert place(stored, dtype=stored).dtype == stored
    assert not place(stored, dtype="float32").widened
    assert place(stored, size=6_000).dtype == stored
    assert "does not fit" in place(stored, size=6_000).why
    monkeypatch.setattr(devices, "has_instructions", lambda dtype: True)
    assert place(stored).dtype == stored


@pytest.mark.parametrize("stored", ["float32", "float64"])
def test_wide_checkpoints_keep_their_type_on_a_cpu(plain, stored):
    assert place(stored) == Placement(
        "cpu", stored, None, stored, where="no accelerator found", why="type of the checkpoint"
    )


def test_the_instructions_of_the_cpu_are_asked_for():
    import torch

    assert devices.has_instructions("bfloat16") == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert devices.has_instructions("float16") == torch.ops.mkldnn._is_mkldnn_fp16_supported()


def test_one_line_names_device_type_and_reasons(plain, monkeypatch):
    lines = []
    monkeypatch.setattr(devices, "say", lines.append)
    monkeypatch.setattr(devices, "_ANNOUNCED", set())
    for _ in range(2):
        announce(place("bfloat16"), "m")
    assert lines == [
        "m: on cpu in float32 (no accelerator found; the checkpoint is in bfloat16, for which this CPU has no "
        "instructions; dtype bfloat16 keeps it)"
    ]


def test_a_training_runs_on_the_cpu_or_on_the_accelerator_of_the_trainer(two, monkeypatch):
    assert trains_on_cpu("cpu")
    assert not trains_on_cpu(None)
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=1"):
        trains_on_cpu("fake:1")
    monkeypatch.setattr(devices, "accelerators", tuple)
    assert trains_on_cpu(None)


def decisions(path: Path) -> list[str]:
    """Expressions of a file that choose a device, or load a model."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if any(text == f"torch.{kind}" for kind in KINDS) or node.attr in KINDS or node.attr == "is_cuda":
                found.append(text)
            if node.attr in DECISIONS and "distributed" not in text and "ray" not in text:
                found.append(text)
        elif isinstance(node, ast.Call) and "from_pretrained" in ast.unparse(node.func) and path not in LOADERS:
            text = ast.unparse(node.func)
            # adapters of PEFT are put on the device of the modules that they change
            if not any(word in text.lower() for word in ("tokenizer", "config", "peft")):
                found.append(text)
        elif isinstance(node, ast.keyword) and node.arg == "device_map" and isinstance(node.value, ast.Constant):
            found.append(f"device_map={node.value.value!r}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.split(":")[0] in KINDS:
            found.append(repr(node.value))
    return found


def test_nothing_but_the_owner_chooses_a_device():
    found = {path.relative_to(SOURCE).as_posix(): decisions(path) for path in SOURCE.rglob("*.py") if path != OWNER}
    assert {name for name, texts in found.items() if texts} == ESTIMATES | TRANSLATIONS


@pytest.mark.parametrize(
    "line",
    [
        "model.cuda()",
        "torch.device('cuda:0')",
        "torch.cuda.is_available()",
        "torch.accelerator.is_available()",
        "AutoModelForCausalLM.from_pretrained(name)",
        "load(name, device_map='auto')",
    ],
)
def test_a_decision_elsewhere_is_found(line, tmp_path):
    (tmp_path / "a.py").write_text(f"import torch\n{line}\n")
    assert decisions(tmp_path / "a.py")
