"""Import of checkpoints and configuration files of the authors' code, without executing pickled code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from graftwork.core.config import build, to_plain
from graftwork.core.devices import CPU
from graftwork.core.messages import say
from graftwork.core.readers import fields_of, read_json_mapping, read_tensors
from graftwork.core.run_folder import RunFolder
from graftwork.errors import CheckpointMismatchError, ConfigError, DataError
from graftwork.grafting.commands import ModelLoader
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import Origin, save
from graftwork.methods.regrad.config import ReGradConfig
from graftwork.methods.regrad.modules import adapters
from graftwork.methods.regrad.text.authors_prompts import PROMPTS_FILE, authors_prompts
from graftwork.settings.recipe import read_run, write_run
from graftwork.settings.training import TrainingSettings
from graftwork.surgery.sites import pretrained
from graftwork.tasks.prompts import prompt_family, recorded

CHECKPOINT = "meta_state_dict.pth"
ENCODED_TOKENS, TRAINED_TOKENS = 2048, 1024
"""Maximum passage length of the original when it stores gradients, and in training without `max_context_len`."""

OWN_WORDS = "graftwork"
"""Value of `prompt` for this library's words."""

_MODULE = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj")
_PREFIX = "base_model.base_model.model."
_STEP = "alpha_"

_PEFT = {"peft_type", "r", "lora_alpha", "target_modules"}
_LEARNER = {"base_model_name_or_path", "init_alpha", "alpha_mode", "use_simple_prompt", "load_dtype"}
_UNREAD = {"train_with_only_related", "eval_with_only_related", "do_eval"}
_TRAIN = _UNREAD | {
    "meta_batch_size",
    "meta_lr",
    "num_epochs",
    "logging_steps",
    "eval_steps",
    "save_best",
    "num_samples_for_eval",
    "eval_only_loss",
    "outer_loss",
    "mixed_precision",
    "lr_scheduler",
    "max_context_len",
}
_SCHEDULES = {"LinearLR": "linear", "CosineAnnealingLR": "cosine"}
_DTYPES = {"default": "float32", "auto": None, "fp16": "float16"}


@dataclass(frozen=True)
class Original:
    """Graftwork settings equivalent to the authors' four configuration files."""

    method: ReGradConfig
    model: str
    """Name of the base model."""
    dtype: str | None
    """Type that the base model is loaded in; None for the type of its checkpoint."""
    train: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Training settings, without tasks."""
    evaluate: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Evaluation settings."""


def import_run(
    load_model: ModelLoader,
    folder: str,
    output: str,
    model: str | None,
    dtype: str | None,
    *,
    prompt: str | None = None,
    allow_unknown: bool,
) -> list[dict[str, Any]]:
    """Convert the base model, load the authors' trained adapter into it, and save it as a run.

    Args:
        load_model: Loads the base model.
        folder: Folder that the authors' code wrote.
        output: Run folder to write.
        model: Base model; by default the one that the checkpoint's configuration names.
        dtype: Data type of the weights; by default as recorded.
        prompt: Prompt family that the run records, or `graftwork` for this library's words; by default the authors'
            words, read from their code beside the checkpoint.
        allow_unknown: Ignore unknown keys of the authors' configuration.

    Returns:
        The changed modules.
    """
    from graftwork.methods.regrad.method import ReGrad

    found = read_original(Path(folder), allow_unknown=allow_unknown)
    if prompt is None:
        words = authors_prompts(Path(folder), simple=found.method.prompt == "simple")
        if words is None:
            say(
                f"Found no src/{PROMPTS_FILE} of the authors above {folder}; questions are asked in Graftwork's words, "
                "for which the checkpoint was not trained. Import from outputs/ of their repository, or pass --prompt."
            )
        prompt = found.method.prompt if words is None else recorded(words)
    method = replace(found.method, prompt=found.method.prompt if prompt == OWN_WORDS else prompt)
    if method.prompt is not None:
        prompt_family(method.prompt)  # reads a file before the model is loaded
    name = model or found.model
    loaded, tokenizer = load_model(name, device=CPU, dtype=dtype or found.dtype)
    check_positions(loaded, method)
    converted = convert(loaded, ReGrad(method), tokenizer=tokenizer)
    load_original(converted.model, Path(folder) / CHECKPOINT)
    origin = Origin(name, dtype or found.dtype)
    run = RunFolder(save(replace(converted, model=converted.model.eval(), origin=origin), output))
    train = build(TrainingSettings, found.train, where=folder) if found.train else None
    with run.writing():
        write_run(run.run_file, replace(read_run(run), train=train))
    say(f"Imported {len(converted.changes)} adapters; wrote {output}")
    return [to_plain(change) for change in converted.changes]


