"""Return of freed memory to the operating system."""

from __future__ import annotations

import ctypes
import threading
import time
from functools import cache
from typing import Any

PAUSE = 1.0
"""Minimum number of seconds between two calls that release memory."""


class HeapTrimmer:
    """Releases freed memory of the C library at most once in `PAUSE` seconds. Thread-safe.

    Libraries that start threads for every change, as Lance and tantivy do, leave freed blocks in the arenas of these
    threads. glibc reuses them for the same arena only, so that the memory of a process grows although none is in use.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = -PAUSE

    def release(self) -> bool:
        """Release freed memory. Return True if it was done; other C libraries than glibc are left alone."""
        trim = _malloc_trim()
        with self._lock:
            if trim is None or time.monotonic() - self._last < PAUSE:
                return False
            trim(0)
            # after the call, so that a slow one does not follow itself
            self._last = time.monotonic()
        return True


@cache
def _malloc_trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
