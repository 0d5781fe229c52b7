import os
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the repository; GRAFTWORK_SHARED names another one."""
    folder = Path(os.environ.get("GRAFTWORK_SHARED") or Path(__file__).parents[2].parent / "shared")
    if not (folder / "data" / "unifiedqa").is_dir():
        pytest.skip(f"no real data in {folder}; set GRAFTWORK_SHARED to a folder that holds data/unifiedqa")
    return folder


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes | str], Path]:
    """Write a file below the test's folder, byte for byte."""

    def write(name: str, content: bytes | str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write
