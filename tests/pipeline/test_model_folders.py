"""Model folders that cannot be loaded: one error of Graftwork that names the file, and never a random model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from graftwork.demo import shipped_model
from graftwork.errors import CheckpointMismatchError, ConfigError, GraftworkError
from graftwork.pipeline.loading import load, load_model
from graftwork.settings.evaluation import EvaluationSettings

WEIGHTS = "model.safetensors"


def _without(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink()


def gguf(folder: Path) -> None:
    _without(folder, WEIGHTS)
    (folder / "model.gguf").write_bytes(b"GGUF\x03\0\0\0")


def gguf_alone(folder: Path) -> None:
    gguf(folder)
    _without(folder, "config.json")


def original_pth(folder: Path) -> None:
    _without(folder, WEIGHTS)
    (folder / "consolidated.00.pth").write_bytes(b"PK")


def pointer(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2631440\n")


def tokenizer_pointer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def truncated(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def truncated_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100])


def empty_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def missing_shard(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def shard_outside(folder: Path) -> None:
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))


def adapter(folder: Path) -> None:
    _without(folder, WEIGHTS, "config.json")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")


def own_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "code.Config"}, "model_type": "own"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('executed')")


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("")


def broken_tokenizer(folder: Path) -> None:
    content = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(content[: len(content) // 2])


def broken_bin(folder: Path) -> None:
    _without(folder, WEIGHTS)
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 damaged")


FOLDERS: dict[Callable[[Path], None], tuple[type[GraftworkError], str]] = {
    gguf: (ConfigError, r"found model\.gguf, weights in another format"),
    gguf_alone: (ConfigError, r"found no config\.json but .*model\.gguf"),
    original_pth: (ConfigError, r"found consolidated\.00\.pth, weights in another format"),
    pointer: (CheckpointMismatchError, r"model\.safetensors is a pointer of Git LFS"),
    tokenizer_pointer: (CheckpointMismatchError, r"tokenizer\.json is a pointer of Git LFS"),
    truncated: (CheckpointMismatchError, r"model\.safetensors is damaged: it has \d+ bytes; its header describes"),
    truncated_header: (CheckpointMismatchError, r"model\.safetensors is damaged: its header"),
    empty_weights: (CheckpointMismatchError, r"model\.safetensors is damaged: it has 0 bytes"),
    missing_shard: (CheckpointMismatchError, r"Found no .*model-00002-of-00002\.safetensors"),
    shard_outside: (GraftworkError, r"index\.json: found the file name '\.\./other\.safetensors'"),
    adapter: (ConfigError, r"adapter_config\.json names no base model"),
    own_code: (ConfigError, r"of type 'own' needs code from its folder \(auto_map\), which Graftwork never runs"),
    broken_config: (ConfigError, r"config\.json, line 1: found Expecting value"),
    broken_tokenizer: (ConfigError, r"Cannot load a model from .*broken_tokenizer"),
    broken_bin: (ConfigError, r"Cannot load a model from .*broken_bin"),
}


@pytest.mark.parametrize("change", FOLDERS, ids=lambda change: change.__name__)
def test_a_folder_that_cannot_be_loaded_names_the_file(change, tmp_path, capfd):
    kind, message = FOLDERS[change]
    folder = tmp_path / change.__name__
    shutil.copytree(shipped_model("encoder_decoder"), folder)
    change(folder)
    with pytest.raises(kind, match=message) as caught:
        load(folder)
    assert not any(advice in str(caught.value) for advice in ("trust_remote_code", "weights_only"))
    assert "Do you wish to run" not in "".join(capfd.readouterr())


def test_a_model_without_a_usable_tokenizer_can_be_converted_but_not_asked(tmp_path):
    from graftwork.pipeline.answers import predict

    folder = tmp_path / "model"
    shutil.copytree(shipped_model("encoder_decoder"), folder)
    _without(folder, "tokenizer.json", "tokenizer_config.json")
    (tmp_path / "input.txt").write_text("where is it?\n")
    loaded = load(folder)
    assert loaded.tokenizer is None
    with pytest.raises(ConfigError, match="without a tokenizer"):
        list(predict(loaded, tmp_path / "input.txt", EvaluationSettings(max_new_tokens=2)))
    with pytest.raises(ConfigError, match="no usable tokenizer"):
        load_model(str(folder))
    # transformers builds an empty tokenizer from a file of settings only
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    assert load(folder).tokenizer is None


def test_sharded_weights_and_random_weights_are_loaded_on_request(tmp_path):
    model, tokenizer = load_model(shipped_model("encoder_decoder"))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="500KB")
    tokenizer.save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    again, _ = load_model(str(tmp_path / "sharded"))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    for path in (tmp_path / "sharded").glob("model*"):
        path.unlink()
    started = load(tmp_path / "sharded", random_weights=True)
    assert started.configuration().random_weights
    assert not torch.equal(started.model.shared.weight, model.shared.weight)
