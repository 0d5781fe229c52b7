"""Quantizer of transformers that makes `from_pretrained` return a graft; it quantises nothing.

Registered under "graftwork" when transformers is imported in a process with Graftwork. Models are loaded dense, and the
recorded methods are grafted onto them afterwards, as `graftwork.load` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers.quantizers.auto
import transformers.quantizers.base

from graftwork.errors import ConfigError
from graftwork.grafting.marks import QUANT_METHOD, GraftConfig, unmark

# the quantizers of transformers are untyped
_AUTO: Any = transformers.quantizers.auto
_BASE: Any = transformers.quantizers.base.HfQuantizer


class DenseQuantizer(_BASE):
    """Quantizer of a dense model that is not quantised: changes nothing."""

    def preprocess_model(self, model: Any, dtype: Any = None, **kwargs: Any) -> None:
        """Leave the model as it is."""

    def postprocess_model(self, model: Any, **kwargs: Any) -> None:
        """Remove the quantizer, so that the model is trained and saved as one that is not quantised."""
        del model.hf_quantizer

    def is_serializable(self) -> bool:
        """Weights are saved unchanged."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Weights are not quantised."""
        return True


def _grafting(dense: Any) -> Any:
    """Extend the quantizer class of a dense model by grafting."""

    class GraftQuantizer(dense):
        def __init__(self, quantization_config: GraftConfig, **kwargs: Any) -> None:
            base: Any = quantization_config.base
            if isinstance(base, dict):
                base = _AUTO.AutoQuantizationConfig.from_dict(base)
            parent: Any = super()
            parent.__init__(base or quantization_config, **kwargs)

        def update_attn_implementation(self, config: Any) -> Any:
            # the configuration names no weights, for loaders without Graftwork
            unmark(config)
            parent: Any = super()
            return parent.update_attn_implementation(config)

        def preprocess_model(self, model: Any, dtype: Any = None, **kwargs: Any) -> None:
            from graftwork.pipeline.grafts import manifest_beside, tensor_names

            files = kwargs.get("checkpoint_files")
            if not files:
                raise ConfigError(
                    f"Found the configuration of a graft and no files of weights for {type(model).__name__}. Load the "
                    "graft from its folder or hub id; graftwork.restore(model) removes the mark of a model in memory."
                )
            self.folder = Path(files[0]).parent
            self.manifest = manifest_beside(files, str(model.config.name_or_path))
            self.saved = tensor_names(files)
            parent: Any = super()
            parent.preprocess_model(model, dtype=dtype, **kwargs)
            # the learned state of methods, which is loaded afterwards, is not reported as unexpected
            ignored: Any = model._keys_to_ignore_on_load_unexpected
            model._keys_to_ignore_on_load_unexpected = {*(ignored or ()), r"(^|\.)graftwork_"}

        def postprocess_model(self, model: Any, **kwargs: Any) -> None:
            from graftwork.pipeline.grafts import regraft

            parent: Any = super()
            parent.postprocess_model(model, **kwargs)
            del model._keys_to_ignore_on_load_unexpected
            regraft(model, self.manifest, self.folder, self.saved)

    return GraftQuantizer


def quantizer_for(quantization_config: GraftConfig, **kwargs: Any) -> Any:
    """Return the quantizer of a graft, which also is that of its dense model if that is quantised."""
    base: Any = quantization_config.base
    dense: Any = DenseQuantizer
    if base is not None:
        dense = _AUTO.AutoHfQuantizer.from_config(base, **kwargs).__class__
    return _grafting(dense)(quantization_config, **kwargs)


def register() -> None:
    """Register the quantizer and the type of its configuration in transformers."""
    _AUTO.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = GraftConfig
    _AUTO.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = quantizer_for
