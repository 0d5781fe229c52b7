"""Checks of everything in a run folder besides its model: records, logs, predictions, artifacts, checkpoints."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graftwork.core.digests import changed_sources, verify_files
from graftwork.core.files import read_json, read_lines
from graftwork.core.run_folder import RunFolder
from graftwork.errors import CheckpointMismatchError, GraftworkError
from graftwork.pipeline.finishing import FINISHED_FILE, SETTINGS_FILE, manifest_of, training_folders
from graftwork.reporting.render import read_extras
from graftwork.training.checkpoints import CHECKPOINT_PREFIX, damage


def check_contents(run: RunFolder, *, deep: bool = False) -> list[tuple[str, str, str]]:
    """Compare the files of a run with the digests that they or the manifest record.

    Args:
        run: Run folder.
        deep: Read every checkpoint and artifact completely, whatever their size.

    Returns:
        Check, state (ok, wrong, absent) and finding of each kind of file that exists.
    """
    phases = training_folders(run)
    records = [place / name for place in phases for name in (SETTINGS_FILE, FINISHED_FILE)]
    records += [run.best_file, *sorted(run.predictions.rglob("*.settings.json"))]
    lines = [place / "log.jsonl" for place in phases] + sorted(run.predictions.rglob("*.jsonl"))
    extras = [run.graphs] if run.graphs.is_dir() else []
    found = [_each("records", records, read_json), _each("logs and predictions", lines, _read_all)]
    found.append(_each("graphs", extras, read_extras))
    found += [_artifacts(run, deep), *(_sources(place) for place in phases)]
    if deep:
        found.append(
            _each("checkpoints", [path for place in phases for path in _checkpoints(place)], _check_checkpoint)
        )
    return [entry for entry in found if entry is not None]


def _each(check: str, paths: list[Path], read: Callable[[Path], Any]) -> tuple[str, str, str] | None:
    """Read all files of one kind; the first fault is the finding."""
    present = [path for path in paths if path.exists()]
    for path in present:
        try:
            read(path)
        except (GraftworkError, KeyError, TypeError) as error:
            return check, "wrong", f"{type(error).__name__}: {error}"
    return (check, "ok", f"{len(present)} files are unchanged") if present else None


def _read_all(path: Path) -> None:
    deque(read_lines(path), maxlen=0)


def _checkpoints(phase: Path) -> list[Path]:
    return sorted(path for path in phase.glob(f"{CHECKPOINT_PREFIX}*") if path.is_dir())


def _check_checkpoint(path: Path) -> None:
    if problem := damage(path):
        raise CheckpointMismatchError(f"{path} is damaged ({problem}).")


def _artifacts(run: RunFolder, deep: bool) -> tuple[str, str, str] | None:
    """Compare what the training collected with the manifest; artifacts that were removed are no fault."""
    try:
        recorded: dict[str, Any] = manifest_of(run).get("training", {}).get("artifacts", {})
        present = {name: entry for name, entry in recorded.items() if (run.path / name).is_file()}
        verify_files(run.path, present, deep=deep)
    except (GraftworkError, KeyError, TypeError, AttributeError) as error:
        return "artifacts", "wrong", f"{type(error).__name__}: {error}"
    if not recorded:
        return None
    removed = f"; {len(recorded) - len(present)} were removed" if len(present) < len(recorded) else ""
    return "artifacts", "ok" if present else "absent", f"{len(present)} files equal their SHA-256{removed}"


def _sources(phase: Path) -> tuple[str, str, str] | None:
    try:
        changed = changed_sources(phase)
    except (GraftworkError, AttributeError, TypeError) as error:
        return f"train/{phase.name}/sources", "wrong", f"{type(error).__name__}: {error}"
    if changed:
        text = f"changed since the training, which cannot be repeated: {', '.join(changed)}"
        return f"train/{phase.name}/sources", "wrong", text
    return None
