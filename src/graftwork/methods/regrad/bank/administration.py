"""Implementation of the `graftwork bank` commands that operate on existing banks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graftwork.core.config import to_plain
from graftwork.core.devices import CPU
from graftwork.core.messages import say
from graftwork.errors import ConfigError
from graftwork.grafting.commands import Loader
from graftwork.grafting.converted import required_tokenizer
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.config import ReGradConfig
from graftwork.retrieval import open_index


def stats(folder: str) -> dict[str, Any]:
    """Return size and fingerprint of a bank."""
    with GradientBank(folder) as bank:
        return {**bank.stats(), "fingerprint": dict(bank.manifest.fingerprint)}


def verify(folder: str) -> tuple[dict[str, Any], bool]:
    """Verify a bank; return the result, and True if the bank has no problem."""
    from graftwork.methods.regrad.bank.check import verify as check

    with GradientBank(folder) as bank:
        found = check(bank)
    return to_plain(found), found.whole


def delete(folder: str, ids: Sequence[str], index: str | None = None, *, erase: bool = False) -> dict[str, Any]:
    """Delete passages, from the bank and from its index together.

    Args:
        folder: Location of the bank.
        ids: Ids of the passages.
        index: Folder of the embedded index; None for none.
        erase: Remove their bytes from the files of both, and return the record of the erasure too.
    """
    bank, opened = GradientBank(folder, "a"), None
    if index is not None:
        opened = open_index(index)
    found: dict[str, Any] = {}
    if erase:
        from graftwork.methods.regrad.bank.erasure import erase as erase_from_both

        missing, record = erase_from_both(bank, opened, ids)
        found = {"erasure": to_plain(record)}
    elif opened is None:
        missing = bank.delete(ids)
    else:
        from graftwork.methods.regrad.bank.changes import delete as delete_from_both

        missing = delete_from_both(bank, opened, ids)
    return {"deleted": len(dict.fromkeys(ids)) - len(missing), "missing": list(missing), **found}


def compact(folder: str) -> dict[str, Any]:
    """Compact a bank; return its size before and after."""
    bank = GradientBank(folder, "a")
    before = bank.stats()["bytes"]
    bank.compact()
    return {"bytes_before": before, "bytes": bank.stats()["bytes"]}


def merge(folder: str, sources: Sequence[str]) -> dict[str, Any]:
    """Merge banks; a missing target is created with the manifest of the first source."""
    from graftwork.methods.regrad.bank.files import holds_bank
    from graftwork.methods.regrad.bank.transfer import merge as merge_banks

    opened = [GradientBank(source) for source in sources]
    try:
        if holds_bank(folder):
            target = GradientBank(folder, "a")
        else:
            first = opened[0].manifest
            target = GradientBank.create(
                folder,
                fingerprint=first.fingerprint,
                layout=first.layout,
                precision=first.precision,
                recorded=first.recorded,
            )
        return to_plain(merge_banks(target, opened))
    finally:
        for bank in opened:
            bank.close()


def export(folder: str, output: str, ids: Sequence[str]) -> dict[str, Any]:
    """Export gradients as safetensors; an empty list of ids exports all."""
    from graftwork.methods.regrad.bank.transfer import export as write

    with GradientBank(folder) as bank:
        return {"records": write(bank, Path(output), list(ids) or None), "folder": output}


def import_bank(
    load: Loader, source: str, output: str, questions: str | None, precision: str | None, model: str | None = None
) -> dict[str, Any]:
    """Create a bank from an export or from the original's gradients.

    Args:
        load: Loads a run.
        source: Folder of an export, or the original's `.pt` file.
        output: Location of the new bank.
        questions: Augmented questions of the original's gradients.
        precision: Storage format of the numbers; lossless by default for the original's gradients.
        model: Run of the checkpoint that the original's gradients belong to; it can answer from the bank.

    Raises:
        ConfigError: If the questions are missing, or the run has no ReGrad adapter.
    """
    from graftwork.methods.regrad.bank.transfer import import_export, import_original

    if Path(source).is_dir():
        bank = import_export(Path(source), output, precision=precision or "bfloat16")
    elif questions is None:
        raise ConfigError(
            "Found gradients of the original, without passages; expected their questions. Add --questions FILE."
        )
    else:
        bank = import_original(
            Path(source), Path(questions), output, precision=precision or "float32", **_ownership(load, model)
        )
    say(f"Wrote {output}")
    return bank.stats()


def _ownership(load: Loader, model: str | None) -> dict[str, Any]:
    """Fingerprint, layout and tensor names of a run, for imported gradients."""
    if model is None:
        return {}
    from graftwork.methods.regrad.encoding.fingerprint import fingerprint
    from graftwork.methods.regrad.importing import original_names
    from graftwork.methods.regrad.modules import layout

    converted = load(model, device=CPU)
    configs = [method.config for method in converted.methods if isinstance(method.config, ReGradConfig)]
    if not configs:
        raise ConfigError(f"{model} is not converted with regrad. Use the run that `graftwork import regrad` created.")
    return {
        "fingerprint": fingerprint(converted.model, required_tokenizer(converted), configs[0]),
        "layout": layout(converted.model),
        "names": {theirs: ours for ours, theirs in original_names(converted.model).items()},
    }
