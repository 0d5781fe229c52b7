"""Structure of safetensors files, checked without reading the tensors."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, cast

from graftwork.core.readers import JsonError, parse_json, reading
from graftwork.errors import CheckpointMismatchError

_PREFIX = 8
_LONGEST_HEADER = 100_000_000
"""Limit of the format in bytes."""


def safetensors_problem(path: Path) -> str | None:
    """Return the fault of a safetensors file, such as a truncation, or None.

    Raises:
        CheckpointMismatchError: If the file cannot be read.
    """
    size = path.stat().st_size
    with reading(path, error=CheckpointMismatchError), path.open("rb") as file:
        prefix = file.read(_PREFIX)
        if len(prefix) < _PREFIX:
            return f"it has {size} bytes"
        (length,) = struct.unpack("<Q", prefix)
        if length > min(_LONGEST_HEADER, size - _PREFIX):
            return f"its header of {length} bytes exceeds the file of {size} bytes"
        content = file.read(length)
    try:
        header = parse_json(content, any_text=True)
    except JsonError as error:
        return f"its header is not JSON ({error.reason})"
    if not isinstance(header, dict):
        return "its header is no JSON object"
    entries = cast("dict[str, Any]", header)
    try:
        end = max([0, *(int(entry["data_offsets"][1]) for name, entry in entries.items() if name != "__metadata__")])
    except (TypeError, KeyError, IndexError, ValueError, OverflowError):
        return "its header describes no tensors"
    expected = _PREFIX + length + end
    return None if size == expected else f"it has {size} bytes; its header describes {expected}"
