"""Read and write models: ordinary checkpoints, with a manifest when a method has changed them."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graftwork.core.commits import complete
from graftwork.core.devices import Placement, announce, place
from graftwork.core.files import read_json, recover_folder
from graftwork.core.hub import hub_problem
from graftwork.core.run_folder import MANIFEST_FILE, RunFolder, absolute, is_run, similar_folders
from graftwork.core.storage import disk_error
from graftwork.errors import ConfigError, GraftworkError
from graftwork.grafting.conversion import convert_recorded, is_usable
from graftwork.grafting.converted import Converted, Origin
from graftwork.grafting.identity import weights_digest
from graftwork.grafting.marks import unmark
from graftwork.grafting.method import Method
from graftwork.grafting.precision import widen
from graftwork.pipeline.adapters import adapter_of, merge_adapter, tokenizer_beside
from graftwork.pipeline.grafts import load_learned, recorded_methods
from graftwork.pipeline.model_files import (
    check_exists,
    check_weights,
    code_error,
    has_tokenizer,
    stored_type,
    weights_size,
)
from graftwork.pipeline.verification import (
    check_probe,
    compare_methods,
    hub_manifest,
    run_on_hub,
    verified_manifest,
    verify_download,
)
from graftwork.surgery.finiteness import first_of, non_finite
from graftwork.surgery.quantised import prepare_quantised

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def load_model(
    name: str,
    *,
    dtype: str | None = None,
    device_map: Any = None,
    device: str | None = None,
    revision: str | None = None,
    labels: Sequence[str] | None = None,
    seed: int = 0,
    random_weights: bool = False,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load an untouched model and its tokenizer from a folder or the hub.

    Args:
        name: Folder or hub id.
        dtype: Name of a torch dtype; None for that of the checkpoint, or for float32 if the checkpoint is in a 16-bit
            type and the CPU, where it is loaded, has no instructions for it.
        device_map: As in `from_pretrained`; spreads a model over several devices.
        device: Device such as cpu or cuda:1; None for the accelerator if there is one.
        revision: Revision on the hub.
        labels: Class labels. An encoder without a classification head gets a new one; an existing head must have these
            labels; a generative model is loaded unchanged.
        seed: Seed of the new head's weights, and of random weights.
        random_weights: Accept a folder with a configuration only, and initialise the model randomly.

    Raises:
        ConfigError: If there is no such model, it has no usable tokenizer, its head is for other classes, or
            `random_weights` is on and it has weights.
        CheckpointMismatchError: If a file of the model is missing, truncated or a pointer.
    """
    model, tokenizer, _, placement = _load_with_report(
        name,
        dtype=dtype,
        device_map=device_map,
        device=device,
        revision=revision,
        labels=labels,
        seed=seed,
        random_weights=random_weights,
    )
    if tokenizer is None:
        raise ConfigError(
            f"Found no usable tokenizer in {name!r}; expected tokenizer.json or the files of a tokenizer beside the "
            "model. Save the tokenizer there."
        )
    if placement.widened:
        widen(model)
    return model, tokenizer


def _load_with_report(
    name: str,
    *,
    dtype: str | None,
    device_map: Any,
    device: str | None,
    revision: str | None = None,
    labels: Sequence[str] | None = None,
    seed: int = 0,
    random_weights: bool = False,
) -> tuple[Any, PreTrainedTokenizerBase | None, Mapping[str, Any], Placement]:
    """Load as `load_model` does, without widening.

    Returns:
        Model, tokenizer, loading report of transformers (missing and unexpected tensors) and placement. The tokenizer
        is None if there is none; a model can be converted without one.
    """
    import transformers

    # loaders of transformers are untyped
    auto_config: Any = transformers.AutoConfig
    auto_tokenizer: Any = transformers.AutoTokenizer

    check_exists(name)
    if (adapter := adapter_of(name, revision)) is not None:
        model, tokenizer, report, placement = _load_with_report(
            adapter.base,
            dtype=dtype,
            device_map=device_map,
            device=device,
            revision=adapter.revision,
            labels=labels,
            seed=seed,
            random_weights=random_weights,
        )
        if placement.widened:
            # before the sum is rounded to the type of the checkpoint
            widen(model)
        model, tokenizer = merge_adapter(model, adapter), tokenizer_beside(adapter, tokenizer)
        return model, tokenizer, report, replace(placement, widened=False)
    is_folder = Path(name).is_dir()
    initialise = is_folder and not check_weights(Path(name))
    if random_weights and not initialise:
        raise ConfigError(
            f"Found random_weights (--random-weights) for {name!r}, which has weights, so it would have no effect. "
            "Expected a folder with a configuration only. Leave the option out, or remove the weights."
        )
    if initialise and not random_weights:
        raise ConfigError(
            f"Cannot load a model from {name!r}: found a configuration without weights. Expected model.safetensors. "
            "Put the file there, or start from random weights with --random-weights of convert, evaluate or predict "
            "(in Python, random_weights=True)."
        )
    try:
        config = auto_config.from_pretrained(name, revision=revision, trust_remote_code=False)
        # a graft is loaded as its dense model
        unmark(config)
        placing = partial(place, device=device, device_map=device_map, dtype=dtype, size=weights_size(Path(name)))
        placement = placing(stored_type(config))
        options: dict[str, Any] = {
            **placement.options(),
            "revision": revision,
            "output_loading_info": True,
            "trust_remote_code": False,
        }
        model_class = model_class_of(config)
        if labels is not None and not model_class.can_generate():
            model_class, head = head_for(config, labels, name)
            options |= head
        with forked_generator(seed):
            model, report = (_initialised if initialise else _from_pretrained)(model_class, config, name, options)
        prepare_quantised(model)
        tokenizer = None
        if not is_folder or has_tokenizer(Path(name)):
            tokenizer = auto_tokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except GraftworkError:
        raise
    except Exception as error:
        raise _loading_error(name, error) from None
    if stored_type(model.config) is not None:
        # a configuration may record no type
        placement = placing(stored_type(model.config))
    announce(placement, name)
    return model, tokenizer if tokenizer is not None and is_usable(tokenizer) else None, report, placement


