"""Versions, extras and devices of this machine, found without importing torch; `graftwork doctor` prints them."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from graftwork.settings.recipe import versions

_SECONDS = 10
"""Limit of the query for graphics processors."""


def environment() -> list[dict[str, str]]:
    """Return findings on packages and devices: `check`, `state` (ok, wrong, absent) and `found`."""
    return [*(finding(name, "ok", number) for name, number in versions().items()), _devices(), *_extras()]


def finding(check: str, state: str, found: Any) -> dict[str, str]:
    """Return one record of a diagnosis."""
    return {"check": check, "state": state, "found": str(found)}


def _extras() -> list[dict[str, str]]:
    """Packages of every extra that this installation declares: installed, of another version, or absent."""
    from packaging.requirements import Requirement

    findings: dict[str, dict[str, str]] = {}
    for line in requires("graftwork") or ():
        requirement = Requirement(line)
        if requirement.name == "graftwork" or "extra" not in str(requirement.marker):
            continue
        extra = str(requirement.marker).partition("extra == ")[2].strip("\"' ")
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            advice = f"optional: pip install 'graftwork[{extra}]'"
            findings[requirement.name] = finding(requirement.name, "absent", advice)
            continue
        fits = requirement.specifier.contains(found, prereleases=True)
        text = found if fits else f"{found}; expected {requirement.specifier}: pip install -U 'graftwork[{extra}]'"
        findings[requirement.name] = finding(requirement.name, "ok" if fits else "wrong", text)
    return list(findings.values())


def _devices() -> dict[str, str]:
    """Graphics processors by the driver's own listing, and whether the installed build of torch can use them."""
    build, found = version("torch"), _graphics_processors()
    processor = f"cpu, {os.cpu_count()} cores"
    if not found:
        return finding("devices", "ok", processor)
    names = ", ".join(found)
    if build.endswith("+cpu"):
        advice = f"{names} cannot be used: torch {build} is built for the CPU. Install a build for the device from "
        return finding("devices", "absent", f"{processor}; {advice}https://pytorch.org/get-started")
    return finding("devices", "ok", f"{names}; {processor}")


def _graphics_processors() -> list[str]:
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return ["Apple GPU (mps)"]
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    # "GPU 0: NVIDIA H100 (UUID: GPU-…)"
    lines = listed.stdout.splitlines() if listed.returncode == 0 else []
    return [line.partition(": ")[2].partition(" (UUID")[0] for line in lines if line.startswith("GPU ")]
