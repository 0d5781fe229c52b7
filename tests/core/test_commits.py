"""Commits of several files in one step, digests of files, and locks."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from graftwork.core import digests
from graftwork.core.commits import COMMIT, complete, staged
from graftwork.core.digests import describe_files, verify_files
from graftwork.core.locks import locked
from graftwork.errors import CheckpointMismatchError, ConfigError


class Killed(BaseException):
    """Replaces SIGKILL."""


def state(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock" and not path.relative_to(folder).parts[0].startswith(".commit")
    }


def write(folder: Path) -> None:
    with staged(folder, remove=["results.json", "train"]) as new:
        (new / "model").mkdir()
        (new / "model" / "weights").write_text("new")
        (new / "run.yaml").write_text("new")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("model/weights", "model/old", "run.yaml", "results.json", "train/log"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("old")
    return tmp_path


CALLS = ("rename", "replace", "unlink", "rmdir")


@pytest.mark.parametrize("point", range(12))
def test_a_kill_at_any_step_leaves_the_old_or_the_new_content(folder, monkeypatch, point):
    before, calls = state(folder), 0

    def killing(own):
        def call(self, *arguments, **options):
            nonlocal calls
            calls += 1
            if calls > point:
                raise Killed
            return own(self, *arguments, **options)

        return call

    with monkeypatch.context() as patched:
        for name in CALLS:
            patched.setattr(Path, name, killing(getattr(Path, name)))
        try:
            write(folder)
        except Killed:
            committed = (folder / COMMIT).exists()
        else:
            committed = True
    complete(folder)
    assert state(folder) == ({"model/weights": "new", "run.yaml": "new"} if committed else before)
    write(folder)
    assert state(folder) == {"model/weights": "new", "run.yaml": "new"}


def test_committed_files_have_the_permissions_of_the_umask(tmp_path):
    with staged(tmp_path / "run") as new:
        (new / "file").write_text("x")
        (new / "file").chmod(0o600)
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "run" / "file").stat().st_mode & 0o777 == 0o666 & ~umask


def test_every_changed_file_is_named(tmp_path):
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes(b"0123456789")
    recorded = describe_files(tmp_path)
    verify_files(tmp_path, recorded)
    for name in recorded:
        content = (tmp_path / name).read_bytes()
        for changed in (b"0123456780", b"012345678"):
            (tmp_path / name).write_bytes(changed)
            with pytest.raises(CheckpointMismatchError, match=f"{name} has changed"):
                verify_files(tmp_path, recorded)
        (tmp_path / name).unlink()
        with pytest.raises(CheckpointMismatchError, match=f"{name} is missing"):
            verify_files(tmp_path, recorded)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "other.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointMismatchError, match=r"other\.safetensors is not in the manifest"):
        verify_files(tmp_path, recorded)


def test_large_weights_are_verified_by_size_and_head_and_completely_on_request(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "FULL_LIMIT", 8)
    monkeypatch.setattr(digests, "HEAD_BYTES", 4)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"0123456789")
    recorded = describe_files(tmp_path)
    file.write_bytes(b"012345678X")
    verify_files(tmp_path, recorded)
    with pytest.raises(CheckpointMismatchError, match="has changed"):
        verify_files(tmp_path, recorded, deep=True)
    file.write_bytes(b"X123456789")
    with pytest.raises(CheckpointMismatchError, match="has changed"):
        verify_files(tmp_path, recorded)


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside"])
def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path, name):
    with pytest.raises(CheckpointMismatchError, match="files inside it"):
        verify_files(tmp_path, {name: {"size": 0, "sha256": "", "head": ""}})


def test_a_lock_is_refused_while_another_thread_holds_it(tmp_path):
    held, release = threading.Event(), threading.Event()

    def hold():
        with locked(tmp_path / "lock", "busy", reentrant=True):
            held.set()
            release.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    with pytest.raises(ConfigError, match="busy"), locked(tmp_path / "lock", "busy", reentrant=True):
        pass
    release.set()
    thread.join()
    with locked(tmp_path / "lock", "busy", reentrant=True), locked(tmp_path / "lock", "busy", reentrant=True):
        pass