def _loading_error(name: str, error: Exception) -> GraftworkError:
    """Error of ours for what transformers, tokenizers, safetensors and torch raise about the files of a model."""
    if found := disk_error(error):
        return found
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return GraftworkError(
            f"Cannot load a model from {name!r}: out of memory ({str(error).partition('.')[0]}). Choose a smaller "
            "model, another dtype, or device_map=auto."
        )
    if "trust_remote_code" in str(error):
        # the library's advice is to run the code
        return code_error(name)
    if problem := hub_problem(error, name):
        return ConfigError(f"Cannot load a model from {name!r}: {problem}{similar_folders(name)}")
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    first = type(error).__name__ if "weights_only" in first else first
    return ConfigError(
        f"Cannot load a model from {name!r}: {first.rstrip('.')}. Expected a folder that save_pretrained wrote, a "
        f"run folder, or a hub id that can be reached.{'' if Path(name).exists() else similar_folders(name)}"
    )


@contextmanager
def forked_generator(seed: int) -> Generator[None]:
    """Seed the CPU generator inside the context and restore its state afterwards."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def head_for(config: Any, labels: Sequence[str], name: str) -> tuple[Any, dict[str, Any]]:
    """Model class for classification into these labels, and the options of its configuration."""
    import transformers

    own = model_class_of(config)
    if own.__name__.endswith("ForSequenceClassification"):
        known = {str(label).lower() for label in config.label2id}
        unnamed = all(label.startswith("label_") for label in known)
        if len(known) != len(labels) or not (unnamed or known == {label.lower() for label in labels}):
            raise ConfigError(
                f"{name!r} has a head for {', '.join(config.label2id)}, and the task has the classes "
                f"{', '.join(labels)}. Start from a model without a head, or choose another task."
            )
        if not unnamed:
            return own, {}
    names = {
        "label2id": {label: index for index, label in enumerate(labels)},
        "id2label": dict(enumerate(labels)),
        "num_labels": len(labels),
    }
    return transformers.AutoModelForSequenceClassification, names


def _from_pretrained(model_class: Any, config: Any, name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """Load a dense model with its loading report."""
    _set_labels(config, options)
    return model_class.from_pretrained(name, config=config, **options)


def _initialised(model_class: Any, config: Any, name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """Initialise a model randomly, with an empty loading report."""
    logger.warning("%s holds a configuration without weights; the model starts from random ones.", name)
    _set_labels(config, options)
    build_model = getattr(model_class, "from_config", model_class)
    model = build_model(config)
    if "device_map" in options and "" in options["device_map"]:
        model = model.to(options["device_map"][""])
    return model, {"missing_keys": (), "unexpected_keys": ()}


def _set_labels(config: Any, options: dict[str, Any]) -> None:
    """Move the labels of a new head from the options of loading to a configuration."""
    for key in ("num_labels", "id2label", "label2id"):
        if key in options:
            setattr(config, key, options.pop(key))


def model_class_of(config: Any) -> Any:
    """Class of transformers for a configuration: the one that it names, else the language model of its type."""
    import transformers

    for architecture in config.architectures or ():
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture)
    # a configuration that was saved without a model names no class
    masked: Any = transformers.AutoModelForMaskedLM
    causal: Any = transformers.AutoModelForCausalLM
    pairs: Any = transformers.AutoModelForSeq2SeqLM
    for auto in (pairs,) if config.is_encoder_decoder else (masked, causal):
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise ConfigError(
        f"Found a configuration of model type {config.model_type!r} without architectures. Expected a language model; "
        "add the name of its class to architectures in config.json."
    )


def load(
    path: str | Path,
    *,
    methods: Sequence[Method[Any]] | None = None,
    strict: bool = False,
    dtype: str | None = None,
    device_map: Any = None,
    revision: str | None = None,
    device: str | None = None,
    labels: Sequence[str] | None = None,
    seed: int = 0,
    random_weights: bool = False,
) -> Converted:
    """Load a model that Graftwork saved, converted as recorded; or an untouched model.

    Args:
        path: Run folder, model folder or hub id.
        methods: Methods in place of the recorded ones; differences are logged as a warning.
        strict: Raise an error instead of that warning.
        dtype: Name of a torch dtype; None as in `load_model`.
        device_map: As in `from_pretrained`; spreads a model over several devices.
        device: Device such as cpu or cuda:1; None for the accelerator if there is one.
        revision: Revision on the hub.
        labels: Class labels, as in `load_model`.
        seed: Seed of a new head's weights, and of random weights.
        random_weights: As in `load_model`.

    Raises:
        ConfigError: If there is no such model.
        CheckpointMismatchError: If a file is damaged or differs from its recorded digest, if tensors are missing or
            left over, if the output for the probe input differs from the saved one, or if `methods` differ from the
            recorded ones and `strict` is on.
        IncompleteRunError: If a run folder contains no model.
    """
    check_exists(path)
    options: dict[str, Any] = {
        "dtype": dtype,
        "device_map": device_map,
        "device": device,
        "labels": labels,
        "seed": seed,
        "random_weights": random_weights,
    }
    if (adapter := adapter_of(path, revision)) is not None:
        base = load(adapter.base, methods=methods, strict=strict, revision=adapter.revision, **options)
        origin = replace(base.origin, model=absolute(path)) if base.origin else None
        model, tokenizer = merge_adapter(base.model, adapter), tokenizer_beside(adapter, base.tokenizer)
        return replace(base, model=model, tokenizer=tokenizer, folder=None, origin=origin, cast=None)
    named = path
    if (downloaded := run_on_hub(str(path), revision)) is not None:
        path, revision = downloaded, None
    run = RunFolder(path) if is_run(path) else None
    if run is not None:
        complete(run.path)
        # versions before the manifest recorded digests replaced the folder in two renames
        recover_folder(run.model)
    folder = Path(path) if run is None else run.require(run.model, "convert")
    manifest = verified_manifest(folder) if (folder / MANIFEST_FILE).exists() else hub_manifest(str(path), revision)
    with _quiet_report() if manifest is not None else nullcontext():
        # a Path drops the "./" that distinguishes a folder from a hub id
        name = str(path) if run is None else str(folder)
        model, tokenizer, report, placement = _load_with_report(name, revision=revision, **options)
    if manifest is not None and not folder.exists():
        verify_download(str(folder), manifest, revision)
    recorded = recorded_methods(manifest, folder)
    chosen = recorded if methods is None else tuple(methods)
    if methods is not None and manifest is not None:
        compare_methods(recorded, chosen, folder, strict)
    loaded = Converted(model.eval(), tokenizer=tokenizer)
    dense = model.state_dict().keys()
    for method in chosen:
        loaded = convert_recorded(loaded, method)
    if manifest is not None or chosen:
        exact = manifest is not None and methods is None
        load_learned(model, folder, model.state_dict().keys() - dense, report, exact=exact, revision=revision)
    if manifest is not None and methods is None and dtype is None and device_map is None:
        check_probe(model, manifest, folder)
    if placement.widened:
        widen(model)
    if names := non_finite(model):
        logger.warning("The weights in %s contain NaN or infinite values: %s.", folder, first_of(names))
    cast = None
    if dtype is not None and manifest is not None and "digest" in manifest:
        cast = (weights_digest(model), str(manifest["digest"]))
    where = absolute(named)
    spread = device_map if isinstance(device_map, str) else None
    return replace(loaded, folder=run, origin=Origin(where, dtype, spread, seed, random_weights, device), cast=cast)


@contextmanager
def _quiet_report() -> Generator[None]:
    """Suppress transformers' table of unexpected tensors, which `load_learned` compares."""
    library = logging.getLogger("transformers.modeling_utils")

    def other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    library.addFilter(other)
    try:
        yield
    finally:
        library.removeFilter(other)


def recorded_names(path: str | Path) -> list[str]:
    """Names of the methods on the model of a run folder or a model folder; empty for any other path."""
    folder = RunFolder(path).model if is_run(path) else Path(path)
    manifest = folder / MANIFEST_FILE
    return [entry["name"] for entry in read_json(manifest)["methods"]] if manifest.exists() else []
