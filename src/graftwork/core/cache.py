"""Cache folder of the user: files that can be made again, bounded in size."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from graftwork.core import systems
from graftwork.core.files import read_json, write_record
from graftwork.errors import ConfigError, GraftworkError

CACHE_VARIABLE = "GRAFTWORK_CACHE"
"""Environment variable that names another cache folder."""
LIMIT_VARIABLE = "GRAFTWORK_CACHE_GB"
"""Environment variable with the maximum size of each bounded part of the cache, in gigabytes."""
DEFAULT_LIMIT = 20.0
"""Maximum size of a bounded part of the cache, in gigabytes, unless the environment gives another one."""
ROWS, LENGTHS = "rows", "lengths"
"""Bounded parts of the cache: formatted examples, and numbers of tokens."""


def cache_folder() -> Path:
    """Folder of cached files, by the conventions of the operating system."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    if systems.WINDOWS and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "graftwork"
    default = Path.home() / ("Library/Caches" if systems.MACOS else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or default) / "graftwork"


def cache_limit() -> int:
    """Maximum size of a bounded part of the cache in bytes.

    Raises:
        ConfigError: If the environment variable is not a number of at least 0.
    """
    text = os.environ.get(LIMIT_VARIABLE, "")
    try:
        limit = float(text) if text else DEFAULT_LIMIT
    except ValueError:
        limit = -1.0
    if not 0 <= limit < float("inf"):
        raise ConfigError(f"Found {LIMIT_VARIABLE}={text!r}; expected gigabytes, such as 20, or 0 to keep nothing.")
    return int(limit * 1e9)


def mark_used(path: Path) -> None:
    """Set the time of last use of a cached file, by which `remove_oldest` chooses; read-only caches are left alone."""
    with suppress(OSError):
        os.utime(path)


def remove_oldest(part: str, keep: Path | None = None) -> None:
    """Remove the files that were used longest ago until a part of the cache is within its limit.

    Files that other processes have open stay readable to them, except on Windows, where they are not removed.

    Args:
        part: Subfolder of the cache.
        keep: File that is kept in any case.
    """
    found: list[tuple[float, int, Path]] = []
    for path in (cache_folder() / part).glob("*"):
        with suppress(OSError):
            status = path.stat()
            found.append((status.st_mtime, status.st_size, path))
    total, limit = sum(size for _, size, _ in found), cache_limit()
    for _, size, path in sorted(found):
        if total <= limit:
            return
        if path != keep:
            with suppress(OSError):
                path.unlink()
                total -= size


def cache_sizes() -> dict[str, tuple[int, int]]:
    """Number of files and their bytes, by part of the cache."""
    folder = cache_folder()
    sizes: dict[str, tuple[int, int]] = {}
    for part in sorted(path for path in folder.glob("*") if path.is_dir()):
        files = [path.stat().st_size for path in part.rglob("*") if path.is_file()]
        sizes[part.name] = (len(files), sum(files))
    return sizes


def clear_cache() -> int:
    """Remove every cached file; return the number of bytes that were freed."""
    freed = sum(size for _, size in cache_sizes().values())
    for part in cache_folder().glob("*"):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
    return freed - sum(size for _, size in cache_sizes().values())


def remembered(key: str | None, make: Callable[[], Any]) -> Any:
    """JSON value of an earlier call with the same key, else that of `make`, which is cached.

    Args:
        key: Name of the file; None caches nothing.
        make: Computes the value.
    """
    if key is None or not cache_limit():
        return make()
    file = cache_folder() / ROWS / f"{key}.facts.json"
    if file.exists():
        with suppress(GraftworkError, KeyError):
            found = read_json(file)["value"]
            mark_used(file)
            return found
    value = make()
    write_record(file, {"value": value})
    return value
