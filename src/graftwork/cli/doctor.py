"""`graftwork doctor`: what is wrong with an environment or a run, and how to mend it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from graftwork.errors import GraftworkError
from graftwork.recipe import versions
from graftwork.run_folder import RunFolder

EXTRAS = {"lora": ("peft",)}


def diagnose(run: str | None) -> tuple[list[dict[str, str]], bool]:
    """Check the environment, and a run if one is given.

    Returns:
        One finding a line, each with `check`, `state` and `found`; and whether all is well.
    """
    findings = [_finding(name, "ok", number) for name, number in versions().items()]
    findings.append(_devices())
    for extra, packages in EXTRAS.items():
        for package in packages:
            try:
                findings.append(_finding(package, "ok", version(package)))
            except PackageNotFoundError:
                findings.append(_finding(package, "absent", f"optional: pip install 'graftwork[{extra}]'"))
    if run is not None:
        findings += _run(RunFolder(run))
    return findings, all(entry["state"] != "wrong" for entry in findings)


def _finding(check: str, state: str, found: Any) -> dict[str, str]:
    return {"check": check, "state": state, "found": str(found)}


def _devices() -> dict[str, str]:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return _finding("devices", "ok", ", ".join(names))
    return _finding("devices", "ok", f"cpu, {torch.get_num_threads()} threads")


def _run(folder: RunFolder) -> list[dict[str, str]]:
    from graftwork.checkpoint import load, probe_model
    from graftwork.files import read_json
    from graftwork.training.trainer import last_checkpoint

    findings = []
    stages = (
        (folder.run_file, "run.yaml", "convert"),
        (folder.conversion_file, "conversion.json", "convert"),
        (folder.model, "model", "convert"),
        (folder.results_file, "results.json", "evaluate"),
    )
    for file, name, stage in stages:
        required = stage == "convert"
        state = "ok" if file.exists() else "wrong" if required else "absent"
        findings.append(_finding(name, state, file if file.exists() else f"not there; `graftwork {stage}` writes it"))
    for phase in sorted((folder.path / "train").glob("*")):
        checkpoint = last_checkpoint(phase)
        finished = (phase / "finished.json").exists()
        found = "finished" if finished else f"stopped at {checkpoint.name if checkpoint else 'no checkpoint'}; train again to go on"
        findings.append(_finding(f"train/{phase.name}", "ok" if finished else "unfinished", found))
    if folder.model.exists():
        try:
            converted = load(folder.path)
            saved = read_json(folder.conversion_file)["probe"]
            same = probe_model(converted.model)["hash"] == saved["hash"]
            findings.append(_finding("probe", "ok", "equal bit for bit" if same else "equal within rounding"))
        except GraftworkError as error:
            findings.append(_finding("probe", "wrong", error))
    return findings
