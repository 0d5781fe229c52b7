"""Claim of a phase's folder by one training: refuse another one, resume an equal one, extend a finished one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftwork.core import faults
from graftwork.core.config import to_plain
from graftwork.core.files import read_json, remove_path, write_record
from graftwork.core.run_folder import RunFolder
from graftwork.core.storage import writing
from graftwork.errors import ConfigError, GraftworkError
from graftwork.pipeline.finishing import FINISHED_FILE, SETTINGS_FILE, closing_numbers, manifest_of, plain
from graftwork.pipeline.start import build_method
from graftwork.training.checkpoints import last_checkpoint
from graftwork.training.phases import Phase


def claimed(folder: RunFolder, phase: str) -> dict[str, Any]:
    """Settings and data of the training that claimed the folder of a phase."""
    return read_json(folder.phase(phase) / SETTINGS_FILE)


def finished_file(folder: RunFolder, phase: Phase) -> Path:
    """Path of the closing numbers of a phase."""
    return folder.phase(phase.name) / FINISHED_FILE


def finished_numbers(folder: RunFolder, phase: Phase, identity: Mapping[str, Any]) -> dict[str, float] | None:
    """Closing numbers of a phase if it is finished with these settings."""
    record = manifest_of(folder).get("training")
    if record is not None and _differences(identity, record["identity"]):
        return None
    return closing_numbers(folder, phase.name)


def claim(folder: RunFolder, phase: Phase, identity: Mapping[str, Any], overwrite: bool, *, alone: bool) -> bool:
    """Claim the folder of a phase for this training, or raise if it contains another one.

    Args:
        folder: Run folder.
        phase: The phase.
        identity: Settings and data of this training.
        overwrite: Remove another training.
        alone: True if the training has no other phase.

    Returns:
        True if this training extends a finished one by further steps.
    """
    place = folder.phase(phase.name)
    file = place / SETTINGS_FILE
    before: dict[str, Any] = read_json(file) if file.exists() else {}
    different = _differences(identity, before) if before else []
    extended = alone and _extends(folder, phase, identity, before, different)
    if different and _begun(place) and not (overwrite or extended):
        raise ConfigError(
            f"{place} contains a training with another {', '.join(different)}{_detail(before, identity)}. "
            "Give another run folder, the same settings, or --overwrite to start anew."
        )
    if extended:
        finished_file(folder, phase).unlink(missing_ok=True)
    elif different:
        with writing(place):
            # the claim is replaced at the end, so that a killed process leaves the folder claimed
            for path in place.iterdir():
                if path.name != SETTINGS_FILE:
                    remove_path(path)
            for name in (*phase.collects, *phase.invalidates) if overwrite else ():
                remove_path(folder.artifacts / name)
            faults.point("claim.removed", place)
    kept = {"start": before["start"]} if "start" in before and "start" not in identity else {}
    write_record(file, {**identity, **kept})
    return extended


def _differences(identity: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Parts of a training's identity that differ; a part that one side does not record is not compared."""
    now = plain(identity)
    old = {**before, "methods": [_completed(entry) for entry in before.get("methods", ())]}
    optional = {"start"}
    return [key for key in now if now[key] != old.get(key) and not (key in optional and old.get(key) is None)]


def _completed(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of a method that an earlier version recorded, with the defaults of those that were added since."""
    try:
        method = build_method(entry)
    except GraftworkError:
        return entry
    return plain({"name": method.name, **to_plain(method.config)})


def _begun(place: Path) -> bool:
    """True if a phase has taken a step or collected something."""
    log = place / "log.jsonl"
    if log.exists() and log.stat().st_size > 0:
        return True
    return any(path.name not in (SETTINGS_FILE, log.name, "tensorboard") for path in place.iterdir())


def _extends(
    folder: RunFolder, phase: Phase, identity: Mapping[str, Any], before: Mapping[str, Any], different: Sequence[str]
) -> bool:
    """True if the phase is finished, has a checkpoint, and only `max_steps` differs and is larger."""
    if list(different) != ["train"] or last_checkpoint(folder.phase(phase.name)) is None:
        return False
    old, new = before["train"], plain(identity)["train"]
    if any(old.get(key) != new[key] for key in new if key != "max_steps"):
        return False
    if not (old.get("max_steps") and new["max_steps"] and new["max_steps"] > old["max_steps"]):
        return False
    return closing_numbers(folder, phase.name) is not None


def _detail(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    old, new = before.get("train", {}), now["train"]
    names = [f"{key} was {old.get(key)}, is {new[key]}" for key in new if old.get(key) != new[key]]
    return f" ({'; '.join(names[:3])})" if names else ""
