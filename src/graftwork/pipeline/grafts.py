"""Rebuild a graft on its dense model: the recorded methods, and the tensors that the dense model lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graftwork.core.digests import verify_files
from graftwork.core.files import read_json
from graftwork.core.run_folder import MANIFEST_FILE
from graftwork.errors import CheckpointMismatchError
from graftwork.grafting.conversion import attach
from graftwork.grafting.method import Method
from graftwork.pipeline.verification import check_probe, verified_manifest
from graftwork.surgery.sites import pretrained


def load_learned(
    model: nn.Module,
    folder: Path,
    learned: Set[str],
    report: Mapping[str, Any],
    *,
    exact: bool,
    revision: str | None = None,
) -> None:
    """Load the tensors that the dense model lacks.

    Args:
        model: The converted model.
        folder: Folder of the checkpoint, or hub id.
        learned: Names of the tensors that the methods have added.
        report: Loading report of transformers: missing and unexpected tensors of the dense model.
        exact: Refuse tensors that are missing or left over.
        revision: Revision on the hub.

    Raises:
        CheckpointMismatchError: If some are, and `exact` is on, or if the checkpoint contains a part of `learned`.
    """
    unexpected = set(report["unexpected_keys"])
    missing = set(report["missing_keys"]) | (learned - unexpected)
    # a part of the learned tensors is never a valid checkpoint
    exact = exact or bool(learned & unexpected and learned - unexpected)
    if exact and (missing or unexpected - learned):
        parts = {"missing": missing, "left over": unexpected - learned}
        found = "; ".join(f"{words}: {', '.join(sorted(names)[:3])}" for words, names in parts.items() if names)
        raise CheckpointMismatchError(
            f"{folder} does not hold the tensors of the model that its manifest describes ({found}). "
            "Save the model again, or load it with the methods that it was saved with."
        )
    if learned & unexpected:
        model.load_state_dict(read_tensors(folder, learned & unexpected, revision), strict=False)


def read_tensors(folder: Path, names: Set[str], revision: str | None = None) -> dict[str, torch.Tensor]:
    """Read single tensors of a checkpoint, from a folder or the hub's cache."""
    import transformers.utils.hub
    from safetensors import safe_open

    # the hub client of transformers is untyped
    hub: Any = transformers.utils.hub
    place = (
        folder if folder.is_dir() else Path(str(hub.cached_file(str(folder), "config.json", revision=revision))).parent
    )
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(place.glob("*.safetensors")):
        # safetensors has no type annotations
        opened: Any = safe_open(path, framework="pt")
        with opened as file:
            tensors.update({name: file.get_tensor(name) for name in names & set(file.keys())})
    return tensors


def recorded_methods(manifest: dict[str, Any] | None, folder: Path) -> tuple[Method[Any], ...]:
    """Methods with the settings that a manifest records."""
    from graftwork.core.config import build
    from graftwork.methods import NAMES

    methods: list[Method[Any]] = []
    entries: list[dict[str, Any]] = [] if manifest is None else manifest["methods"]
    for entry in entries:
        cls = NAMES.get(entry["name"])
        settings = {key: value for key, value in entry.items() if key != "name"}
        methods.append(cls(build(cls.config_class, settings, where=f"{folder / MANIFEST_FILE}")))
    return tuple(methods)


def manifest_beside(files: Sequence[str], name: str) -> dict[str, Any]:
    """Manifest of the checkpoint that weights belong to, after verifying the files that it lists.

    Args:
        files: Files of the weights, in a folder or in a snapshot of the hub's cache.
        name: Folder or hub id.

    Raises:
        CheckpointMismatchError: If there is no manifest, or a file differs from it.
    """
    folder = Path(files[0]).parent
    if not (folder / MANIFEST_FILE).exists() and folder.parent.name == "snapshots":
        import transformers.utils.hub

        # the hub client of transformers is untyped
        hub: Any = transformers.utils.hub
        cache = folder.parents[2]
        hub.cached_file(
            name, MANIFEST_FILE, revision=folder.name, cache_dir=cache, _raise_exceptions_for_missing_entries=False
        )
    if not (folder / MANIFEST_FILE).exists():
        raise CheckpointMismatchError(
            f"Found no {MANIFEST_FILE} in {folder}, whose config.json marks a graft of Graftwork. Copy that file too, "
            "or save the converted model again with its save_pretrained."
        )
    if folder.parent.name != "snapshots":
        return verified_manifest(folder)
    # the cache contains the files that were downloaded
    manifest: dict[str, Any] = read_json(folder / MANIFEST_FILE)
    recorded = {file: entry for file, entry in manifest.get("files", {}).items() if (folder / file).exists()}
    verify_files(folder, recorded)
    return manifest


def tensor_names(files: Sequence[str]) -> set[str]:
    """Names of the tensors in safetensors files."""
    from safetensors import safe_open

    names: set[str] = set()
    for path in files:
        # safetensors has no type annotations
        opened: Any = safe_open(path, framework="pt")
        with opened as file:
            names.update(file.keys())
    return names


def regraft(model: nn.Module, manifest: dict[str, Any], folder: Path, saved: Set[str]) -> None:
    """Graft the recorded methods onto a loaded dense model, with the tensors that they learned.

    Args:
        model: The dense model; of another class than the saved one if it shares the modules below the head.
        manifest: Manifest of the checkpoint.
        folder: Folder of the checkpoint.
        saved: Names of the tensors in the checkpoint.

    Raises:
        CheckpointMismatchError: If the checkpoint lacks a tensor, or the output for the fixed input differs.
    """
    dense = model.state_dict().keys()
    for method in recorded_methods(manifest, folder):
        attach(model, method)
    learned = model.state_dict().keys() - dense
    sources = {name: _saved_name(name, saved, str(pretrained(model).base_model_prefix)) for name in learned}
    if missing := sorted(name for name, source in sources.items() if source not in saved):
        raise CheckpointMismatchError(
            f"{folder} does not hold the tensors of the model that its manifest describes (missing: "
            f"{', '.join(missing[:3])}). Save the model again."
        )
    if learned:
        tensors = read_tensors(folder, set(sources.values()))
        model.load_state_dict({name: tensors[source] for name, source in sources.items()}, strict=False)
    inner = pretrained(model)
    same = type(inner).__name__ in (inner.config.architectures or ()) and not hasattr(inner, "hf_device_map")
    if same and str(inner.dtype).removeprefix("torch.") == manifest.get("probe", {}).get("dtype"):
        check_probe(model, manifest, folder)


def _saved_name(name: str, saved: Set[str], prefix: str) -> str:
    """Name of a tensor in a checkpoint of the same model, with or without a head."""
    candidates = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((candidate for candidate in candidates if candidate in saved), name)
