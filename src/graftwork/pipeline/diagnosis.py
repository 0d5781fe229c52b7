"""Diagnosis of a run, with advice on each finding; `graftwork doctor RUN` prints it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Unpack

from graftwork.core.devices import Placing, place
from graftwork.core.digests import verify_files
from graftwork.core.files import read_json
from graftwork.core.run_folder import RunFolder, similar_folders
from graftwork.errors import CheckpointMismatchError, GraftworkError, IncompleteRunError
from graftwork.grafting.capabilities import ChecksDrift
from graftwork.grafting.converted import required_tokenizer
from graftwork.metrics.results import Results
from graftwork.pipeline.contents import check_contents
from graftwork.pipeline.environment import environment, finding
from graftwork.pipeline.finishing import is_finished, manifest_of
from graftwork.pipeline.start import load_varied
from graftwork.settings.recipe import read_run


def diagnose(
    run: str,
    *,
    drift: int | None = None,
    method: Mapping[str, Any] | None = None,
    deep: bool = False,
    **placing: Unpack[Placing],
) -> tuple[list[dict[str, str]], bool]:
    """Check the environment and a run.

    Args:
        run: The run's folder.
        drift: Number of questions for the drift check, which compares the weights before and after.
        method: Settings of the recorded method to replace for the drift check.
        deep: Read every byte of weights, checkpoints and artifacts, also above the limit up to which loading does.
        placing: Device, device map and data type of the run's model.

    Raises:
        ConfigError: If this machine does not have the device.

    Returns:
        Findings with `check`, `state` (ok, wrong, absent, unfinished) and `found`; and True if none is wrong.
    """
    # before the findings: a device that this machine lacks is no fault of the run
    place(**placing)
    findings = [*environment(), *_run(RunFolder(run), deep, placing)]
    if drift is not None:
        findings += _drift(run, drift, method, placing)
    return findings, all(entry["state"] != "wrong" for entry in findings)


def _run(folder: RunFolder, deep: bool, placing: Placing) -> list[dict[str, str]]:
    from graftwork.training.checkpoints import last_checkpoint

    if not folder.path.is_dir():
        raise IncompleteRunError(
            f"Found no folder {folder.path}. Give the folder of a run.{similar_folders(folder.path)}"
        )
    findings = [
        _file(folder.run_file, "convert", lambda: read_run(folder)),
        _file(folder.results_file, "evaluate", lambda: Results.read(folder.results_file), required=False),
    ]
    # a recipe that only evaluates writes results and no model
    converted = folder.conversion_file.exists() or folder.model.exists() or not folder.results_file.exists()
    findings.append(
        _file(folder.conversion_file, "convert", lambda: read_json(folder.conversion_file)["probe"], required=converted)
    )
    for phase in sorted((folder.path / "train").glob("*")):
        checkpoint = last_checkpoint(phase)
        try:
            finished = is_finished(folder, phase.name)
        except CheckpointMismatchError as error:
            findings.append(finding(f"train/{phase.name}", "wrong", error))
            continue
        found = (
            "finished"
            if finished
            else f"stopped at {checkpoint.name if checkpoint else 'no checkpoint'}; train again to resume"
        )
        findings.append(finding(f"train/{phase.name}", "ok" if finished else "unfinished", found))
    findings += [finding(*found) for found in check_contents(folder, deep=deep)]
    if converted:
        findings.append(_file(folder.model, "convert", lambda: None))
    if folder.model.exists():
        findings.append(_files(folder, deep))
        findings.append(_results(folder))
        findings.append(_probe(folder, placing))
    return findings


def _files(folder: RunFolder, deep: bool) -> dict[str, str]:
    """Compare the files of the model with the digests in its manifest."""
    try:
        manifest = manifest_of(folder)
        if "files" not in manifest:
            return finding("files", "absent", "the manifest records no digests; save the model again to add them")
        verify_files(folder.model, manifest["files"], deep=deep)
    except (GraftworkError, KeyError, TypeError) as error:
        return finding("files", "wrong", f"{type(error).__name__}: {error}")
    return finding("files", "ok", f"{len(manifest['files'])} files equal their SHA-256")


def _results(folder: RunFolder) -> dict[str, str]:
    """Count the results that were measured on other weights than those in `model/`."""
    try:
        current = manifest_of(folder).get("digest")
        rows = Results.read(folder.results_file).rows if folder.results_file.exists() else ()
    except GraftworkError as error:
        return finding("results", "wrong", f"{type(error).__name__}: {error}")
    others = dict.fromkeys(row.label for row in rows if row.digest and current and row.digest != current)
    if others:
        return finding("results", "ok", f"measured on other weights than those in model/: {', '.join(others)}")
    return finding("results", "ok", f"{len(rows)} rows of these weights")


def _drift(run: str, questions: int, method: Mapping[str, Any] | None, placing: Placing) -> list[dict[str, str]]:
    converted = load_varied(run, method, **placing)
    findings: list[dict[str, str]] = []
    for entry in converted.methods:
        if not isinstance(entry, ChecksDrift):
            findings.append(finding(f"drift/{entry.name}", "ok", "answering changes no weight; nothing to check"))
            continue
        found = entry.drift(converted.model, required_tokenizer(converted), questions)
        findings.append(finding(f"drift/{entry.name}", "ok" if found.same else "wrong", found.report))
    return findings


def _file(file: Path, stage: str, read: Callable[[], Any], *, required: bool = True) -> dict[str, str]:
    if not file.exists():
        return finding(file.name, "wrong" if required else "absent", f"missing; `graftwork {stage}` writes it")
    try:
        read()
    except (GraftworkError, KeyError, TypeError) as error:
        return finding(file.name, "wrong", f"{type(error).__name__}: {error}")
    return finding(file.name, "ok", file)


def _probe(folder: RunFolder, placing: Placing) -> dict[str, str]:
    from graftwork.grafting.precision import as_stored
    from graftwork.grafting.probe import probe_model
    from graftwork.pipeline.loading import load

    try:
        converted = load(folder.path, **placing)
        saved = read_json(folder.conversion_file)["probe"]
        with as_stored(converted.model):
            same = probe_model(converted.model)["hash"] == saved["hash"]
    # any failure to load or to run is a finding
    except Exception as error:
        return finding("probe", "wrong", f"{type(error).__name__}: {' '.join(str(error).split())}")
    return finding("probe", "ok", "equal bit for bit" if same else "equal within rounding")
