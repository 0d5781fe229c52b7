"""The offline world, written once for all tests that want data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when it is imported: no test may wait for a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors of tests are too small to share: threads only wait

from graftwork.demo.world import build_world
from graftwork.demo.writers import write_world


@pytest.fixture(scope="session")
def offline_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the offline world; `unifiedqa/` in it is what tasks read."""
    folder = tmp_path_factory.mktemp("offline") / "world"
    write_world(build_world(), folder)
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the repository; GRAFTWORK_SHARED names another one."""
    folder = Path(os.environ.get("GRAFTWORK_SHARED") or Path(__file__).parents[1].parent / "shared")
    if not (folder / "data" / "unifiedqa").is_dir():
        pytest.skip(f"no real data in {folder}; set GRAFTWORK_SHARED to a folder that holds data/unifiedqa")
    return folder
