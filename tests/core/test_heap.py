"""Freed memory of other threads' arenas goes back to the operating system."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import pytest

from graftwork.core import heap
from graftwork.core.heap import HeapTrimmer

BLOCK, COUNT = 60_000, 1_500
"""Blocks below glibc's threshold for mapped memory: 90 MB in one arena."""


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def leave_free_blocks() -> None:
    """Allocate blocks on another thread, and free all but the last, which keeps the others in the arena."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = [libc.malloc(BLOCK) for _ in range(COUNT)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
    for block in blocks[:-1]:
        libc.free(block)


@pytest.mark.skipif(heap._malloc_trim() is None or not Path("/proc/self/statm").exists(), reason="needs glibc")
def test_free_blocks_of_another_thread_are_released_once_in_a_while(monkeypatch):
    monkeypatch.setattr(heap, "PAUSE", 3600.0)
    trimmer = HeapTrimmer()
    trimmer._last = -7200.0
    before = resident()
    thread = threading.Thread(target=leave_free_blocks)
    thread.start()
    thread.join()
    held = resident() - before
    assert held > 0.8 * BLOCK * COUNT
    assert trimmer.release()
    assert resident() - before < 0.2 * BLOCK * COUNT
    assert not trimmer.release()
