"""Gradients from one bank to another, to safetensors and back, and from the original's files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from graftwork.core.files import read_json, write_json
from graftwork.errors import ConfigError, DataError
from graftwork.methods.regrad.bank.backends import Backend
from graftwork.methods.regrad.bank.errors import BankCorruptionError, FingerprintMismatchError
from graftwork.methods.regrad.bank.files import holds_bank, text_key
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.bank.layout import Layout, decode, encode
from graftwork.methods.regrad.bank.records import Appended, Gradient, check_fingerprint, record_checksum

INDEX_FILE = "export.json"
ROWS_AT_ONCE = 64
_ABOUT = ("tokens", "loss", "norm", "truncated")


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of at most so many items."""
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part


def merge(target: GradientBank, sources: Sequence[GradientBank]) -> Appended:
    """Copy everything that other banks hold and this one does not, as it is, without computing anything again.

    Raises:
        FingerprintMismatchError: If a bank's gradients belong to something else, or are kept in another way.
        DuplicatePassageError: If an id stands for another text here; what was merged before stays.
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
            done = target.append_records([(name, row["key"], _as_it_is(row)) for name, row in rows.items()])
            total = _added(total, done)
    return total


def export(bank: GradientBank, folder: Path, ids: Sequence[str] | None = None) -> int:
    """Write gradients as safetensors, 32-bit, with an index of what they are.

    Args:
        bank: Where from.
        folder: Where to; must be empty or new.
        ids: What to write; None for all.

    Returns:
        How many records were written.
    """
    from safetensors.numpy import save_file

    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"Found files in {folder}; expected an empty folder to export to.")
    folder.mkdir(parents=True, exist_ok=True)
    names = bank.ids() if ids is None else list(ids)
    keys, about, files = {}, {}, []
    for number, part in enumerate(batched(names, ROWS_AT_ONCE), start=1):
        values = {}
        for name, row in bank.rows(part).items():
            keys[name] = row["key"]
            if row["key"] not in about:
                about[row["key"]] = {item: row[item] for item in _ABOUT}
                numbers = decode(row["value"], bank.layout.size, bank.precision, row["scale"])
                values[row["key"]] = np.array(numbers)
        if values:
            files.append(f"gradients-{number:05}.safetensors")
            save_file(values, folder / files[-1])
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
    """Make a bank of what `export` wrote.

    Raises:
        ConfigError: If the folder holds no export.
        BankCorruptionError: If a file of it lacks gradients.
    """
    from safetensors.numpy import load_file

    if not (folder / INDEX_FILE).exists():
        raise ConfigError(f"Found no {INDEX_FILE} in {folder}; expected what `graftwork bank export` wrote.")
    index = read_json(folder / INDEX_FILE)
    layout = Layout.of(index["layout"])
    bank = _begun(target, index["fingerprint"], layout, precision, index["recorded"])
    names: dict[str, list[str]] = {}
    for name, key in index["ids"].items():
        names.setdefault(key, []).append(name)
    for file in index["files"]:
        values = load_file(folder / file)
        rows = [
            (name, key, _new_record(values[key], index["records"][key], bank))
            for key in values
            for name in names.pop(key)
        ]
        bank.append_records(rows)
    if names:
        raise BankCorruptionError(f"{folder} lacks {len(names)} gradients that its index names. Export it again.")
    return bank


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
    """Make a bank of the original's gradient file, without running any code that may be hidden in it.

    The original names gradients after questions and ranks. Which passage that was, the augmented questions say; without
    ids in them, a passage is called after its text.

    Args:
        gradients: The `.pt` file: "question_rank" to tensors by PEFT name.
        questions: The augmented file that it was computed from.
        target: Where the new bank is to be: a folder, or an address in an object store.
        precision: How to keep numbers; 32-bit keeps them as they are.
        fingerprint: What the gradients depend on; by default the file itself, since it does not say.
        layout: The tensors of one gradient; by default those of the file's first.
        names: Our name of each tensor, by the original's; by default they keep theirs.

    Raises:
        DataError: If either file is not what it should be, or a gradient has no passage.
        ConfigError: If a gradient has other tensors than the layout.
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
            f"{gradients.name} in it. Give the augmented file that the gradients were computed from."
        )
    bank = _begun(target, named, layout, precision)
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


def _begun(
    target: str | Path | Backend,
    fingerprint: Mapping[str, str],
    layout: Layout,
    precision: str,
    recorded: Any = None,
) -> GradientBank:
    """A new bank, or the one that the same import began before it was stopped."""
    if not holds_bank(target):
        return GradientBank.create(
            target, fingerprint=fingerprint, layout=layout, precision=precision, recorded=recorded
        )
    bank = GradientBank(target, "a", fingerprint=fingerprint)
    if (bank.layout.plain(), bank.precision) != (layout.plain(), precision):
        raise ConfigError(f"Found a bank of another layout or precision in {target}. Name another folder.")
    return bank


def _load_original(path: Path) -> dict[str, dict[str, Any]]:
    import pickle

    import torch

    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(f"{path}: not readable as tensors alone ({reason}). Check that it is the original's.") from None
    good = (
        isinstance(stored, dict)
        and stored
        and all(
            isinstance(name, str)
            and isinstance(tensors, dict)
            and tensors
            and all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in tensors.items())
            for name, tensors in stored.items()
        )
    )
    if not good:
        raise DataError(f"{path}: expected a table of 'question_rank' to tensors by name; found something else.")
    return stored


def _passages(path: Path) -> dict[str, tuple[str, str]]:
    """A gradient's name, question and rank, to its passage's id and text."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        found = {}
        for row in rows:
            ids = row.get("passage_ids") or [f"text-{text_key(text)}" for text in row["passages"]]
            for rank, (name, text) in enumerate(zip(ids, row["passages"], strict=True)):
                found[f"{row['test_id']}_{rank}"] = (name, text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not readable as augmented questions ({error!r}). Check the path.") from None
    return found


def _as_it_is(row: Mapping[str, Any]) -> Any:
    return lambda: {name: value for name, value in row.items() if name != "checksum"}


def _new_record(values: np.ndarray, about: Mapping[str, Any], bank: GradientBank) -> Any:
    def make() -> dict[str, Any]:
        value, scale = encode(values, bank.precision)
        return {"value": value, "scale": scale, **{item: about[item] for item in _ABOUT}}

    return make


def _added(total: Appended, done: Appended) -> Appended:
    return Appended(
        total.written + done.written,
        total.aliased + done.aliased,
        total.skipped + done.skipped,
        total.replaced + done.replaced,
    )


def record_digests(bank: GradientBank) -> Iterator[tuple[str, int]]:
    """Every id with the checksum of its record, for comparing banks record for record."""
    for part in batched(bank.ids(), ROWS_AT_ONCE):
        for name, row in bank.rows(part).items():
            yield name, record_checksum(row)
