"""Decompression of gzip, bzip2, xz and Zstandard files, recognised by their first bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from graftwork.core.readers import read_head, reading
from graftwork.errors import DataError

MAGIC: Mapping[bytes, str] = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
}
"""First bytes of a compressed file → name of the compression."""
SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zstd")
"""Suffixes of compressed files, in file names only; the content decides."""


def compression_of(path: Path) -> str | None:
    """Return the name of the compression by the first bytes of a file; None for an uncompressed file.

    Raises:
        DataError: If the file cannot be opened.
    """
    head = read_head(path)
    return next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)


def without_compression_suffix(name: str) -> str:
    """Return a file name without the suffix of its compression: `a.jsonl` for `a.jsonl.gz`."""
    return next((name[: -len(suffix)] for suffix in SUFFIXES if name.lower().endswith(suffix)), name)


@contextmanager
def open_bytes(path: Path) -> Generator[BinaryIO]:
    """Open a file for reading, decompressed; every error inside the block that comes from the file names it.

    Raises:
        DataError: If the file cannot be read, or its compressed data is damaged or truncated.
    """
    kind = compression_of(path)
    with reading(path):
        try:
            with _opened(path, kind) as file:
                yield file
        except (lzma.LZMAError, OSError) as problem:
            # gzip, bz2 and Arrow raise OSErrors without a number for damaged data
            if isinstance(problem, OSError) and (kind is None or problem.errno is not None):
                raise
            reason = ascii(" ".join(str(problem).split()) or type(problem).__name__)[1:-1]
            raise DataError(
                f"{path}: found damaged or truncated {kind} data ({reason}); expected a complete file. Copy or "
                "download the file again."
            ) from problem


def _opened(path: Path, kind: str | None) -> BinaryIO:
    if kind == "gzip":
        return cast("BinaryIO", gzip.open(path, "rb"))
    if kind == "bzip2":
        return cast("BinaryIO", bz2.open(path, "rb"))
    if kind == "xz":
        return cast("BinaryIO", lzma.open(path, "rb"))
    if kind == "Zstandard":
        import pyarrow  # pyright: ignore[reportMissingTypeStubs]

        stream = cast("Any", pyarrow).CompressedInputStream(str(path), "zstd")
        return cast("BinaryIO", io.BufferedReader(cast("io.RawIOBase", stream)))
    return path.open("rb")
