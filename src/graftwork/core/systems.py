"""Differences between operating systems: Windows has no signal 0, no fsync of folders, and no SIGKILL."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

WINDOWS = sys.platform == "win32"
MACOS = sys.platform == "darwin"

_QUERY_LIMITED_INFORMATION = 0x1000
_ACCESS_DENIED = 5
_STILL_ACTIVE = 259


def is_alive(process: int) -> bool:
    """True if a process with this id runs on this machine."""
    if WINDOWS:
        return _is_alive_on_windows(process)
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _is_alive_on_windows(process: int) -> bool:
    """Query the exit code; `os.kill(process, 0)` sends Ctrl-C on Windows, or ends the process."""
    import ctypes

    kernel: Any = getattr(ctypes, "windll").kernel32  # noqa: B009 (absent in the stubs of other systems)
    handle = kernel.OpenProcess(_QUERY_LIMITED_INFORMATION, False, process)
    if not handle:
        return bool(kernel.GetLastError() == _ACCESS_DENIED)
    try:
        code = ctypes.c_ulong()
        return not kernel.GetExitCodeProcess(handle, ctypes.byref(code)) or code.value == _STILL_ACTIVE
    finally:
        kernel.CloseHandle(handle)


def sync_file(path: str | Path) -> None:
    """Write a file to disk that another library has written; a folder on systems with fsync of folders."""
    if WINDOWS:
        # folders cannot be opened there, and files only for writing
        if not Path(path).is_dir():
            _sync(path, os.O_RDWR)
        return
    _sync(path, os.O_RDONLY)


def _sync(path: str | Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