def read_original(folder: Path, *, allow_unknown: bool = False) -> Original:
    """Read the configuration files of the original.

    `peft_config.json` and `learner_config.json` are required; `train_args.json` (or `train_specific_args.json`) and
    `generation_config.json` are optional.

    Args:
        folder: Folder of the files; the original writes them next to its checkpoint.
        allow_unknown: Ignore unknown keys instead of raising an error.

    Raises:
        ConfigError: If a required file is missing, or a setting is unsupported.
    """
    peft = _read(folder / "peft_config.json", _PEFT, allow_unknown, required=True)
    learner = _read(folder / "learner_config.json", _LEARNER, allow_unknown, required=True)
    name = "train_args.json" if (folder / "train_args.json").exists() else "train_specific_args.json"
    train = _read(folder / name, _TRAIN, allow_unknown)
    generation = _read(folder / "generation_config.json", None, allow_unknown)
    with fields_of(str(folder), "the configuration files of the original", error=ConfigError):
        settings: dict[str, Any] = {
            **_modules(peft, folder / "peft_config.json"),
            "rank": peft.get("r", 8),
            "lora_alpha": float(peft.get("lora_alpha", 8)),
            "step_size_mode": learner.get("alpha_mode", "tie"),
            "initial_step_size": float(learner.get("init_alpha", 0.01)),
            "prompt": "simple" if learner.get("use_simple_prompt") else None,
            "answer_end": "newline",
            "max_document_tokens": train.get("max_context_len", TRAINED_TOKENS) if train else ENCODED_TOKENS,
            **_method_of(train),
        }
        training = _training_of(train, folder / name)
    if (dtype := str(learner.get("load_dtype", "default"))) not in _DTYPES:
        raise ConfigError(f"load_dtype is {dtype!r} in {folder}. Expected one of: {', '.join(_DTYPES)}.")
    tokens = generation.get("max_new_tokens")
    return Original(
        build(ReGradConfig, settings, where=str(folder)),
        str(learner.get("base_model_name_or_path", "meta-llama/Llama-3.2-3B-Instruct")),
        _DTYPES[dtype],
        training,
        {} if tokens is None else {"max_new_tokens": tokens},
    )


def load_original(model: nn.Module, checkpoint: Path) -> None:
    """Load adapter and step sizes from the original's `meta_state_dict.pth` into a converted model.

    Args:
        model: The converted model.
        checkpoint: Path of the file.

    Raises:
        DataError: If it is not readable as tensors only.
        CheckpointMismatchError: If a tensor is missing, unexpected, or of another shape; names it.
    """
    stored = _load(checkpoint)
    # the original's name of a shared step size is not documented; there is only one candidate
    shared = [name for name in stored if name.startswith("alpha")]
    expected = dict(_expected(model, shared[0] if len(shared) == 1 else "alpha"))
    missing, extra = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if missing or extra:
        words = [f"no {missing[0]!r}" if missing else "", f"an unknown {extra[0]!r}" if extra else ""]
        raise CheckpointMismatchError(
            f"{checkpoint} holds {' and '.join(filter(None, words))} ({len(missing)} missing, {len(extra)} "
            "unexpected). Convert with the peft and learner configuration that the checkpoint was trained with."
        )
    for name, parameter in expected.items():
        if stored[name].shape != parameter.shape:
            raise CheckpointMismatchError(
                f"{checkpoint}: {name!r} has shape {list(stored[name].shape)}; expected {list(parameter.shape)}."
            )
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(stored[name])


def check_positions(model: nn.Module, config: ReGradConfig) -> None:
    """Verify that the longest passage fits into the model's context.

    Raises:
        ConfigError: If it does not.
    """
    inner: Any = pretrained(model).config
    positions = getattr(inner.get_text_config(), "max_position_embeddings", None)
    if positions is not None and config.max_document_tokens > positions:
        raise ConfigError(
            f"max_context_len is {config.max_document_tokens}, and the model has {positions} positions. Expected at "
            "most as many; name the model that the checkpoint was trained with, or lower max_context_len."
        )


def original_names(model: nn.Module) -> dict[str, str]:
    """Map Graftwork's name of every tensor of a gradient to the original's."""
    return {
        f"{path}.{name}": f"base_model.model.{path}.{name}.default.weight"
        for path in adapters(model)
        for name in ("lora_A", "lora_B")
    }


