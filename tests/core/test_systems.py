"""Processes, locks, fsync and file names on systems that the tests do not run on."""

from __future__ import annotations

import ast
import ctypes
import errno
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from graftwork.core import faults, systems
from graftwork.core.cache import cache_folder
from graftwork.core.commits import staged
from graftwork.core.locks import locked
from graftwork.core.storage import storage_error
from graftwork.errors import StorageError

SOURCE = Path(systems.__file__).parents[1]


@pytest.fixture
def windows(monkeypatch):
    monkeypatch.setattr(systems, "WINDOWS", True)
    monkeypatch.setattr(os, "kill", lambda *words: pytest.fail("os.kill ends processes on Windows"))


def kernel(*, handle=7, answered=True, code=259, error=87):
    """Substitute for kernel32: a process with this handle and exit code."""
    closed = []

    def exit_code(of, pointer):
        pointer._obj.value = code
        return answered

    return SimpleNamespace(
        OpenProcess=lambda access, inherit, process: handle,
        GetExitCodeProcess=exit_code,
        CloseHandle=closed.append,
        GetLastError=lambda: error,
        closed=closed,
    )


@pytest.mark.parametrize(
    ("state", "alive"),
    [
        ({}, True),
        ({"code": 0}, False),
        ({"code": 1}, False),
        # an unknown state counts as alive, so that no lock or file of a running process is removed
        ({"answered": False, "code": 0}, True),
        ({"handle": 0}, False),
        ({"handle": 0, "error": 5}, True),
    ],
)
def test_processes_are_queried_without_a_signal_on_windows(windows, monkeypatch, state, alive):
    fake = kernel(**state)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=fake), raising=False)
    assert systems.is_alive(4321) is alive
    assert fake.closed == ([7] if state.get("handle", 7) else [])


def test_processes_are_found_by_signal_zero_elsewhere(monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert systems.is_alive(os.getpid())
    assert not systems.is_alive(ended.pid)

    def foreign(process, number):
        assert number == 0
        raise PermissionError

    monkeypatch.setattr(os, "kill", foreign)
    assert systems.is_alive(1)


def test_commits_open_no_folder_and_write_files_to_disk_on_windows(windows, monkeypatch, tmp_path):
    flags, own = [], os.open

    def opened(path, flag, *words, **options):
        flags.append((os.path.basename(path), flag, os.path.isdir(path)))
        return own(path, flag, *words, **options)

    with staged(tmp_path) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x", encoding="utf-8")
        monkeypatch.setattr(systems.os, "open", opened)
        systems.sync_file(folder / "deep")
    synced = [entry for entry in flags if entry[0] == "file"]
    assert synced == [("file", os.O_RDWR, False)]
    assert not any(is_folder for _, _, is_folder in flags)
    assert (tmp_path / "deep" / "file").read_text(encoding="utf-8") == "x"


def test_folders_are_written_to_disk_elsewhere(monkeypatch, tmp_path):
    synced = []
    monkeypatch.setattr(systems.os, "fsync", synced.append)
    systems.sync_file(tmp_path)
    assert len(synced) == 1


def test_a_file_system_without_locks_is_refused(monkeypatch, tmp_path):
    from filelock import FileLock

    def unsupported(self, timeout=None):
        raise NotImplementedError("FileSystem does not appear to support flock; use SoftFileLock instead")

    monkeypatch.setattr(FileLock, "acquire", unsupported)
    with (
        pytest.raises(StorageError, match=r"Cannot lock .*the file system has no locks.*local disk"),
        locked(tmp_path / ".lock", "busy"),
    ):
        pytest.fail("entered without a lock")


def test_a_file_that_is_open_elsewhere_is_explained_on_windows(windows):
    denied = PermissionError(errno.EACCES, "Permission denied", "model.safetensors")
    assert "Close programs that have it open" in str(storage_error(denied))


def test_a_kill_is_injected_without_sigkill_on_windows(monkeypatch):
    sent = []
    monkeypatch.setattr(os, "kill", lambda process, number: sent.append((process, number)))
    monkeypatch.setattr(faults, "signal", SimpleNamespace(SIGTERM=15))
    faults.Fault.parse("file.written:kill")("file.written", Path("run.yaml"), ())
    assert sent == [(os.getpid(), 15)]


def test_the_cache_folder_follows_the_system(monkeypatch):
    for name in ("GRAFTWORK_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(systems, "MACOS", False)
    assert cache_folder() == Path.home() / ".cache" / "graftwork"
    monkeypatch.setattr(systems, "MACOS", True)
    assert cache_folder() == Path.home() / "Library" / "Caches" / "graftwork"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/graftwork")
    monkeypatch.setattr(systems, "WINDOWS", True)
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    assert cache_folder() == Path("/local/graftwork")
    monkeypatch.setenv("GRAFTWORK_CACHE", "/own")
    assert cache_folder() == Path("/own")


def without_encoding(source: str) -> list[int]:
    """Lines that read or write text in the encoding of the locale, which is not UTF-8 on Windows."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        words = {keyword.arg for keyword in node.keywords}
        texts = [one.value for one in node.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        of_path = not isinstance(node.func.value, ast.Name) or node.func.value.id not in FOREIGN
        text_mode = node.func.attr == "open" and (not node.args or (texts and "b" not in texts[0]))
        whole = node.func.attr in ("read_text", "write_text")
        if of_path and (text_mode or whole) and "encoding" not in words and "mode" not in words:
            found.append(node.lineno)
    return found


FOREIGN = {"Snapshot", "Index", "Image", "webbrowser"}
"""Owners of an `open` that opens no file as text."""


def test_text_is_read_and_written_in_one_encoding_on_every_system():
    # the files of Linux in /proc are ASCII
    paths = [path for path in SOURCE.rglob("*.py") if path.name not in ("cost.py", "object_store.py")]
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    suspects = {path: text for path, text in texts.items() if re.search(r"\.(open|read_text|write_text)\(", text)}
    assert len(suspects) > 10
    found = {str(path.relative_to(SOURCE)): without_encoding(text) for path, text in suspects.items()}
    assert {path: lines for path, lines in found.items() if lines} == {}
    assert without_encoding("p.open()\np.open('w')\np.read_text()\np.write_text('x')\np.open('rb')\n") == [1, 2, 3, 4]
