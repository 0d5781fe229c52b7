"""Full disks and missing permissions: one error that names the path, whichever library writes."""

from __future__ import annotations

import errno
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from graftwork.core.files import append_line, replace_bytes, write_json
from graftwork.core.storage import disk_error, storage_error, writing
from graftwork.errors import DataError, DiskFullError, ReadOnlyError, StorageError

BYTES = 20_000


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit the size of files, as a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _safetensors(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(BYTES)}, folder / "x.safetensors")


def _torch(folder: Path) -> None:
    torch.save({"a": torch.zeros(BYTES)}, folder / "x.pt")


def _arrow(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"a": np.random.default_rng(0).random(BYTES)}), folder / "x.parquet")


def _text(folder: Path) -> None:
    write_json(folder / "x.json", "x" * 10 * BYTES)


def _bytes(folder: Path) -> None:
    replace_bytes(folder / "x.png", b"x" * 10 * BYTES)


def _line(folder: Path) -> None:
    append_line(folder / "x.jsonl", {"a": "x" * 10 * BYTES})


@pytest.mark.parametrize("write", [_safetensors, _torch, _arrow, _text, _bytes, _line])
def test_a_library_that_hits_a_quota_gives_an_error_that_names_the_path(write: Callable[[Path], None], tmp_path: Path):
    with pytest.raises(StorageError, match=f"Cannot write {tmp_path}.*[Ff]ree space"), largest_file(BYTES):  # noqa: SIM117
        with writing(tmp_path):
            write(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".part"]


def test_an_index_that_hits_a_quota_is_not_called_incomplete(tmp_path):
    from graftwork.retrieval.embedded import build_embedded

    rows = "".join(f"{n}\tword{n} other{n} text{n * 7}\tt\n" for n in range(3000))
    (tmp_path / "c.tsv").write_text("id\ttext\ttitle\n" + rows)
    with pytest.raises(StorageError, match=r"index\.part"), largest_file(BYTES):
        build_embedded(tmp_path / "c.tsv", tmp_path / "index")


def test_a_bank_that_hits_a_quota_is_not_called_corrupt(tmp_path):
    from graftwork.methods.regrad.bank.gradient_bank import GradientBank
    from graftwork.methods.regrad.bank.layout import Layout
    from graftwork.methods.regrad.bank.records import Gradient

    layout = Layout.of([("w", (BYTES,))])
    bank = GradientBank.create(tmp_path / "bank", fingerprint={"a": "b"}, layout=layout, precision="float32")
    gradient = Gradient("1", "text", {"w": np.ones(BYTES, dtype=np.float32)})
    with pytest.raises(DiskFullError, match="bank"), largest_file(BYTES):
        bank.append([gradient])
    assert bank.append([gradient]).written == 1


MESSAGES = {
    "Error while serializing: I/O error: No space left on device (os error 28)": DiskFullError,
    "An error occurred: IoError No space left on device": DiskFullError,
    "LanceError(IO): Disk quota exceeded (os error 122), /lance/writer.rs:254": DiskFullError,
    "[Errno 30] Read-only file system: 'meta.json'": ReadOnlyError,
    "Permission denied (os error 13)": ReadOnlyError,
    "Input/output error (os error 5)": StorageError,
}


@pytest.mark.parametrize("text", MESSAGES)
def test_messages_of_libraries_are_recognised(text):
    found = storage_error(ValueError(text), "model")
    assert type(found) is MESSAGES[text]
    assert "model" in str(found)


def test_other_errors_and_closed_connections_are_left_alone():
    assert storage_error(ValueError("shape (28,)")) is None
    assert storage_error(BrokenPipeError(errno.EPIPE, "Broken pipe")) is None
    assert disk_error(FileNotFoundError(errno.ENOENT, "No such file")) is None
    with pytest.raises(KeyError), writing("x"):
        raise KeyError("a")
    with pytest.raises(DataError), writing("x"):
        raise DataError("No space left on device")


def test_the_cause_of_an_exception_is_searched():
    outer = RuntimeError("worker died")
    outer.__cause__ = OSError(errno.ENOSPC, "No space left on device", "shard")
    found = storage_error(outer)
    assert isinstance(found, DiskFullError)
    assert "shard" in str(found)


def test_a_write_without_a_reason_on_a_full_disk_is_a_full_disk(monkeypatch, tmp_path):
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    assert type(storage_error(error, tmp_path / "a" / "x.pt")) is StorageError
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 0}))
    assert type(storage_error(error, tmp_path / "a" / "x.pt")) is DiskFullError
