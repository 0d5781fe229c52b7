"""Comparison of the dense weights inside a graft with the checkpoint that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.core.readers import read_json_mapping
from graftwork.errors import ConfigError
from graftwork.grafting.marks import is_marked
from graftwork.grafting.saving import applied_to
from graftwork.surgery.sites import pretrained


def other_methods(model: nn.Module, name: str) -> list[str]:
    """Names of the methods on a model, except one, that change modules."""
    return [other for other, (_, changes) in applied_to(pretrained(model)).items() if changes and other != name]


def is_graft_folder(folder: Path) -> bool:
    """True if the configuration in a model folder carries the mark of a graft."""
    file = folder / "config.json"
    return file.is_file() and is_marked(read_json_mapping(file, error=ConfigError).get("quantization_config"))


def changed_weight(model: nn.Module, base: str, load_dense: Callable[[], nn.Module]) -> str | None:
    """Name of the first weight of a checkpoint that differs inside a graft; None if all are equal.

    Tensors are read one by one from a folder with safetensors files of the same names; other checkpoints are loaded.

    Args:
        model: The graft.
        base: Folder or hub id of the checkpoint.
        load_dense: Loads the checkpoint with the data type of the graft.
    """
    own: Mapping[str, Tensor] = pretrained(model).state_dict()
    files = sorted(Path(base).glob("*.safetensors")) if Path(base).is_dir() else []
    names = {name for path in files for name in _tensors(path).keys()}  # noqa: SIM118 (no mapping)
    if not names or not names <= own.keys():
        dense: Mapping[str, Tensor] = pretrained(load_dense()).state_dict()
        return next((name for name, tensor in dense.items() if not _same(own.get(name), tensor)), None)
    for path in files:
        with _tensors(path) as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                if not _same(own[name], file.get_tensor(name)):
                    return str(name)
    return None


def _tensors(path: Path) -> Any:
    from safetensors import safe_open

    # safetensors has no type annotations
    opened: Any = safe_open(path, framework="pt")
    return opened


def _same(own: Tensor | None, tensor: Tensor) -> bool:
    return own is not None and own.shape == tensor.shape and torch.equal(own.cpu(), tensor.to("cpu", own.dtype))
