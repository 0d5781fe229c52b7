"""Weights of a base that a run refers to instead of copying them.

`model/` of such a run contains a symbolic link to each safetensors file of the base, the other tensors of the model in
a file of their own, and the index that joins them. It is an ordinary sharded checkpoint, which every loader opens; a
copy that follows links, such as an upload to the hub, contains the weights.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graftwork.core.digests import FULL_LIMIT, verify_file
from graftwork.core.files import write_text
from graftwork.core.run_folder import RunFolder, is_run
from graftwork.errors import CheckpointMismatchError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

OWN_FILE = "own.safetensors"
"""Tensors that the base lacks: what methods learned, and a new head."""
INDEX_FILE = "model.safetensors.index.json"
_WRITTEN = "model.safetensors"
"""File that `save_pretrained` writes; loaders would prefer it to the index."""
_PREFIX = "base-"
"""Prefix of the names of links."""


LINKED: ContextVar[Base | None] = ContextVar("linked", default=None)
"""Base that `save_pretrained` links to."""


@dataclass(frozen=True, slots=True)
class Base:
    """Checkpoint whose weights a run refers to."""

    model: str
    """Model folder, run folder or hub id."""
    folder: Path
    """Folder of its files; a snapshot in the cache for a hub id."""
    files: tuple[Path, ...]
    """Its safetensors files, without links."""

    def plain(self) -> dict[str, Any]:
        """Entry of the manifest: model, revision of a hub id, and the target of each link."""
        snapshot = self.folder.name if self.folder.parent.name == "snapshots" else None
        return {
            "model": self.model,
            **({} if snapshot is None else {"revision": snapshot}),
            "files": {f"{_PREFIX}{path.name}": str(path) for path in self.files},
        }


def find_base(model: str) -> Base:
    """Find the files of a checkpoint.

    Args:
        model: Model folder, run folder or hub id in the cache.

    Raises:
        ConfigError: If it has no safetensors files.
    """
    folder = RunFolder(model).model if is_run(model) else Path(model)
    if not folder.is_dir():
        folder = _snapshot(model)
    names = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not names:
        raise ConfigError(
            f"Cannot keep {model} by reference: found no safetensors file in {folder}. Convert without "
            "--base-by-reference, which writes a copy of the weights."
        )
    # a link of a link would depend on one more run
    return Base(model, folder, tuple(path.resolve() for path in names))


def own_tensors(model: Any, base: Base) -> dict[str, Tensor]:
    """Tensors of a model that its base lacks.

    Args:
        model: The model, with the types of its checkpoint.
        base: The base.

    Raises:
        ConfigError: If the model lacks a tensor of the base, or has another value of it.
    """
    state: dict[str, Tensor] = model.state_dict()
    known: set[str] = set()
    for path in base.files:
        with _tensors(path) as file:
            for name in file.keys():  # noqa: SIM118 (the reader is no mapping)
                if name not in state:
                    raise _unlike(base, f"{path.name} contains {name}, which the model lacks")
                stored = file.get_tensor(name)
                if state[name].dtype != stored.dtype:
                    types = f"{_type(state[name])} in the model and {_type(stored)} in {path.name}"
                    raise _unlike(base, f"{name} is {types}")
                if not _equal(state[name], stored):
                    raise _unlike(base, f"{name} has other values than in {path.name}")
                known.add(name)
    # tied weights are stored once
    places = {state[name].data_ptr() for name in known}
    return {name: tensor for name, tensor in state.items() if name not in known and tensor.data_ptr() not in places}


def link_base(folder: Path, base: Base) -> dict[str, Any]:
    """Complete a model folder with the tensors that a base lacks by links to the base and the index of all tensors.

    Args:
        folder: Folder that `save_pretrained` wrote, given the output of `own_tensors` as state dict.
        base: The base.

    Returns:
        Entry of the manifest about the base.

    Raises:
        ConfigError: If the file system has no symbolic links.
    """
    entry, names, size = base.plain(), dict[str, str](), 0
    written = folder / _WRITTEN
    if written.exists():
        with _tensors(written) as file:
            names |= dict.fromkeys(file.keys(), OWN_FILE)
        size += written.stat().st_size
        # an empty state dict is written as no file, or as one without tensors
        written.rename(folder / OWN_FILE) if names else written.unlink()
    for name, target in entry["files"].items():
        try:
            (folder / name).symlink_to(target)
        except OSError as error:
            raise ConfigError(
                f"Cannot keep {base.model} by reference: no symbolic link in {folder} ({error.strerror}). Convert "
                "without --base-by-reference, or write the run to another file system."
            ) from None
        size += Path(target).stat().st_size
        with _tensors(target) as file:
            names |= dict.fromkeys(file.keys(), name)
    content = {"metadata": {"total_size": size}, "weight_map": names}
    write_text(folder / INDEX_FILE, json.dumps(content, indent=2, sort_keys=True) + "\n")
    return entry


@contextmanager
def linked(model: Any, base: Base) -> Generator[dict[str, Tensor] | None]:
    """Inside the context, `save_pretrained` of a graft links to its base, given the yielded state dict.

    Args:
        model: The model.
        base: The base.

    Returns:
        Context whose value is None if the model has other weights than the base, so that all of them are saved.
    """
    try:
        own = own_tensors(model, base)
    except ConfigError:
        yield None
        return
    token = LINKED.set(base)
    try:
        yield own
    finally:
        LINKED.reset(token)


def verify_base(folder: Path, manifest: Mapping[str, Any], *, deep: bool = False) -> frozenset[str]:
    """Compare the files of a base that a model refers to with their recorded digests.

    Args:
        folder: Model folder.
        manifest: Its manifest.
        deep: Read every byte at any size; otherwise as in `verify_files`.

    Returns:
        Names of the verified files in the model folder; empty for a model with weights of its own.

    Raises:
        CheckpointMismatchError: If a file is missing or has changed.
    """
    base = manifest.get("base")
    if not base:
        return frozenset()
    recorded = {name: manifest["files"][name] for name in base["files"]}
    whole = deep or sum(int(entry["size"]) for entry in recorded.values()) <= FULL_LIMIT
    advice = f"Put the file back, or convert {base['model']} again."
    for name, target in base["files"].items():
        if not (folder / name).is_file():
            raise CheckpointMismatchError(
                f"{folder} refers to the weights of its base in {target}, and found no such file. {advice}"
            )
        if (problem := verify_file(folder / name, recorded[name], whole=whole)) is not None:
            raise CheckpointMismatchError(
                f"{folder} refers to the weights of its base in {target}, which have changed since: {problem}. {advice}"
            )
    return frozenset(recorded)


def _equal(tensor: Tensor, stored: Tensor) -> bool:
    if tensor.device.type == "meta" or tensor.shape != stored.shape:
        return False
    # bits, so that NaN equals itself
    one, other = (each.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for each in (tensor, stored))
    return torch.equal(one, other)


def _tensors(path: str | Path) -> Any:
    """Reader of a safetensors file, which is untyped."""
    from safetensors import safe_open

    return safe_open(path, framework="pt")


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _unlike(base: Base, difference: str) -> ConfigError:
    return ConfigError(
        f"Cannot keep {base.model} by reference: {difference}. Convert without --base-by-reference, which writes a "
        "copy of the weights."
    )


def _snapshot(name: str) -> Path:
    """Folder of a hub model in the cache; the name itself if it is not there."""
    import transformers.utils.hub

    # the hub client of transformers is untyped
    hub: Any = transformers.utils.hub
    found = hub.cached_file(name, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
    return Path(name) if found is None else Path(str(found)).parent
