"""Merging, export and import of banks, and import of the original's gradient files."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from graftwork.core.files import apply_umask, write_json
from graftwork.core.readers import (
    fields_of,
    join_inside,
    read_json_file,
    read_json_mapping,
    read_tensors,
    require,
    shorten,
)
from graftwork.core.storage import storage_error, writing
from graftwork.errors import ConfigError, DataError
from graftwork.methods.regrad.bank.backends import Backend
from graftwork.methods.regrad.bank.errors import BankCorruptionError, FingerprintMismatchError
from graftwork.methods.regrad.bank.files import holds_bank, text_key
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.bank.layout import FloatArray, Layout, decode, encode
from graftwork.methods.regrad.bank.records import (
    Appended,
    Gradient,
    Record,
    RecordMaker,
    check_fingerprint,
    record_checksum,
)

if TYPE_CHECKING:
    from torch import Tensor

INDEX_FILE = "export.json"
_SHARD = re.compile(r"gradients-\d{5,}\.safetensors")
ROWS_AT_ONCE = 64
_METADATA = ("tokens", "loss", "norm", "truncated")
_MOST_NUMBERS = 2**29
"""Largest gradient that one column of Arrow can store in float32."""
Item = TypeVar("Item")


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield lists of at most `size` items."""
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part


def merge(target: GradientBank, sources: Sequence[GradientBank]) -> Appended:
    """Copy the encoded records that `target` lacks from other banks.

    Raises:
        FingerprintMismatchError: If a bank has another fingerprint, layout or precision.
        DuplicatePassageError: If an id refers to another text in `target`; earlier commits of the merge remain.
    """
    total = Appended()
    for source in sources:
        check_fingerprint(source.manifest.fingerprint, target.manifest.fingerprint)
        for name, found, expected in (
            ("tensor layout", source.layout.plain(), target.layout.plain()),
            ("precision", source.precision, target.precision),
        ):
            if found != expected:
                raise FingerprintMismatchError(name, str(found)[:60], str(expected)[:60])
        for names in batched(source.ids(), ROWS_AT_ONCE):
            rows = source.rows(names)
            done = target.append_records([(name, row["key"], _copied(row)) for name, row in rows.items()])
            total = _added(total, done)
    return total


def export(bank: GradientBank, folder: Path, ids: Sequence[str] | None = None) -> int:
    """Write gradients as float32 safetensors, with an index file of ids and metadata; repeat it after an interruption.

    Args:
        bank: Bank to read.
        folder: Output folder; must be new, empty, or contain an interrupted export.
        ids: Ids to export; None for all.

    Returns:
        Number of records written.

    Raises:
        ConfigError: If the folder contains files.
    """
    from safetensors.numpy import save_file  # pyright: ignore[reportUnknownVariableType]

    # an export without index file was interrupted; the index file is written last
    if folder.exists() and any(not _SHARD.fullmatch(path.name) for path in folder.iterdir()):
        raise ConfigError(f"Found files in {folder}; expected an empty folder to export to.")
    folder.mkdir(parents=True, exist_ok=True)
    names = bank.ids() if ids is None else list(ids)
    keys: dict[str, str] = {}
    about: dict[str, dict[str, Any]] = {}
    files: list[str] = []
    for number, part in enumerate(batched(names, ROWS_AT_ONCE), start=1):
        values: dict[str, FloatArray] = {}
        for name, row in bank.rows(part).items():
            keys[name] = row["key"]
            if row["key"] not in about:
                about[row["key"]] = {item: row[item] for item in _METADATA}
                numbers = decode(row["value"], bank.layout.size, bank.precision, row["scale"])
                values[row["key"]] = np.array(numbers)
        if values:
            files.append(f"gradients-{number:05}.safetensors")
            with writing(folder / files[-1]):
                save_file(values, folder / files[-1])
            apply_umask(folder / files[-1])
    write_json(
        folder / INDEX_FILE,
        {
            "schema": 1,
            "fingerprint": dict(bank.manifest.fingerprint),
            "layout": bank.layout.plain(),
            "recorded": dict(bank.manifest.recorded),
            "files": files,
            "ids": keys,
            "records": about,
        },
    )
    return len(about)


