"""The offline world, written once for all tests that want data, and places for banks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when it is imported: no test may wait for a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors of tests are too small to share: threads only wait

from graftwork.demo.world.world import build_world
from graftwork.demo.world.writers import write_world

if TYPE_CHECKING:
    from object_store import ObjectStore


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


@pytest.fixture(scope="session")
def _object_store() -> Iterator[ObjectStore]:
    pytest.importorskip("moto.moto_server", reason="moto is not installed: no object store to test with")
    pytest.importorskip("flask_cors", reason="flask-cors is not installed, which moto's server needs")
    from object_store import ObjectStore

    store = ObjectStore()
    yield store
    store.close()


@pytest.fixture
def object_store(_object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """An object store on the loopback device, with what leads to it in the environment."""
    for name, value in _object_store.environment.items():
        monkeypatch.setenv(name, value)
    yield _object_store
    _object_store.fault = lambda request: None


@pytest.fixture
def address(object_store: ObjectStore) -> str:
    """Where a bank may be made in it."""
    return f"s3://{object_store.bucket}/{uuid4().hex}/bank"


@pytest.fixture(params=["folder", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str | Path:
    """Where a bank may be made, of each kind."""
    return tmp_path / "bank" if request.param == "folder" else request.getfixturevalue("address")
