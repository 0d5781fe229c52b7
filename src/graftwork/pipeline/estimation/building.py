"""Models without weights: built from a configuration, on fake tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graftwork.core.config import read_yaml
from graftwork.core.run_folder import RunFolder, is_run
from graftwork.errors import ConfigError, MissingExtraError
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import Converted
from graftwork.grafting.marks import unmark
from graftwork.grafting.method import Method
from graftwork.pipeline.loading import head_for, model_class_of
from graftwork.surgery.quantised import prepare_quantised


def shapes() -> dict[str, dict[str, Any]]:
    """Configurations that need no download: name to `checkpoints` (hub ids) and `config`."""
    return read_yaml(Path(__file__).with_name("shapes.yaml"))


def read_config(model: str | Path) -> Any:
    """Read a model's configuration: from a hub id, a folder, a run, a `config.json` alone, or a name in `shapes`.

    Raises:
        ConfigError: If there is none.
    """
    import transformers

    # loaders of transformers are untyped
    auto_config: Any = transformers.AutoConfig
    if not Path(model).exists():
        for name, shape in shapes().items():
            if str(model) in (name, *shape["checkpoints"]):
                options = {key: value for key, value in shape["config"].items() if key != "model_type"}
                return auto_config.for_model(shape["config"]["model_type"], **options)
    path = str(RunFolder(model).model) if is_run(model) else str(model)
    try:
        config = auto_config.from_pretrained(path, trust_remote_code=False)
        unmark(config)
        return config
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(
            f"Cannot read the configuration of {str(model)!r}: {first}. Expected a hub id, a folder with config.json, "
            "a run folder, or the path of a config.json; weights are not necessary."
        ) from None


def fake_model(config: Any, *, dtype: torch.dtype, device: str, labels: Sequence[str] | None = None) -> nn.Module:
    """Build a model from its configuration with fake weights; call it inside `fake_tensors`.

    Args:
        config: Configuration of transformers; it is copied.
        dtype: Data type of the weights.
        device: Device of the weights.
        labels: Class labels of an encoder's classification head; None builds the model that the configuration names.
    """
    from transformers.initialization import no_init_weights

    chosen: Any = model_class_of(config)
    options: Mapping[str, Any] = {}
    if labels is not None and not chosen.can_generate():
        chosen, options = head_for(config, labels, config.name_or_path or config.model_type)
    copied: Any = copy.deepcopy(config)
    own: Any = copied.from_dict({**config.to_dict(), **options})
    own._attn_implementation = config._attn_implementation
    with torch.device(device), no_init_weights():
        build: Any = getattr(chosen, "_from_config", None) or chosen.from_config
        model: Any = build(own, dtype=dtype)
        model.tie_weights()
        _quantise(model, own)
    return model.eval()


def _quantise(model: nn.Module, config: Any) -> None:
    """Quantise fake weights as the checkpoint is.

    Raises:
        ConfigError: If it is quantised by another library than torchao.
    """
    found: Any = getattr(config, "quantization_config", None)
    if found is None:
        return
    from transformers.quantizers.auto import AutoQuantizationConfig

    loader: Any = AutoQuantizationConfig
    options: Any = loader.from_dict(found) if isinstance(found, dict) else found
    if str(getattr(options.quant_method, "value", options.quant_method)) != "torchao":
        raise ConfigError(
            f"Found a checkpoint quantised by {options.quant_method}, whose memory cannot be estimated. Expected "
            "torchao, or weights of 16 or 32 bits."
        )
    try:
        # not a dependency of the tests, so that its types are unknown to them
        apply: Any = import_module("torchao.quantization").quantize_
    except ImportError:
        raise MissingExtraError("torchao", "quantised") from None
    skipped = (*(options.modules_to_not_convert or ()), "lm_head")

    def is_chosen(module: nn.Module, path: str) -> bool:
        return isinstance(module, nn.Linear) and not path.endswith(skipped)

    apply(model, options.get_apply_tensor_subclass(), filter_fn=is_chosen)
    prepare_quantised(model)


def fake_converted(
    config: Any,
    methods: Sequence[Method[Any]],
    *,
    dtype: torch.dtype,
    device: str,
    labels: Sequence[str] | None = None,
) -> Converted:
    """Build a model with fake weights and graft methods onto it.

    Args:
        config: Configuration of transformers.
        methods: Methods, in order.
        dtype: Data type of the weights.
        device: Device of the weights.
        labels: Class labels of an encoder's classification head.
    """
    converted = Converted(fake_model(config, dtype=dtype, device=device, labels=labels))
    for method in methods:
        converted = convert(converted, method)
    return converted