def import_export(folder: Path, target: str | Path | Backend, *, precision: str = "bfloat16") -> GradientBank:
    """Create a bank from the output of `export`; an interrupted import is resumed.

    Raises:
        ConfigError: If the folder contains no export.
        BankCorruptionError: If gradients named in the index are missing.
    """
    from safetensors.numpy import load_file  # pyright: ignore[reportUnknownVariableType]

    if not (folder / INDEX_FILE).exists():
        raise ConfigError(f"Found no {INDEX_FILE} in {folder}; expected the output of `graftwork bank export`.")
    where = str(folder / INDEX_FILE)
    index = read_json_mapping(folder / INDEX_FILE)
    with fields_of(where, "the output of `graftwork bank export`"):
        layout = Layout.of((str(name), [int(size) for size in shape]) for name, shape in index["layout"])
        if not 0 < layout.size <= _MOST_NUMBERS or any(size < 0 for _, shape in layout.tensors for size in shape):
            raise DataError(f"{where}: found a layout of {layout.size} numbers; expected that of a gradient.")
        records = {key: _metadata(value, where) for key, value in require(index, "records", dict, where).items()}
        files = [join_inside(folder, name, where) for name in require(index, "files", list, where)]
        fingerprint, recorded = (require(index, name, dict, where) for name in ("fingerprint", "recorded"))
        names: dict[str, list[str]] = {}
        for name, key in require(index, "ids", dict, where).items():
            if not name or not isinstance(key, str):
                raise DataError(f"{where}: found the id {shorten(name)} of {shorten(key)}; expected names.")
            names.setdefault(key, []).append(name)
    bank = _open_or_create(target, fingerprint, layout, precision, recorded)
    for file in files:
        try:
            values = load_file(file)
        except Exception as error:
            raise storage_error(error, file) or BankCorruptionError(
                f"{file} is not readable as safetensors ({shorten(str(error))}). Export the bank again."
            ) from error
        if odd := [key for key in values if key not in names or key not in records or values[key].size != layout.size]:
            raise BankCorruptionError(
                f"{file}: found a gradient {odd[0]!r} that {INDEX_FILE} does not describe. Export the bank again."
            )
        rows = [
            (name, key, _new_record(values[key].ravel(), records[key], bank))
            for key in values
            for name in names.pop(key)
        ]
        bank.append_records(rows)
    if names:
        raise BankCorruptionError(f"{folder} lacks {len(names)} gradients that its index names. Export it again.")
    return bank


def _metadata(value: Any, where: str) -> dict[str, Any]:
    """Check the metadata of one exported gradient; an unknown loss is null in JSON."""
    numbers = {
        name: math.nan if value.get(name, math.nan) is None else float(require(value, name, (int, float), where))
        for name in ("loss", "norm")
    }
    tokens = require(value, "tokens", int, where)
    if not 0 <= tokens < 2**31:
        raise DataError(f"{where}: found {shorten(tokens)} as 'tokens'; expected a number of tokens.")
    return {
        "tokens": tokens,
        **numbers,
        "truncated": require(value, "truncated", bool, where),
    }


def import_original(
    gradients: Path,
    questions: Path,
    target: str | Path | Backend,
    *,
    precision: str = "float32",
    fingerprint: Mapping[str, str] | None = None,
    layout: Layout | None = None,
    names: Mapping[str, str] | None = None,
) -> GradientBank:
    """Create a bank from the original's gradient file, without executing pickled code.

    The original names gradients by question and rank. The augmented questions map these names to passages; a passage
    without an id is named after the digest of its text. An interrupted import is resumed.

    Args:
        gradients: The `.pt` file: "question_rank" to tensors by PEFT name.
        questions: Augmented file that the gradients were computed from.
        target: Location of the new bank: a folder, or an address in an object store.
        precision: Storage format of the numbers; float32 is lossless.
        fingerprint: Everything that the gradients depend on; by default the digest of the file.
        layout: Tensors of one gradient; by default those of the first gradient in the file.
        names: Graftwork's tensor name by the original's; by default names are kept.

    Raises:
        DataError: If a file has another format, or a gradient has no passage.
        ConfigError: If the tensors of a gradient do not match the layout.
    """
    stored = _load_original(gradients)
    if names is not None:
        stored = {name: {names.get(key, key): value for key, value in own.items()} for name, own in stored.items()}
    texts = _passages(questions)
    first = next(iter(stored.values()))
    layout = layout or Layout.of((name, tuple(tensor.shape)) for name, tensor in first.items())
    named = fingerprint or {"source": f"{gradients.name} {blake2b(gradients.read_bytes(), digest_size=16).hexdigest()}"}
    if lost := [name for name in stored if name not in texts]:
        raise DataError(
            f"{questions}: found no passage for gradient {lost[0]!r} ({len(lost)} such); expected question and rank of "
            f"{gradients.name} in it. Pass the augmented file that the gradients were computed from."
        )
    bank = _open_or_create(target, named, layout, precision)
    for part in batched(stored.items(), ROWS_AT_ONCE):
        bank.append(
            [
                Gradient(
                    texts[name][0], texts[name][1], {key: tensor.float().numpy() for key, tensor in tensors.items()}
                )
                for name, tensors in part
            ]
        )
    return bank


