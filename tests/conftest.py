"""Shared fixtures: the offline world, the folder of real data, object stores and bank locations."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import time: tests do not access the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors of tests are too small to benefit from threads

from graftwork.core import devices
from graftwork.demo.world.world import build_world
from graftwork.demo.world.writers import write_world

if TYPE_CHECKING:
    from object_store import ObjectStore


@pytest.fixture(scope="session")
def offline_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the offline world; tasks read its `unifiedqa/`."""
    folder = tmp_path_factory.mktemp("offline") / "world"
    write_world(build_world(), folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _unannounced() -> Iterator[None]:
    """Leave the line about placement out of stderr, which depends on the machine; tests of the line restore it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "say", lambda line: None)
        yield


@pytest.fixture(scope="session")
def cached_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that `graftwork.demo.offline_world()` returns during the tests."""
    from graftwork.demo import offline_world as world

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAFTWORK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield world()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data next to the repository, or the folder in the environment variable GRAFTWORK_SHARED."""
    folder = Path(os.environ.get("GRAFTWORK_SHARED") or Path(__file__).parents[1].parent / "shared")
    if not (folder / "data" / "unifiedqa").is_dir():
        pytest.skip(f"no real data in {folder}; set GRAFTWORK_SHARED to a folder with data/unifiedqa")
    return folder


@pytest.fixture(scope="session")
def _object_store() -> Iterator[ObjectStore]:
    pytest.importorskip("moto.moto_server", reason="moto is not installed; it provides the object store")
    pytest.importorskip("flask_cors", reason="flask-cors is not installed; moto's server needs it")
    from object_store import ObjectStore

    store = ObjectStore()
    yield store
    store.close()


@pytest.fixture
def object_store(_object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """Object store on the loopback device, with its address and credentials in the environment."""
    for name, value in _object_store.environment.items():
        monkeypatch.setenv(name, value)
    yield _object_store
    _object_store.fault = lambda request: None


@pytest.fixture
def address(object_store: ObjectStore) -> str:
    """Address of a new bank in the object store."""
    return f"s3://{object_store.bucket}/{uuid4().hex}/bank"


@pytest.fixture(params=["folder", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str | Path:
    """Location of a new bank: a folder, and an address in the object store."""
    return tmp_path / "bank" if request.param == "folder" else request.getfixturevalue("address")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A temporary folder that other users can read; `tmp_path` is private."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
