"""Checks of the files of a model folder before a library loads them; every fault names the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from graftwork.core.readers import join_inside, read_head, read_json_mapping, shorten
from graftwork.core.run_folder import MANIFEST_FILE, is_path, similar_folders
from graftwork.core.safetensors_files import safetensors_problem
from graftwork.errors import CheckpointMismatchError, ConfigError, IncompleteRunError

_POINTER = b"version https://git-lfs"
_POINTER_BYTES = 1024
"""Longest pointer file of Git LFS."""
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_FOREIGN = (".gguf", ".ggml", ".pth", ".pt", ".ckpt", ".h5", ".msgpack", ".onnx", ".npz", ".tflite", ".mlmodel")
"""Suffixes of weights in formats that transformers does not load from a model folder."""
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json",
    "tokenizer_config.json",
)


def check_exists(name: str | Path) -> None:
    """Refuse a path without a folder before anything is looked up on the hub, which takes long without a network.

    Raises:
        ConfigError: If the name cannot be a hub id, and there is no such folder; similar folders are named.
    """
    if not Path(name).exists() and (isinstance(name, Path) or is_path(name)):
        hint = similar_folders(name)
        raise ConfigError(
            f"Cannot load a model from {str(name)!r}: there is no such folder.{hint or ' Correct the path.'}"
        )


def check_weights(folder: Path) -> bool:
    """Check that the weights of a model folder are complete.

    Returns:
        True if there are weights; False if the folder contains a configuration only.

    Raises:
        ConfigError: If the folder contains no model, weights in another format, or code.
        CheckpointMismatchError: If a file is truncated, missing, or a pointer of Git LFS.
        IncompleteRunError: If a model that Graftwork saved has no weights.
    """
    _check_configuration(folder)
    present = sorted(path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern) if path.is_file())
    shards = _shards(folder)
    for path in dict.fromkeys([*present, *shards]):
        check_file(path)
    if present or shards:
        return True
    if foreign := sorted(path for path in folder.iterdir() if path.suffix.lower() in _FOREIGN):
        raise ConfigError(
            f"Cannot load a model from {folder}: found {foreign[0].name}, weights in another format. Expected "
            "model.safetensors or pytorch_model.bin. Convert the file with the tool that wrote it."
        )
    if (folder / MANIFEST_FILE).exists():
        raise IncompleteRunError(
            f"Found no weights in {folder}; expected model.safetensors beside its {MANIFEST_FILE}. Convert or "
            "train again, or put the file back."
        )
    return False


def weights_size(folder: Path) -> int | None:
    """Bytes of the files of weights in a model folder; None for any other path."""
    found = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    return sum(path.stat().st_size for path in found) if found else None


def stored_type(config: Any) -> str | None:
    """Data type of a checkpoint by its configuration; None if it records none, or if the weights are quantised."""
    dtype = getattr(config, "dtype", None)
    return None if is_quantised_config(config) or dtype is None else str(dtype).removeprefix("torch.")


def is_quantised_config(config: Any) -> bool:
    """True if the weights of a dense model are quantised; expects a configuration without the mark of a graft."""
    return getattr(config, "quantization_config", None) is not None


def check_file(path: Path) -> None:
    """Check that a file of a model is complete.

    Raises:
        CheckpointMismatchError: If it is missing, truncated, or a pointer of Git LFS.
    """
    if not path.is_file():
        raise CheckpointMismatchError(
            f"Found no {path}, which the index of the weights names. Copy or download the missing file."
        )
    if path.stat().st_size <= _POINTER_BYTES and read_head(path, len(_POINTER)) == _POINTER:
        raise CheckpointMismatchError(
            f"{path} is a pointer of Git LFS, not the file itself. Run `git lfs pull` in the repository of the model."
        )
    if path.suffix == ".safetensors" and (problem := safetensors_problem(path)):
        raise CheckpointMismatchError(f"{path} is damaged: {problem}. Copy or download the file again.")


def has_tokenizer(folder: Path) -> bool:
    """True if a model folder contains a file of a tokenizer.

    Raises:
        CheckpointMismatchError: If such a file is a pointer of Git LFS.
    """
    found = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    for path in found:
        check_file(path)
    return bool(found)


def _check_configuration(folder: Path) -> None:
    file = folder / "config.json"
    if not file.is_file():
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "an empty folder"
        raise ConfigError(
            f"Cannot load a model from {folder}: found no config.json but {names}. Expected a folder that "
            "save_pretrained wrote, or a run folder."
        )
    check_file(file)
    config = read_json_mapping(file, error=ConfigError)
    if "auto_map" in config and not _is_known(config.get("model_type")):
        raise code_error(str(folder), config.get("model_type"))


def code_error(name: str, model_type: Any = None) -> ConfigError:
    """Error of a model that consists of code of its own."""
    kind = "" if model_type is None else f" of type {shorten(model_type)}"
    return ConfigError(
        f"Cannot load a model from {name!r}: the model{kind} needs code from its folder (auto_map), which Graftwork "
        "never runs. Expected a model type of transformers. Choose another model, or a converted copy of this one."
    )


def _is_known(model_type: Any) -> bool:
    from transformers import CONFIG_MAPPING

    return isinstance(model_type, str) and model_type in cast("Mapping[str, Any]", CONFIG_MAPPING)


def _shards(folder: Path) -> list[Path]:
    """Files that the index of sharded weights names; empty without an index."""
    for name in _INDEXES:
        file = folder / name
        if file.is_file():
            check_file(file)
            names = read_json_mapping(file, error=CheckpointMismatchError).get("weight_map")
            if not isinstance(names, dict):
                raise CheckpointMismatchError(f"{file}: found no weight_map; expected the shard of every tensor.")
            shards = sorted({str(shard) for shard in cast("dict[str, Any]", names).values()})
            return [join_inside(folder, shard, str(file)) for shard in shards]
    return []
