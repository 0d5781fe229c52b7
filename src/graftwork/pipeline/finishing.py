"""Record of a finished training; the manifest in `model/` contains it, so that weights and record are one commit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftwork.core.commits import complete
from graftwork.core.digests import describe_files
from graftwork.core.files import read_json, write_record
from graftwork.core.run_folder import MANIFEST_FILE, RunFolder
from graftwork.errors import CheckpointMismatchError
from graftwork.training.checkpoints import CHECKPOINT_PREFIX
from graftwork.training.phases import Phase

FINISHED_FILE = "finished.json"
"""Closing numbers of a phase and the digest of the weights in `model/` that it led to."""
SETTINGS_FILE = "settings.json"
"""Settings and data of the training that a phase's folder contains."""
_OWN = (FINISHED_FILE, SETTINGS_FILE, "log.jsonl", "tensorboard")
"""Contents of a phase's folder that are no artifacts."""
_CHECKPOINTS = (CHECKPOINT_PREFIX, ".")


def manifest_of(run: RunFolder) -> dict[str, Any]:
    """Manifest of the model in a run; empty if there is none."""
    complete(run.path)
    file = run.model / MANIFEST_FILE
    return read_json(file) if file.exists() else {}


def training_record(
    identity: Mapping[str, Any], phases: Mapping[str, Mapping[str, float]], artifacts: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Part of the manifest that records a finished training.

    Args:
        identity: Settings and data of the training.
        phases: Phase to its closing numbers.
        artifacts: Output of `describe_artifacts`.
    """
    return {
        "identity": plain(identity),
        "phases": {name: dict(numbers) for name, numbers in phases.items()},
        "artifacts": {name: dict(entry) for name, entry in artifacts.items()},
    }


def describe_artifacts(run: RunFolder, phases: Sequence[Phase]) -> dict[str, dict[str, Any]]:
    """Size and digests of what phases wrote besides weights, checkpoints and logs, by path below the run."""
    files: list[Path] = []
    for phase in phases:
        for name in phase.collects:
            place = run.artifacts / name
            files += place.rglob("*") if place.is_dir() else [place]
        place = run.phase(phase.name)
        kept = [path for path in place.glob("*") if path.name not in _OWN and not path.name.startswith(_CHECKPOINTS)]
        files += [file for path in kept for file in (path.rglob("*") if path.is_dir() else [path])]
    return describe_files(run.path, dict.fromkeys(files))


def plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity as it is read back from JSON."""
    return json.loads(json.dumps(identity))


def is_finished(run: RunFolder, phase: str) -> bool:
    """True if the weights in `model/` are the result of a training that includes this phase.

    Raises:
        CheckpointMismatchError: If the training led to other weights than those in `model/`.
    """
    return closing_numbers(run, phase) is not None


def closing_numbers(run: RunFolder, phase: str) -> dict[str, float] | None:
    """Closing numbers of a phase whose weights are in `model/`; None if it is not finished.

    Raises:
        CheckpointMismatchError: If the training led to other weights than those in `model/`.
    """
    manifest = manifest_of(run)
    numbers: dict[str, Any] | None = manifest.get("training", {}).get("phases", {}).get(phase)
    if numbers is not None:
        return numbers
    file = run.phase(phase) / FINISHED_FILE
    if not file.exists():
        return None
    numbers = read_json(file)
    digest = None if numbers is None else numbers.pop("digest", None)
    # a run of an earlier version records no digest
    if digest is not None and manifest and digest != manifest.get("digest"):
        raise CheckpointMismatchError(
            f"{file} belongs to weights with the digest {digest[:12]}…, and {run.model} contains others "
            f"({str(manifest.get('digest'))[:12]}…). Restore {run.model}, or train with --overwrite."
        )
    return numbers


def write_finished(run: RunFolder, phases: Mapping[str, Mapping[str, float]], digest: str) -> None:
    """Write the closing numbers next to the checkpoints of each phase; the manifest is the record that counts."""
    for name, numbers in phases.items():
        write_record(run.phase(name) / FINISHED_FILE, {**numbers, "digest": digest})


def training_folders(run: RunFolder) -> list[Path]:
    """Folders of the phases of a run."""
    return sorted(path for path in (run.path / "train").glob("*") if path.is_dir())
