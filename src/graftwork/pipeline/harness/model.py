"""Model type `graftwork` of lm-eval: `lm_eval --model graftwork --model_args run=RUN`."""

from __future__ import annotations

import copy
import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lm_eval.models.huggingface  # pyright: ignore[reportMissingTypeStubs]
import lm_eval.utils  # pyright: ignore[reportMissingTypeStubs]

from graftwork.core.devices import place
from graftwork.core.run_folder import RunFolder, is_run
from graftwork.core.version import __version__
from graftwork.errors import ConfigError
from graftwork.grafting.activity import check_active
from graftwork.grafting.capabilities import Answers
from graftwork.grafting.converted import Converted, required_tokenizer
from graftwork.grafting.saving import plain_methods
from graftwork.pipeline.loading import load
from graftwork.pipeline.model_files import check_exists
from graftwork.surgery.sites import is_classifier, pretrained

# the models of lm-eval have incomplete types
_HFLM: Any = lm_eval.models.huggingface.HFLM
_UTILS: Any = lm_eval.utils

OPTIONS = (
    "add_bos_token",
    "backend",
    "batch_size",
    "chat_template_args",
    "device",
    "dtype",
    "enable_thinking",
    "logits_cache",
    "max_batch_size",
    "max_length",
    "mixed_precision_dtype",
    "parallelize",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "tokenizer",
    "truncation",
    "use_fast_tokenizer",
)
"""Arguments of lm-eval's own model type `hf` that this one accepts; the others concern how weights are loaded."""


class GraftLM(_HFLM):
    """Language model of lm-eval whose weights and methods come from a run; all scoring is lm-eval's own code.

    Log-likelihoods and generation are those of the grafted model, causal or encoder–decoder, as lm-eval batches and
    pads them. A method that answers in its own way is refused, because lm-eval's requests do not pass through it.

    Args:
        run: Run folder, model folder or hub id; or a converted model.
        options: Arguments of `hf`, see `OPTIONS`. `dtype` and `parallelize` apply to a run that is loaded.

    Raises:
        ConfigError: If an option is unknown, or if the model is no language model or has such a method.
    """

    def __init__(self, run: str | Path | Converted | None = None, **options: Any) -> None:
        if run is None:
            raise ConfigError("Found no run to evaluate. Expected --model_args run=RUN with a run folder or hub id.")
        if unknown := sorted(set(options) - set(OPTIONS)):
            raise ConfigError(
                f"Found {', '.join(unknown)} in the arguments of the model type graftwork. Expected run, and of the "
                f"arguments of hf: {', '.join(OPTIONS)}."
            )
        parent: Any = super()
        if isinstance(run, Converted):
            check_scorable(run)
            self._methods = plain_methods(run.methods)
            # lm-eval sets the padding of the tokenizer
            tokenizer: Any = copy.deepcopy(required_tokenizer(run))
            with _without_warnings():
                parent.__init__(run.model, tokenizer=tokenizer, **options)
            return
        self._run = str(run)
        check_exists(self._run)
        folder = RunFolder(run).require(RunFolder(run).model, "convert") if is_run(self._run) else self._run
        options.setdefault("device", place().device)
        parent.__init__(str(folder), **options)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> GraftLM:
        """Build the model from the arguments of lm-eval's command.

        Args:
            arg_dict: Arguments of `--model_args`.
            additional_config: Other options of the command, with their defaults; `arg_dict` takes precedence.
        """
        others = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**others, **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> GraftLM:
        """Build the model from arguments in one text, as `run=RUN,dtype=bfloat16`; see `create_from_arg_obj`."""
        return cls.create_from_arg_obj(_UTILS.simple_parse_args_string(arg_string), additional_config)

    def _create_model(self, pretrained: str, *, dtype: Any = None, parallelize: Any = False, **others: Any) -> None:
        """Load the run, in place of lm-eval's own loading, which a subclass may replace.

        Args:
            pretrained: Model folder or hub id.
            dtype: Name of a dtype or dtype; "auto" or None as in `graftwork.load`.
            parallelize: Spread the model over devices.
            others: Further arguments of lm-eval's own loading, which `OPTIONS` excludes or which have their defaults.
        """
        name = None if dtype in (None, "auto") else str(dtype).removeprefix("torch.")
        # one copy in each process of `accelerate launch`
        device: Any = self.accelerator.device if hasattr(self, "accelerator") else self.device
        if parallelize:
            converted = load(self._run, dtype=name, device_map="auto")
        else:
            converted = load(self._run, dtype=name, device=str(device))
        check_scorable(converted)
        self._methods = plain_methods(converted.methods)
        self._model = converted.model
        self._config = converted.model.config

    def get_model_info(self) -> dict[str, Any]:
        """Description of the model in lm-eval's results: parameters, dtype, methods and version of Graftwork."""
        model: Any = self.model
        return {
            "model_num_parameters": model.num_parameters(),
            "model_dtype": str(model.dtype),
            "graftwork_version": __version__,
            "graftwork_methods": self._methods,
        }


def check_scorable(converted: Converted) -> None:
    """Refuse a model that lm-eval's code cannot score.

    Raises:
        ConfigError: If the graft is not active, a method answers in its own way, or the model is no language model.
    """
    check_active(converted.model, "score the model with lm-eval")
    for method in converted.methods:
        if isinstance(method, Answers):
            raise ConfigError(
                f"{method.name} answers every question in its own way, and lm-eval computes log-likelihoods and texts "
                "without it. Expected a method that changes the model itself; score this one with `graftwork evaluate "
                "RUN --task TASK`."
            )
    inner = pretrained(converted.model)
    if is_classifier(inner) or not inner.can_generate():
        raise ConfigError(
            f"{type(inner).__name__} is no language model. Expected one that generates text, for lm-eval's "
            "log-likelihoods; score this one with `graftwork evaluate RUN --task TASK`."
        )


@contextmanager
def _without_warnings() -> Generator[None]:
    """Silence lm-eval's warnings that arguments of loading are ignored for a model in memory."""
    library = logging.getLogger("lm_eval.models.huggingface")
    level = library.level
    library.setLevel(logging.ERROR)
    try:
        yield
    finally:
        library.setLevel(level)
