"""Verification of a saved model: digests, settings of methods, and the output for the probe input."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graftwork.core.config import to_plain
from graftwork.core.digests import verify_files
from graftwork.core.files import read_json
from graftwork.core.hub import hub_problem, talking_to_hub
from graftwork.core.run_folder import MANIFEST_FILE, MODEL_FOLDER, similar_folders
from graftwork.core.storage import disk_error
from graftwork.errors import CheckpointMismatchError, ConfigError
from graftwork.grafting.base_reference import verify_base
from graftwork.grafting.method import Method
from graftwork.grafting.probe import probe_model
from graftwork.pipeline.model_files import check_exists

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)


def verified_manifest(folder: Path, *, deep: bool = False) -> dict[str, Any]:
    """Manifest of a model folder, after verifying the files that it lists.

    Above `graftwork.core.digests.FULL_LIMIT` (8 GiB), weights are verified by size and the first MiB of each file.

    Args:
        folder: Model folder with a manifest.
        deep: Read every byte of the weights at any size.

    Raises:
        CheckpointMismatchError: If a file is missing or has changed; the message names it.
    """
    manifest: dict[str, Any] = read_json(folder / MANIFEST_FILE)
    if "files" in manifest:
        verify_files(folder, manifest["files"], deep=deep, verified=verify_base(folder, manifest, deep=deep))
    else:
        logger.warning(
            "%s records no digests, so its files are not verified. Save the model again to add them.", folder
        )
    return manifest


def hub_manifest(name: str, revision: str | None = None) -> dict[str, Any] | None:
    """Manifest of a model on the hub; None for a folder or a repository without one.

    Args:
        name: Folder or hub id.
        revision: Revision on the hub.

    Raises:
        ConfigError: If the repository does not exist, may not be read, or cannot be reached.
    """
    check_exists(name)
    if Path(name).exists() or "/" not in name:
        return None
    found = hub_file(name, MANIFEST_FILE, revision)
    return None if found is None else read_json(found)


def hub_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """File of a repository on the hub, in the cache; None if the repository lacks it.

    Raises:
        ConfigError: If the repository does not exist, may not be read, or cannot be reached.
    """
    import transformers.utils.hub

    # the hub client of transformers is untyped
    hub: Any = transformers.utils.hub
    try:
        found = hub.cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        # names that are no hub ids, and a hub that cannot be reached
        problem = hub_problem(error, name) or f"{str(error).splitlines()[0].rstrip('.')}."
        raise disk_error(error) or ConfigError(
            f"Cannot load a model from {name!r}: {problem} Expected a folder, or a hub id that can be reached."
            f"{similar_folders(name)}"
        ) from None
    return None if found is None else Path(str(found))


def verify_download(name: str, manifest: Mapping[str, Any], revision: str | None = None) -> None:
    """Verify the files of a hub model that the loaders have put into the cache."""
    import transformers.utils.hub

    hub: Any = transformers.utils.hub
    folder = Path(str(hub.cached_file(name, MANIFEST_FILE, revision=revision))).parent
    files = {file: entry for file, entry in manifest.get("files", {}).items() if (folder / file).exists()}
    verify_files(folder, files)


def run_on_hub(name: str, revision: str | None = None) -> Path | None:
    """Download the model of a run whose folder is a repository on the hub; None for other repositories.

    Returns:
        Folder of the model in the cache.
    """
    if Path(name).exists() or "/" not in name or hub_file(name, "config.json", revision) is not None:
        return None
    inside = f"{MODEL_FOLDER}/{MANIFEST_FILE}"
    if hub_file(name, inside, revision) is None:
        return None
    import huggingface_hub

    # the client of the hub is untyped
    client: Any = huggingface_hub
    with talking_to_hub("load a model from", name):
        patterns = f"{MODEL_FOLDER}/*"
        return Path(client.snapshot_download(name, revision=revision, allow_patterns=patterns)) / MODEL_FOLDER


def compare_methods(recorded: Sequence[Method[Any]], chosen: Sequence[Method[Any]], folder: Path, strict: bool) -> None:
    """Compare the settings of the methods in use with the recorded ones; warn about differences.

    Raises:
        CheckpointMismatchError: If they differ and `strict` is on.
    """
    before = {f"{method.name}.{key}": value for method in recorded for key, value in to_plain(method.config).items()}
    now = {f"{method.name}.{key}": value for method in chosen for key, value in to_plain(method.config).items()}
    places = {f"{method.name}.{key}" for method in (*recorded, *chosen) for key in method.places}
    differences = [
        f"{key} was {before.get(key, 'absent')} and is now {now.get(key, 'absent')}"
        for key in sorted((before.keys() | now.keys()) - places)
        if before.get(key) != now.get(key)
    ]
    if not differences:
        return
    message = f"{folder} was saved with other settings: {'; '.join(differences)}."
    if strict:
        raise CheckpointMismatchError(f"{message} Use the recorded settings, or leave strict off.")
    logger.warning("%s The current settings are used.", message)


def check_probe(model: nn.Module, manifest: Mapping[str, Any], folder: Path) -> None:
    """Compare the output for the probe input with the recorded one.

    Raises:
        CheckpointMismatchError: If they differ by more than the tolerance of the data type.
    """
    if manifest.get("non_finite") or "probe" not in manifest:
        # non-finite outputs are not comparable, and a model that is saved within a training is not run
        return
    saved, now = manifest["probe"], probe_model(model)
    tolerance = 1e-3 if now["dtype"] == "float32" else 5e-2
    # JSON has no NaN; the probe of a model with non-finite outputs contains null
    numbers = [math.nan if value is None else value for value in saved["values"]]
    before, after = torch.tensor(numbers), torch.tensor(now["values"])
    scale = before.abs().max().clamp_min(1e-6)
    # a comparison with NaN is False, so that NaN never passes
    if before.shape != after.shape or not bool(((before - after).abs() <= tolerance * scale).all()):
        raise CheckpointMismatchError(
            f"{folder} answers a fixed input differently than when it was saved (largest difference "
            f"{(before - after).abs().max() if before.shape == after.shape else 'in shape'}). Its weights, its "
            "manifest or the version of transformers has changed; `graftwork doctor` shows which."
        )
