"""Strict loading of teacher weights, and of students saved by the authors' code."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from graftwork.core.files import read_json
from graftwork.core.hub import hub_problem
from graftwork.core.run_folder import RunFolder, is_run
from graftwork.errors import CheckpointMismatchError
from graftwork.grafting.model_card import is_hub_id
from graftwork.methods.cald.config import Extension
from graftwork.methods.cald.modules import LinformerAttention
from graftwork.methods.cald.positions import TABLE, extended, reserved_rows
from graftwork.surgery.attention import seam_modules
from graftwork.surgery.modules import GRAFT
from graftwork.surgery.sites import is_classifier, pretrained

Shape = tuple[int, ...]
_FILES = ("model.safetensors", "pytorch_model.bin")


def weights_file(path: str | Path) -> Path:
    """Return the weights file of a run, model folder, checkpoint or hub id; a file is returned as it is.

    A repository of the hub is read through its client's cache, whose path contains the commit.

    Raises:
        CheckpointMismatchError: If there is no weights file.
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
    elif is_hub_id(str(path)):
        return _hub_file(str(path))
    raise CheckpointMismatchError(
        f"Found no weights at {path}. Expected a run, a folder with one of {', '.join(_FILES)}, such a file, or a hub "
        "id. Correct the path."
    )


def _hub_file(name: str) -> Path:
    """Weights file of a repository of the hub, in the cache, beside its config.json."""
    import transformers.utils.hub

    # the hub client of transformers is untyped
    hub: Any = transformers.utils.hub
    reason = f"it has none of {', '.join(_FILES)}."
    try:
        # the labels of the teacher are compared, too; raises if the repository cannot be read
        hub.cached_file(name, "config.json")
        for each in _FILES:
            found = hub.cached_file(name, each, _raise_exceptions_for_missing_entries=False)
            if found is not None:
                return Path(str(found))
    except (OSError, ValueError) as error:
        reason = hub_problem(error, name) or f"{str(error).splitlines()[0].rstrip('.')}."
    raise CheckpointMismatchError(
        f"Found no folder {name}, and cannot read weights of {name!r} from the hub: {reason} Expected a run, a folder, "
        "a file of weights, or a hub id that is cached or can be reached."
    ) from None


