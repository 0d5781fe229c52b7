from pathlib import Path

import pytest

from methods.cald.runs import dense_run


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished dense run of ten updates with five snapshots."""
    folder = tmp_path_factory.mktemp("dense") / "run"
    dense_run(folder)
    return folder
