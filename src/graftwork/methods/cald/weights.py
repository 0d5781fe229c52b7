"""Weights of teachers and of students that the authors' code saved: found, checked by shape, loaded strictly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.core.run_folder import RunFolder, is_run
from graftwork.errors import CheckpointMismatchError
from graftwork.methods.cald.modules import LinformerAttention
from graftwork.surgery.modules import GRAFT

_FILES = ("model.safetensors", "pytorch_model.bin")


def weights_file(path: str | Path) -> Path:
    """The file of weights that a run, a model folder, a checkpoint or the file itself stands for.

    Raises:
        CheckpointMismatchError: If there is none.
    """
    place = Path(path)
    if is_run(place):
        place = RunFolder(place).model
    if place.is_dir():
        found = next((place / name for name in _FILES if (place / name).exists()), None)
        if found is not None:
            return found
    elif place.is_file():
        return place
    raise CheckpointMismatchError(
        f"Found no weights at {path}. Expected a run, a folder with one of {', '.join(_FILES)}, or such a file."
    )


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a file, without reading the tensors where the format allows that."""
    if file.suffix != ".safetensors":
        return {name: tuple(tensor.shape) for name, tensor in read(file).items()}
    from safetensors import safe_open

    with safe_open(file, framework="pt") as content:
        return {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118 (no mapping)


def read(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU; nothing in it is executed.

    Raises:
        CheckpointMismatchError: If it is no file of tensors.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointMismatchError(f"{file} is not readable as weights ({str(error).splitlines()[0]}).") from None
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointMismatchError(f"{file} holds something else than named tensors. Give a file of weights.")
    return dict(content)


def check(model: nn.Module, file: Path) -> None:
    """See that a file holds the tensors of a model, no more and no less, in the right shapes.

    Raises:
        CheckpointMismatchError: If it does not; the message names the file and the first tensors.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in _state(model).items()}
    found = {name: shape for name, shape in shapes(file).items() if not _is_bookkeeping(name)}
    _compare(expected, found, file)


def load_dense(model: nn.Module, file: Path) -> None:
    """Copy the weights of a dense model into a dense or a converted one, all that it has but what is learned anew.

    Raises:
        CheckpointMismatchError: If names or shapes differ.
    """
    check(model, file)
    state = _state(model)
    with torch.no_grad():
        for name, tensor in read(file).items():
            if name in state:
                state[name].copy_(tensor)


def load_reference(model: nn.Module, path: str | Path) -> None:
    """Copy a student that the authors' code saved into a converted model.

    Their files hold `proj_k` and `proj_v` [positions × rank] beside query, key and value, repeated where shared.

    Source: `idiap/linearize-distill-pretrained-transformers`, part nlp.

    Args:
        model: Converted with the rank and the sharing that the file was trained with.
        path: File, or folder that holds it.

    Raises:
        CheckpointMismatchError: If names, shapes, or copies of one shared matrix differ.
    """
    file = weights_file(path)
    state, tensors = _state(model), read(file)
    learned: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LinformerAttention):
            owner = name.removesuffix(f".{GRAFT}")
            for word, matrix in zip(("proj_k", "proj_v"), module.matrices(), strict=True):
                learned[f"{owner}.{word}"] = matrix
    wanted: dict[str, Tensor] = {**state, **learned}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if not _is_bookkeeping(name)}
    _compare({name: tuple(tensor.shape) for name, tensor in wanted.items()}, found, file)
    seen: dict[int, str] = {}
    for name, matrix in learned.items():
        other = seen.setdefault(id(matrix), name)
        if not torch.equal(tensors[name], tensors[other]):
            raise CheckpointMismatchError(
                f"{file}: {name} and {other} differ, but are one matrix in this model. Convert with the share that the "
                "file was trained with."
            )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])


def _state(model: nn.Module) -> dict[str, Tensor]:
    """What a dense checkpoint of this model holds."""
    state = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {name: value for name, value in state.items() if GRAFT not in name.split(".") and name not in tied}


def _is_bookkeeping(name: str) -> bool:
    # older releases of transformers wrote the position numbers too
    return name.endswith("position_ids")


def _compare(expected: Mapping[str, Any], found: Mapping[str, Any], file: Path) -> None:
    parts = {
        "missing": [name for name in expected if name not in found],
        "left over": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {list(found[name])} instead of {list(expected[name])}"
            for name in expected
            if name in found and found[name] != expected[name]
        ],
    }
    problems = "; ".join(f"{word}: {', '.join(names[:3])}" for word, names in parts.items() if names)
    if problems:
        raise CheckpointMismatchError(
            f"{file} does not fit the model ({problems}). Give weights of the same architecture, with the same labels."
        )
