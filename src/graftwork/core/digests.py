"""SHA-256 digests of the files in a folder, and their verification."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, cast

from graftwork.core.files import read_json, write_record
from graftwork.errors import CheckpointMismatchError

FULL_LIMIT = 8 * 2**30
"""Total size of weights in bytes up to which every byte is verified at loading."""
HEAD_BYTES = 2**20
"""Bytes at the start of a file that are verified above the limit; they contain the header of a safetensors file."""
SOURCES_FILE = "sources.json"
"""Digests of the files outside a run that a phase read."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def head_digest(path: Path) -> str:
    """SHA-256 of the first `HEAD_BYTES` bytes of a file."""
    with path.open("rb") as file:
        return hashlib.sha256(file.read(HEAD_BYTES)).hexdigest()


def describe_files(folder: Path, files: Iterable[Path] | None = None) -> dict[str, dict[str, Any]]:
    """Size and digests of files, by path relative to a folder.

    Args:
        folder: The folder.
        files: Files below it; all by default.
    """
    return {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": file_digest(path),
            "head": head_digest(path),
        }
        for path in sorted(folder.rglob("*") if files is None else files)
        if path.is_file()
    }


def verify_files(
    folder: Path, recorded: Mapping[str, Mapping[str, Any]], *, deep: bool = False, verified: Collection[str] = ()
) -> None:
    """Compare the files of a folder with their recorded digests.

    Every byte is read, except where the weights are larger than `FULL_LIMIT` in total: of those, the size and the first
    `HEAD_BYTES` bytes are compared.

    Args:
        folder: Folder of the files.
        recorded: Output of `describe_files`.
        deep: Read every byte at any size.
        verified: Names that are not compared again.

    Raises:
        CheckpointMismatchError: If a file is missing or differs, or if there are weights that are not recorded; the
            message names the file.
    """
    sizes = [int(entry["size"]) for name, entry in recorded.items() if name.endswith(WEIGHT_SUFFIXES)]
    whole = deep or sum(sizes) <= FULL_LIMIT
    for name, entry in recorded.items():
        path = _inside(folder, name)
        if name in verified:
            continue
        if not path.is_file():
            raise CheckpointMismatchError(
                f"{path} is missing; the manifest of {folder} lists it. Restore the file, or convert or train again."
            )
        if (problem := verify_file(path, entry, whole=whole or not name.endswith(WEIGHT_SUFFIXES))) is not None:
            raise _changed(path, problem)
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in recorded:
            raise CheckpointMismatchError(
                f"{path} is not in the manifest of {folder}. Remove the file, or save the model again."
            )


def verify_file(path: Path, entry: Mapping[str, Any], *, whole: bool) -> str | None:
    """Compare a file with its recorded size and digests.

    Args:
        path: The file.
        entry: Its entry in the output of `describe_files`.
        whole: Read every byte; otherwise the first `HEAD_BYTES` bytes.

    Returns:
        The difference, or None.
    """
    size = path.stat().st_size
    if size != entry["size"]:
        return f"it has {size} bytes instead of {entry['size']}"
    kind = "sha256" if whole else "head"
    found = file_digest(path) if whole else head_digest(path)
    return None if found == entry[kind] else f"its SHA-256 is {found[:12]}… instead of {str(entry[kind])[:12]}…"


def write_sources(folder: Path, files: Mapping[str, str]) -> None:
    """Record files outside a run that its training read, such as a teacher's weights.

    Args:
        folder: Folder of the phase.
        files: SHA-256 by absolute path.
    """
    write_record(folder / SOURCES_FILE, {"files": dict(files)})


def changed_sources(folder: Path) -> list[str]:
    """Paths recorded by `write_sources` whose files exist and have changed since."""
    record = folder / SOURCES_FILE
    recorded: Mapping[str, str] = read_json(record).get("files", {}) if record.exists() else {}
    return [path for path, digest in recorded.items() if Path(path).is_file() and file_digest(Path(path)) != digest]


def _inside(folder: Path, name: str) -> Path:
    """Path of a recorded file, which must be inside the folder."""
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name:
        raise CheckpointMismatchError(f"The manifest of {folder} lists {name!r}. Expected names of files inside it.")
    return folder.joinpath(*parts)


def _changed(path: Path, difference: str) -> CheckpointMismatchError:
    return CheckpointMismatchError(
        f"{path} has changed since the model was saved: {difference}. Restore the file, or convert or train again."
    )


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary, rules, special tokens and chat template."""
    content: dict[str, Any] = {"special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()}}
    content["chat_template"] = getattr(tokenizer, "chat_template", None)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content["vocabulary"] = tokenizer.get_vocab()
    else:
        rules = cast("dict[str, Any]", json.loads(backend.to_str()))
        # truncation and padding are settings of the last call
        content["rules"] = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
