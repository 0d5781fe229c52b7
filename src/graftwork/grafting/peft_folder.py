"""Low-rank changes of a dense model as an ordinary adapter folder of PEFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from graftwork.core.files import apply_umask, remove_path, write_json, write_text
from graftwork.core.storage import writing
from graftwork.errors import ConfigError, UnsupportedModelError
from graftwork.surgery.sites import named_modules, pretrained

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
"""Prefix that PEFT's wrappers put before the names of a model."""


@dataclass(frozen=True, slots=True)
class LowRankChange:
    """Change s · B A of the weight of one linear module; the scale s belongs to the adapter."""

    lora_a: Float[Tensor, "rank inputs"]
    lora_b: Float[Tensor, "outputs rank"]


def is_adapter_folder(folder: Path) -> bool:
    """True if a folder contains an adapter of PEFT and no whole model."""
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()


def check_adapter_folder(folder: Path, *, overwrite: bool = False) -> None:
    """Refuse a folder that contains anything, or anything but an adapter that may be replaced.

    Raises:
        ConfigError: If it does.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError(f"Found files in {folder}; expected an empty folder for the adapter. Name another one.")
    if not overwrite:
        raise ConfigError(
            f"Found an adapter in {folder}; expected an empty folder. Name another one, or replace it with --overwrite."
        )


def write_peft_folder(
    folder: Path,
    model: nn.Module,
    changes: Mapping[str, LowRankChange],
    *,
    scaling: float,
    base: str,
    readme: str,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write low-rank changes as a LoRA adapter, without PEFT being installed.

    The adapter has one rank and one scale, short module names, and matrices of zeros for modules of the same names that
    do not change: servers that stack the matrices of all layers, or that read neither `rank_pattern` nor full paths,
    then apply the same change as PEFT.

    Args:
        folder: Folder to write; new or empty.
        model: The model with the modules that change; children of methods are ignored.
        changes: Changes by path of the module, all of one rank.
        scaling: s, the factor of every product B A.
        base: Folder or hub id of the model that the changes are added to.
        readme: Text of README.md.
        overwrite: Replace an adapter in the folder.

    Returns:
        Content of `adapter_config.json`.

    Raises:
        UnsupportedModelError: If a module is not an ordinary linear one.
        ConfigError: If the folder contains anything.
    """
    from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

    check_adapter_folder(folder, overwrite=overwrite)
    inner = pretrained(model)
    modules = {path.removeprefix(_PREFIX): module for path, module in named_modules(inner)}
    check_linear({path: modules[path] for path in changes})
    rank = next(iter(changes.values())).lora_a.shape[0]
    scale, alpha = _alpha(scaling, rank)
    names = sorted({path.rpartition(".")[2] for path in changes})
    alike = {path: module for path, module in modules.items() if path.rpartition(".")[2] in names}
    short = all(isinstance(module, nn.Linear) for module in alike.values())
    tensors: dict[str, Tensor] = {}
    for path, module in alike.items() if short else [(path, modules[path]) for path in changes]:
        change = changes.get(path) or _zeros(module, rank)
        # safetensors refuses views of one storage
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = change.lora_a.detach().cpu().float().clone()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = (scale * change.lora_b).detach().cpu().float().clone()
    config = _config(inner, base, rank, alpha, names if short else sorted(changes))
    with writing(folder):
        remove_path(folder)
        folder.mkdir(parents=True)
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        write_text(folder / "README.md", readme)
        write_json(folder / CONFIG_FILE, config)
        apply_umask(folder)
    return config


def check_linear(modules: Mapping[str, nn.Module]) -> None:
    """Refuse modules whose change no LoRA of linear modules represents.

    Raises:
        UnsupportedModelError: If there are some; the message names them.
    """
    odd = [f"{path} ({type(module).__name__})" for path, module in modules.items() if not isinstance(module, nn.Linear)]
    if odd:
        raise UnsupportedModelError(
            f"Found {', '.join(odd[:3])}{f' and {len(odd) - 3} more' if len(odd) > 3 else ''}; expected ordinary "
            "linear modules (torch.nn.Linear), the only ones that servers of adapters load. Answer with Graftwork."
        )


def _alpha(scaling: float, rank: int) -> tuple[float, int]:
    """Factor of B and whole-numbered alpha with factor · alpha / rank = scaling; loaders expect an integer alpha."""
    alpha = scaling * rank
    return (1.0, round(alpha)) if alpha >= 1 and alpha == round(alpha) else (scaling, rank)


def _zeros(module: Any, rank: int) -> LowRankChange:
    return LowRankChange(torch.zeros(rank, module.in_features), torch.zeros(module.out_features, rank))


def _config(inner: Any, base: str, rank: int, alpha: int, targets: Sequence[str]) -> dict[str, Any]:
    pair = bool(inner.config.is_encoder_decoder)
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if pair else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": list(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "use_rslora": False,
    }