def _open_or_create(
    target: str | Path | Backend,
    fingerprint: Mapping[str, str],
    layout: Layout,
    precision: str,
    recorded: Mapping[str, Any] | None = None,
) -> GradientBank:
    """A new bank, or the bank of the same interrupted import."""
    if not holds_bank(target):
        return GradientBank.create(
            target, fingerprint=fingerprint, layout=layout, precision=precision, recorded=recorded
        )
    bank = GradientBank(target, "a", fingerprint=fingerprint)
    if (bank.layout.plain(), bank.precision) != (layout.plain(), precision):
        raise ConfigError(f"Found a bank of another layout or precision in {target}. Choose another folder.")
    return bank


def _load_original(path: Path) -> dict[str, dict[str, Tensor]]:
    stored = read_tensors(path, advice="Check that the original wrote it.")
    if not _is_gradient_file(stored):
        raise DataError(f"{path}: expected a table of 'question_rank' to tensors by name; found something else.")
    return cast("dict[str, dict[str, Tensor]]", stored)


def _is_gradient_file(stored: Any) -> bool:
    if not isinstance(stored, dict):
        return False
    content = cast("dict[Any, Any]", stored)
    return bool(content) and all(isinstance(name, str) and _are_tensors(value) for name, value in content.items())


def _are_tensors(value: Any) -> bool:
    import torch

    if not isinstance(value, dict):
        return False
    content = cast("dict[Any, Any]", value)
    return bool(content) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items()
    )


def _passages(path: Path) -> dict[str, tuple[str, str]]:
    """Map "question_rank" to id and text of the passage."""
    rows = read_json_file(path)
    if not isinstance(rows, list):
        raise DataError(f"{path}: found a {type(rows).__name__}; expected a list of augmented questions.")
    found: dict[str, tuple[str, str]] = {}
    for number, row in enumerate(cast("list[Any]", rows)):
        where = f"{path}, record {number}"
        texts = [require({"passages": text}, "passages", str, where) for text in require(row, "passages", list, where)]
        question = require(row, "test_id", (int, str), where)
        ids = (
            require(row, "passage_ids", list, where)
            if row.get("passage_ids")
            else [f"text-{text_key(t)}" for t in texts]
        )
        with fields_of(where, "as many passage_ids as passages"):
            for rank, (name, text) in enumerate(zip(ids, texts, strict=True)):
                found[f"{question}_{rank}"] = (require({"passage_ids": name}, "passage_ids", str, where), text)
    return found


def _copied(row: Record) -> RecordMaker:
    return lambda: {name: value for name, value in row.items() if name != "checksum"}


def _new_record(values: FloatArray, about: Mapping[str, Any], bank: GradientBank) -> RecordMaker:
    def make() -> Record:
        value, scale = encode(values, bank.precision)
        return {"value": value, "scale": scale, **{item: about[item] for item in _METADATA}}

    return make


def _added(total: Appended, done: Appended) -> Appended:
    return Appended(
        total.written + done.written,
        total.aliased + done.aliased,
        total.skipped + done.skipped,
        total.replaced + done.replaced,
    )


def record_digests(bank: GradientBank) -> Iterator[tuple[str, int]]:
    """Yield every id with the checksum of its record, to compare banks record by record."""
    for part in batched(bank.ids(), ROWS_AT_ONCE):
        for name, row in bank.rows(part).items():
            yield name, record_checksum(row)