def _expected(model: nn.Module, shared: str) -> list[tuple[str, nn.Parameter]]:
    found: list[tuple[str, nn.Parameter]] = []
    for path, adapter in adapters(model).items():
        for letter in "AB":
            name = f"base_model.model.{path}.lora_{letter}.default.weight"
            found.append((f"base_model.{name}", adapter.get_parameter(f"lora_{letter}")))
            if adapter.mode in ("tie", "full"):
                found.append((_STEP + name.replace(".", "-"), adapter.get_parameter(f"step_size_{letter}")))
        if adapter.mode == "same" and "step_size" in dict(adapter.named_parameters(recurse=False)):
            found.append((shared, adapter.get_parameter("step_size")))
    return found


def _load(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise DataError(f"Found no {path}; expected the checkpoint that the original writes. Check the folder.")
    stored = read_tensors(path, advice="Check that the original wrote it.")
    if isinstance(stored, dict):
        content = cast("dict[Any, Any]", stored)
        if all(isinstance(value, Tensor) for value in content.values()):
            return {str(name): tensor for name, tensor in content.items()}
    raise DataError(f"{path}: found other content; expected tensors by name. Check that the original wrote it.")


def _read(path: Path, known: set[str] | None, allow_unknown: bool, *, required: bool = False) -> dict[str, Any]:
    if not path.exists():
        if required:
            # the original would silently adapt other projections of every layer instead
            raise ConfigError(f"Found no {path.name} in {path.parent}. It defines the architecture; add it.")
        return {}
    content = read_json_mapping(path, error=ConfigError)
    unknown = [] if known is None else sorted(content.keys() - known)
    if unknown and not allow_unknown:
        raise ConfigError(f"Unknown key {unknown[0]!r} in {path}. Expected: {', '.join(sorted(known or ()))}.")
    return {key: value for key, value in content.items() if value is not None}


def _modules(peft: Mapping[str, Any], path: Path) -> dict[str, Any]:
    if peft.get("peft_type", "LORA") != "LORA":
        raise ConfigError(f"peft_type is {peft['peft_type']!r} in {path}. Expected LORA.")
    names: str | list[Any] = peft.get("target_modules") or []
    found = [_MODULE.fullmatch(str(name)) for name in ([names] if isinstance(names, str) else names)]
    if not found or not all(found):
        raise ConfigError(
            f"target_modules is {str(names)[:60]} in {path}. Expected full names of feed-forward projections, such as "
            "model.layers.8.mlp.gate_proj."
        )
    pairs = {(int(match[1]), match[2]) for match in found if match is not None}
    layers, parts = (
        sorted({layer for layer, _ in pairs}),
        [p for p in ("gate", "up", "down") if any(q == p for _, q in pairs)],
    )
    if len(pairs) != len(layers) * len(parts):
        raise ConfigError(
            f"target_modules in {path} contain different projections in different layers. List the "
            "same projections for every layer."
        )
    return {"layers": ",".join(map(str, layers)), "projections": parts}


def _method_of(train: Mapping[str, Any]) -> dict[str, Any]:
    names = {"eval_steps": "select_every", "num_samples_for_eval": "select_samples", "outer_loss": "outer_loss"}
    found = {ours: train[theirs] for theirs, ours in names.items() if theirs in train}
    return {**found, "select_by": "loss"} if train.get("eval_only_loss") else found


def _training_of(train: Mapping[str, Any], path: Path) -> dict[str, Any]:
    if not train:
        return {}
    schedule, precision = train.get("lr_scheduler", "CosineAnnealingLR"), train.get("mixed_precision", "fp16")
    if schedule not in _SCHEDULES:
        raise ConfigError(f"lr_scheduler is {schedule!r} in {path}. Expected one of: {', '.join(_SCHEDULES)}.")
    if precision not in ("bf16", "fp16", "no"):
        raise ConfigError(f"mixed_precision is {precision!r} in {path}. Expected bf16, fp16 or no.")
    return {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": train.get("meta_batch_size", 16),
        "learning_rate": train.get("meta_lr", 2e-4),
        "num_train_epochs": float(train.get("num_epochs", 4)),
        "logging_steps": train.get("logging_steps", 40),
        "lr_scheduler_type": _SCHEDULES[schedule],
        "warmup_ratio": 0.1,
        "weight_decay": 0.01,
        "max_grad_norm": 0.5,
        # loss scaling in fp16 would clip scaled gradients, so fp16 is imported as bf16
        "bf16": precision != "no",
    }