def shapes(file: Path) -> dict[str, Shape]:
    """Return name and shape of every tensor of a file; of a safetensors file, only the header is read."""
    if file.suffix != ".safetensors":
        return {name: tuple(tensor.shape) for name, tensor in read(file).items()}
    import safetensors

    opened: Any = cast(Any, safetensors).safe_open(file, framework="pt")
    with opened as content:
        return {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118 (no mapping)


def read(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a file to the CPU; pickled files are read with `weights_only`.

    Raises:
        CheckpointMismatchError: If the file does not contain named tensors only.
    """
    try:
        if file.suffix == ".safetensors":
            import safetensors.torch

            content: Any = cast(Any, safetensors.torch).load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointMismatchError(f"{file} is not readable as weights ({str(error).splitlines()[0]}).") from None
    found = cast("Mapping[str, object]", content) if isinstance(content, Mapping) else {"": None}
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if len(tensors) < len(found):
        raise CheckpointMismatchError(f"{file} contains other objects than named tensors. Expected a file of weights.")
    return tensors


def check(model: nn.Module, file: Path, *, short_positions: bool = False) -> None:
    """Check that a file contains exactly the dense tensors of a model, in the right shapes.

    Args:
        model: Model.
        file: File of weights.
        short_positions: Accept fewer rows of position embeddings, which are extended when they are loaded.

    Raises:
        CheckpointMismatchError: If names or shapes differ; the message names the file and the first tensors.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in _state(model).items()}
    found = {name: shape for name, shape in shapes(file).items() if not _is_bookkeeping(name)}
    for name, shape in found.items() if short_positions else ():
        if _is_shorter_table(name, shape, expected.get(name, shape)):
            found[name] = expected[name]
    _compare(expected, found, file)


def check_labels(model: nn.Module, file: Path) -> None:
    """Check that a teacher has the labels of a student in the same order, if both name them.

    Args:
        model: Student.
        file: Weights of the teacher, beside its config.json.

    Raises:
        CheckpointMismatchError: If the labels differ, so that the same output means different classes.
    """
    config = file.parent / "config.json"
    if not config.is_file() or not is_classifier(model):
        return
    named: Mapping[Any, Any] = read_json(config).get("id2label") or {}
    theirs = [str(label) for _, label in sorted(named.items(), key=lambda pair: int(pair[0]))]
    labels: Mapping[Any, Any] = pretrained(model).config.id2label or {}
    ours = [str(label) for _, label in sorted(labels.items(), key=lambda pair: int(pair[0]))]
    unnamed = all(label.startswith("LABEL_") for label in ours) or all(label.startswith("LABEL_") for label in theirs)
    if theirs != ours and not unnamed:
        raise CheckpointMismatchError(
            f"{config} has the labels {', '.join(theirs)}, and the student {', '.join(ours)}. Expected the same labels "
            "in the same order. Convert the student from the teacher's folder, or train the teacher on the same task."
        )


def load_dense(model: nn.Module, file: Path, extension: Extension | None = None) -> None:
    """Copy the weights of a dense model into a dense or converted one; compression matrices stay unchanged.

    Args:
        model: Model, changed in place.
        file: File of weights.
        extension: Rule for position embeddings if the model has more of them; None is tile.

    Raises:
        CheckpointMismatchError: If names or shapes differ.
    """
    check(model, file, short_positions=True)
    state = _state(model)
    with torch.no_grad():
        for name, tensor in read(file).items():
            if name in state:
                own = state[name]
                longer = _is_shorter_table(name, tuple(tensor.shape), tuple(own.shape))
                rows = (len(own), reserved_rows(model), extension or "tile")
                own.copy_(extended(tensor, *rows) if longer else tensor)


def load_reference(model: nn.Module, path: str | Path) -> None:
    """Load a student saved by the authors' code into a converted model.

    Their files contain `proj_k` and `proj_v` [positions rank] in each attention module; a shared matrix is repeated.

    Source: `idiap/linearize-distill-pretrained-transformers`, part nlp.

    Args:
        model: Model converted with the rank, positions and share of the file; changed in place.
        path: File, or folder that contains it.

    Raises:
        CheckpointMismatchError: If names or shapes differ, or copies of one shared matrix.
    """
    file = weights_file(path)
    state, tensors = _state(model), read(file)
    learned: dict[str, Tensor] = {}
    for attention, graft in seam_modules(model).items():
        if isinstance(graft, LinformerAttention):
            for word, matrix in zip(("proj_k", "proj_v"), graft.matrices(), strict=True):
                learned[f"{attention}.{word}"] = matrix
    wanted: dict[str, Tensor] = {**state, **learned}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if not _is_bookkeeping(name)}
    _compare({name: tuple(tensor.shape) for name, tensor in wanted.items()}, found, file)
    seen: dict[int, str] = {}
    for name, matrix in learned.items():
        other = seen.setdefault(id(matrix), name)
        if not torch.equal(tensors[name], tensors[other]):
            raise CheckpointMismatchError(
                f"{file}: {name} and {other} differ, but are one matrix in this model. Convert with the share setting "
                "with which the file was trained."
            )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Tensors that a dense checkpoint of this model contains, under their names there; without adapters of PEFT."""
    inner = pretrained(model)
    tied: Collection[str] = getattr(inner, "all_tied_weights_keys", None) or ()
    found: dict[str, Tensor] = {}
    for name, value in inner.state_dict().items():
        parts = name.split(".")
        plain = ".".join(part for part in parts if part != "base_layer")
        if GRAFT not in parts and plain not in tied and not any(part.startswith("lora_") for part in parts):
            found[plain] = value
    return found


def _is_shorter_table(name: str, found: Shape, expected: Shape) -> bool:
    """True for position embeddings of fewer positions than a model has."""
    table = name.endswith(f"{TABLE}.weight") and len(found) == len(expected) == 2
    return table and found[0] < expected[0] and found[1] == expected[1]


def _is_bookkeeping(name: str) -> bool:
    # older releases of transformers saved position ids as a buffer
    return name.endswith("position_ids")


def _compare(expected: Mapping[str, Shape], found: Mapping[str, Shape], file: Path) -> None:
    """Raise `CheckpointMismatchError` if names or shapes differ."""
    parts = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {list(found[name])} instead of {list(expected[name])}"
            for name in expected
            if name in found and found[name] != expected[name]
        ],
    }
    problems = "; ".join(f"{word}: {', '.join(names[:3])}" for word, names in parts.items() if names)
    if problems:
        raise CheckpointMismatchError(
            f"{file} does not match the model ({problems}). Expected weights of the same architecture, with the same "
            "labels."
        )
