"""The adapter of a LoRA training as an ordinary adapter folder of PEFT, beside the merged weights of its run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from graftwork.core.files import apply_umask, remove_path, write_json, write_text
from graftwork.core.run_folder import RunFolder, absolute, is_run
from graftwork.core.storage import writing
from graftwork.errors import ConfigError
from graftwork.grafting.base_model import changed_weight
from graftwork.grafting.converted import Converted
from graftwork.grafting.peft_folder import CONFIG_FILE, is_adapter_folder
from graftwork.grafting.precision import as_stored
from graftwork.pipeline.loading import load_model
from graftwork.surgery.sites import named_modules, pretrained
from graftwork.training.phases import Phase

BASE = "base"
"""Folder in the adapter's with the model before training, where no checkpoint is that model."""


def write_base(converted: Converted, run: RunFolder, start: str) -> str:
    """Name the model that a training starts from, and write it beside the adapter unless it is a checkpoint.

    Args:
        converted: The model before training.
        run: Run folder.
        start: Checkpoint that the run starts from; empty if unknown.

    Returns:
        Folder or hub id of the model, for `base_model_name_or_path`.
    """
    inner: Any = pretrained(converted.model)
    if start and not converted.changes:
        name = str(RunFolder(start).model) if is_run(start) else start
        dtype = str(inner.dtype).removeprefix("torch.")
        if not is_adapter_folder(Path(name)) and _is_checkpoint(converted.model, name, dtype):
            return absolute(name)
    folder = run.adapter / BASE
    with writing(folder):
        remove_path(folder)
        with as_stored(converted.model):
            inner.save_pretrained(folder)
        if converted.tokenizer is not None:
            tokenizer: Any = converted.tokenizer
            tokenizer.save_pretrained(folder)
        apply_umask(folder)
    return str(folder.resolve())


def check_only_adapter(model: nn.Module, phases: Sequence[Phase]) -> None:
    """Refuse a training that changes more than the adapter, which a folder of PEFT would not contain.

    Raises:
        ConfigError: If a phase trains other parameters too.
    """
    adapter = {
        id(parameter)
        for name, module in named_modules(model)
        if "lora_" in name or "modules_to_save" in name
        for parameter in module.parameters(recurse=False)
    }
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for phase in phases:
        trained = [id(parameter) for group in phase.parameters(model) for parameter in group.parameters]
        if others := [names.get(one, "a parameter") for one in trained if one not in adapter]:
            raise ConfigError(
                f"lora_adapter is on, and the phase {phase.name} also trains {others[0]}, which an adapter folder does "
                "not contain. Leave lora_adapter out; model/ contains the result."
            )


def write_lora(model: Any, run: RunFolder, base: str) -> None:
    """Write the trained adapter into `adapter/` of a run.

    Args:
        model: The model as peft has wrapped it.
        run: Run folder.
        base: Folder or hub id of the model before training.
    """
    folder = run.adapter
    with writing(folder):
        model.save_pretrained(folder)
        config: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        write_json(folder / CONFIG_FILE, {**config, "base_model_name_or_path": base, "inference_mode": True})
        write_text(folder / "README.md", _readme(base))
        apply_umask(folder)


def _is_checkpoint(model: nn.Module, name: str, dtype: str) -> bool:
    """True if a checkpoint has all weights of the model, so that loaders find the same model there."""
    try:
        model_of, _ = load_model(name, dtype=dtype)
    except ConfigError:
        # a checkpoint without weights, or without a tokenizer
        return False
    same = pretrained(model_of).state_dict().keys() == pretrained(model).state_dict().keys()
    return same and changed_weight(model, name, lambda: model_of) is None


def _readme(base: str) -> str:
    named = "" if Path(base).exists() else f"base_model: {base}\n"
    return (
        f"---\nlibrary_name: peft\n{named}tags:\n- lora\n- graftwork\n---\n\n# Adapter trained with Graftwork\n\n"
        "The base model is the one before training; where that is a graft, the adapter belongs to the graft, and other "
        "programs need Graftwork to open it.\n"
    )
