"""Installation of the package for new processes of the tests, without pip."""

from __future__ import annotations

import tomllib
from pathlib import Path

import graftwork

ROOT = Path(graftwork.__file__).parents[2]


def entry_points(folder: Path) -> Path:
    """Metadata of an installed package with the entry points of this project that torch calls."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["torch.backends"]
    metadata = folder / "installed" / "graftwork_entry_points-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: graftwork-entry-points\nVersion: 0\n")
    lines = [f"{name} = {value}" for name, value in declared.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[torch.backends]", *lines]) + "\n")
    return metadata.parent
