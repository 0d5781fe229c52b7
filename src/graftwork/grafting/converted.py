"""A converted model and the files that describe it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graftwork.core.config import to_plain
from graftwork.core.files import swap_folder, write_json
from graftwork.core.run_folder import MANIFEST_FILE, RunFolder
from graftwork.core.storage import writing
from graftwork.core.version import __version__
from graftwork.errors import ConfigError
from graftwork.grafting.method import Change, Method
from graftwork.settings.recipe import RunConfig, read_run, write_run
from graftwork.surgery.sites import pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PROBE_TOKENS = 8

PROBE_VALUES = 16


@dataclass(frozen=True, slots=True)
class Origin:
    """Checkpoint that a model was loaded from, with the options of loading."""

    model: str
    """Absolute path of a folder, or hub id."""
    dtype: str | None = None
    device_map: str | None = None
    seed: int = 0
    """Seed of a new classification head and of random weights."""
    random_weights: bool = False
    """True if the checkpoint is a configuration only."""


@dataclass(frozen=True)
class Converted:
    """A model with the methods grafted onto it: result of `convert` and `load`, argument of the later stages."""

    model: Any
    """The model itself: still a PreTrainedModel, or one wrapped by PEFT."""
    methods: tuple[Method[Any], ...] = ()
    """Methods that changed the model, in order; empty for an untouched model."""
    changes: tuple[Change, ...] = ()
    tokenizer: PreTrainedTokenizerBase | None = None
    folder: RunFolder | None = field(default=None, repr=False)
    """Run folder that the model was loaded from, if any."""
    origin: Origin | None = field(default=None, repr=False)
    """Checkpoint that the model was loaded from, and how; None for a model built in Python."""

    def save(self, path: str | Path) -> Path:
        """Write `model/`, `conversion.json` and `run.yaml` into a run folder.

        Returns:
            The run folder.
        """
        return save(self, path)

    def configuration(self) -> RunConfig:
        """Run configuration that repeats the conversion; `run.yaml` contains it."""
        origin = self.origin or Origin(str(getattr(pretrained(self.model), "name_or_path", "")))
        method = self.methods[-1] if self.methods else None
        return RunConfig(
            model=origin.model,
            method=None if method is None else {"name": method.name, **to_plain(method.config)},
            dtype=origin.dtype,
            device_map=origin.device_map,
            seed=origin.seed,
            random_weights=origin.random_weights,
        )


def required_tokenizer(converted: Converted) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a converted model.

    Raises:
        ConfigError: If it has none.
    """
    if converted.tokenizer is None:
        raise ConfigError(
            "Found a model without a tokenizer. Pass tokenizer= to graftwork.convert, or load both from a folder."
        )
    return converted.tokenizer


def save(converted: Converted, path: str | Path) -> Path:
    """Write a converted model and its run configuration into a run folder, replacing earlier ones.

    Returns:
        The run folder.
    """
    run = RunFolder(path)
    write_model(converted, run)
    config = converted.configuration()
    if converted.folder is not None and converted.folder.path == run.path and run.run_file.exists():
        # a model saved back to its own run still starts from the checkpoint that the run started from
        config = replace(read_run(run), method=config.method)
    write_run(run.run_file, config)
    return run.path


def write_model(converted: Converted, run: RunFolder) -> None:
    """Replace `model/` and `conversion.json` of a run; `run.yaml` stays as it is."""
    new = run.path / "model.new"
    with writing(run.model):
        converted.model.save_pretrained(new)
        if converted.tokenizer is not None:
            tokenizer: Any = converted.tokenizer
            tokenizer.save_pretrained(new)
    probe = probe_model(converted.model)
    write_json(new / MANIFEST_FILE, _manifest(converted, probe))
    swap_folder(new, run.model)
    write_json(run.conversion_file, {"changes": [change.plain() for change in converted.changes], "probe": probe})


def _manifest(converted: Converted, probe: dict[str, Any]) -> dict[str, Any]:
    return {
        "graftwork": __version__,
        "methods": [{"name": method.name, **to_plain(method.config)} for method in converted.methods],
        "probe": probe,
    }


@torch.no_grad()
def probe_model(model: nn.Module) -> dict[str, Any]:
    """Output of a model for a fixed input, compared at loading.

    Returns:
        Some of the last logits as numbers, and a hash over all of them; the hash is equal only on the same machine.
    """
    inner = pretrained(model)
    config: Any = inner.config
    vocabulary = int(config.get_text_config().vocab_size)
    weight: Any = inner.get_input_embeddings().weight
    device = torch.device("cpu") if weight.device.type == "meta" else weight.device
    ids = (torch.arange(PROBE_TOKENS, device=device) * 7 + 3) % vocabulary
    batch = {"input_ids": ids[None]}
    if config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids[None, :4]
    training = model.training
    model.eval()
    try:
        outputs = model(**batch)
    finally:
        model.train(training)
    values = outputs[0].float().cpu().reshape(-1)
    positions = torch.linspace(0, len(values) - 1, min(PROBE_VALUES, len(values))).long()
    return {
        "values": [float(f"{value:.6g}") for value in values[positions]],
        "hash": hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16],
        "dtype": str(outputs[0].dtype).removeprefix("torch."),
    }
