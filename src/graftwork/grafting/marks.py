"""Mark of a graft in `config.json`, which loaders without Graftwork refuse.

The mark is `quantization_config` with the method "graftwork": transformers, vLLM and others pass a checkpoint on to the
quantizer of that name. transformers loads a checkpoint of an unknown quantizer unchanged, with a warning only, so saved
folders also name a file of weights that does not exist (`transformers_weights`), which the quantizer ignores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers.utils.quantization_config import QuantizationConfigMixin

from graftwork.core.files import write_text
from graftwork.core.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

APPLIED = "_graftwork_methods"
"""Attribute of a transformers model with the methods on it and their changes."""
QUANT_METHOD = "graftwork"
REFUSAL = "this model is a graft; install Graftwork to load it (pip install graftwork)"
"""Value of `transformers_weights`, which the error of a loader without Graftwork contains."""
_MARK = "quantization_config"
_WEIGHTS = "transformers_weights"


class GraftConfig(QuantizationConfigMixin):
    """Value of `quantization_config` in the configuration of a graft.

    Args:
        methods: Names of the methods on the model; the manifest contains their settings.
        base: Quantization of the dense model.
        version: Version of Graftwork.
        quant_method: Always "graftwork".
    """

    def __init__(
        self,
        methods: Sequence[str] = (),
        base: Mapping[str, Any] | QuantizationConfigMixin | None = None,
        version: str = __version__,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        self.quant_method: Any = quant_method
        self.version = version
        self.methods = list(methods)
        self.base = base

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `config.json` contains them."""
        base: Any = self.base
        plain = {"quant_method": QUANT_METHOD, "version": self.version, "methods": list(self.methods)}
        return plain if base is None else {**plain, "base": base if isinstance(base, dict) else base.to_dict()}

    def get(self, name: str, default: Any = None) -> Any:
        """Value by name: loaders expect the mapping of a configuration that was read from a file."""
        return getattr(self, name, default)

    def to_diff_dict(self) -> dict[str, Any]:
        """Plain values; none is left out."""
        return self.to_dict()


def mark(model: PreTrainedModel, methods: Sequence[str]) -> None:
    """Mark the configuration of a model as that of a graft."""
    config: Any = model.config
    config.quantization_config = GraftConfig(methods, _base(getattr(config, _MARK, None)))


def unmark(config: Any) -> None:
    """Remove the mark from a configuration; the quantization of the dense model is restored."""
    found = getattr(config, _MARK, None)
    if is_marked(found):
        base = _base(found)
        delattr(config, _MARK)
        if base is not None:
            setattr(config, _MARK, base)
    if getattr(config, _WEIGHTS, None) == REFUSAL:
        delattr(config, _WEIGHTS)


def forget_base(config: Any) -> None:
    """Remove the quantization of the dense model from a configuration; the mark of a graft stays."""
    found = getattr(config, _MARK, None)
    if is_marked(found):
        setattr(config, _MARK, GraftConfig(_value(found, "methods")))
    elif found is not None:
        delattr(config, _MARK)


def is_marked(found: Any) -> bool:
    """True if a value of `quantization_config` is the mark of a graft."""
    return _value(found, "quant_method") == QUANT_METHOD


def write_refusal(folder: Path) -> None:
    """Complete the mark in the `config.json` of a saved graft, so that loaders without Graftwork raise an error."""
    file = folder / "config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if is_marked(config.get(_MARK)):
        # configurations of transformers may contain Infinity, which is no JSON
        write_text(file, json.dumps({**config, _WEIGHTS: REFUSAL}, indent=2, sort_keys=True) + "\n")


def _base(found: Any) -> Any:
    """Quantization of the dense model in a value of `quantization_config`."""
    return _value(found, "base") if is_marked(found) else found


def _value(found: Any, name: str) -> Any:
    """Value by name of a configuration, which is a mapping if it was read from a file."""
    if isinstance(found, Mapping):
        return cast("Mapping[str, Any]", found).get(name)
    return getattr(found, name, None)
