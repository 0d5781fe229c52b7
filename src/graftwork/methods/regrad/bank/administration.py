"""`graftwork bank …` as far as it needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graftwork.core.config import to_plain
from graftwork.core.messages import say
from graftwork.errors import ConfigError
from graftwork.grafting.commands import Loader
from graftwork.methods.regrad.bank.gradient_bank import GradientBank


def stats(folder: str) -> dict[str, Any]:
    """Size and kind of a bank."""
    with GradientBank(folder) as bank:
        return {**bank.stats(), "fingerprint": dict(bank.manifest.fingerprint)}


def verify(folder: str) -> tuple[dict[str, Any], bool]:
    """What is wrong with a bank, and whether nothing is."""
    from graftwork.methods.regrad.bank.check import verify as check

    with GradientBank(folder) as bank:
        found = check(bank)
    return to_plain(found), found.whole


def delete(folder: str, ids: Sequence[str], index: str | None = None) -> dict[str, Any]:
    """Take passages out, of the index first, so that none is found that has no gradient."""
    if index is not None:
        from graftwork.retrieval.embedded import EmbeddedIndex

        EmbeddedIndex(index).delete(ids)
    missing = GradientBank(folder, "a").delete(ids)
    return {"deleted": len(dict.fromkeys(ids)) - len(missing), "missing": list(missing)}


def compact(folder: str) -> dict[str, Any]:
    """Give space back."""
    bank = GradientBank(folder, "a")
    before = bank.stats()["bytes"]
    bank.compact()
    return {"bytes_before": before, "bytes": bank.stats()["bytes"]}


def merge(folder: str, sources: Sequence[str]) -> dict[str, Any]:
    """Put banks together; a target that is not there is made like the first source."""
    from graftwork.methods.regrad.bank.files import holds_bank
    from graftwork.methods.regrad.bank.transfer import merge as put_together

    opened = [GradientBank(source) for source in sources]
    try:
        if holds_bank(folder):
            target = GradientBank(folder, "a")
        else:
            like = opened[0].manifest
            target = GradientBank.create(
                folder,
                fingerprint=like.fingerprint,
                layout=like.layout,
                precision=like.precision,
                recorded=like.recorded,
            )
        return to_plain(put_together(target, opened))
    finally:
        for bank in opened:
            bank.close()


def export(folder: str, output: str, ids: Sequence[str]) -> dict[str, Any]:
    """Write safetensors."""
    from graftwork.methods.regrad.bank.transfer import export as write

    with GradientBank(folder) as bank:
        return {"records": write(bank, Path(output), list(ids) or None), "folder": output}


def bring(
    load: Loader, source: str, output: str, questions: str | None, precision: str | None, model: str | None = None
) -> dict[str, Any]:
    """Make a bank of an export, or of the original's gradients; with `model` one that this run can answer from."""
    from graftwork.methods.regrad.bank.transfer import import_export, import_original

    if Path(source).is_dir():
        bank = import_export(Path(source), output, precision=precision or "bfloat16")
    elif questions is None:
        raise ConfigError("The original's gradients do not say which passages they are of. Add --questions FILE.")
    else:
        bank = import_original(
            Path(source), Path(questions), output, precision=precision or "float32", **_belonging(load, model)
        )
    say(f"Wrote {output}")
    return bank.stats()


def _belonging(load: Loader, model: str | None) -> dict[str, Any]:
    """What makes imported gradients those of a run."""
    if model is None:
        return {}
    from graftwork.methods.regrad.encoding.fingerprint import fingerprint
    from graftwork.methods.regrad.importing import original_names
    from graftwork.methods.regrad.modules import layout

    converted = load(model)
    own = next((method for method in converted.methods if method.name == "regrad"), None)
    if own is None:
        raise ConfigError(f"{model} is not converted with regrad. Name the run that `graftwork import` made.")
    return {
        "fingerprint": fingerprint(converted.model, converted.tokenizer, own.config),
        "layout": layout(converted.model),
        "names": {theirs: ours for ours, theirs in original_names(converted.model).items()},
    }
