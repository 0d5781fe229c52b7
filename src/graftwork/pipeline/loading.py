"""Read and write models: ordinary checkpoints, with a manifest when a method has changed them."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graftwork.core.commits import complete
from graftwork.core.config import to_plain
from graftwork.core.digests import verify_files
from graftwork.core.files import read_json, recover_folder
from graftwork.core.run_folder import MANIFEST_FILE, RunFolder, is_run
from graftwork.errors import CheckpointMismatchError, ConfigError, IncompleteRunError
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import Converted, Origin, probe_model
from graftwork.grafting.identity import non_finite, weights_digest
from graftwork.grafting.method import Method

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def load_model(
    name: str,
    *,
    dtype: str | None = None,
    device_map: Any = None,
    revision: str | None = None,
    labels: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load an untouched model and its tokenizer from a folder or the hub.

    Args:
        name: Folder or hub id.
        dtype: Name of a torch dtype; None for the dtype of the checkpoint.
        device_map: As in `from_pretrained`.
        revision: Revision on the hub.
        labels: Class labels. An encoder without a classification head gets a new one; an existing head must have these
            labels; a generative model is loaded unchanged.
        seed: Seed of the new head's weights.

    Raises:
        ConfigError: If there is no such model, or its head is for other classes.
    """
    model, tokenizer, _ = _load_with_report(
        name, dtype=dtype, device_map=device_map, revision=revision, labels=labels, seed=seed
    )
    return model, tokenizer


def _load_with_report(
    name: str,
    *,
    dtype: str | None,
    device_map: Any,
    revision: str | None = None,
    labels: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[Any, PreTrainedTokenizerBase, Mapping[str, Any]]:
    """Load as `load_model` does; return also the loading report of transformers: missing and unexpected tensors."""
    import transformers

    # loaders of transformers are untyped
    auto_config: Any = transformers.AutoConfig
    auto_tokenizer: Any = transformers.AutoTokenizer

    # a path cannot be a hub id, and a lookup on the hub takes half a minute without a network
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).exists():
        raise ConfigError(f"Cannot load a model from {name!r}: there is no such folder. Check the path.")
    try:
        config = auto_config.from_pretrained(name, revision=revision)
        options: dict[str, Any] = {"dtype": dtype or "auto", "revision": revision, "output_loading_info": True}
        if device_map is not None:
            options["device_map"] = device_map
        model_class = _auto_class(config)
        if labels is not None and not model_class.can_generate():
            model_class, head = _head(config, labels, name)
            options |= head
        with forked_generator(seed):
            model, report = _from_pretrained(model_class, config, name, options)
        tokenizer = auto_tokenizer.from_pretrained(name, revision=revision)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"Cannot load a model from {name!r}: {first} Expected a folder that save_pretrained wrote, a run folder, "
            "or a hub id that can be reached."
        ) from None
    return model, tokenizer, report


@contextmanager
def forked_generator(seed: int) -> Generator[None]:
    """Seed the CPU generator inside the context and restore its state afterwards."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _head(config: Any, labels: Sequence[str], name: str) -> tuple[Any, dict[str, Any]]:
    """Model class for classification into these labels, and the options of its configuration."""
    import transformers

    own = _auto_class(config)
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
    """Load a model with its loading report; initialise it randomly if the folder has a configuration only."""
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("*.safetensors*")) and not any(folder.glob("*.bin*")):
        if (folder / MANIFEST_FILE).exists():
            raise IncompleteRunError(
                f"Found no weights in {folder}; expected model.safetensors beside its {MANIFEST_FILE}. Convert or "
                "train again, or put the file back."
            )
        logger.warning("%s holds a configuration without weights; the model starts from random ones.", name)
        for key in ("num_labels", "id2label", "label2id"):
            if key in options:
                setattr(config, key, options[key])
        build_model = getattr(model_class, "from_config", model_class)
        return build_model(config), {"missing_keys": (), "unexpected_keys": ()}
    return model_class.from_pretrained(name, **options)


def _auto_class(config: Any) -> Any:
    import transformers

    for architecture in config.architectures or ():
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture)
    return transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM


def load(
    path: str | Path,
    *,
    methods: Sequence[Method[Any]] | None = None,
    strict: bool = False,
    dtype: str | None = None,
    device_map: Any = None,
    labels: Sequence[str] | None = None,
    seed: int = 0,
) -> Converted:
    """Load a model that Graftwork saved, converted as recorded; or an untouched model.

    Args:
        path: Run folder, model folder or hub id.
        methods: Methods in place of the recorded ones; differences are logged as a warning.
        strict: Raise an error instead of that warning.
        dtype: Name of a torch dtype; None for the dtype of the checkpoint.
        device_map: As in `from_pretrained`.
        labels: Class labels, as in `load_model`.
        seed: Seed of a new head's weights.

    Raises:
        CheckpointMismatchError: If a file differs from its recorded digest, if tensors are missing or left over, if the
            output for the probe input differs from the saved one, or if `methods` differ from the recorded ones and
            `strict` is on.
        IncompleteRunError: If a run folder contains no model.
    """
    run = RunFolder(path) if is_run(path) else None
    if run is not None:
        complete(run.path)
        # versions before the manifest recorded digests replaced the folder in two renames
        recover_folder(run.model)
    folder = Path(path) if run is None else run.require(run.model, "convert")
    manifest = verified_manifest(folder) if (folder / MANIFEST_FILE).exists() else _hub_manifest(str(path))
    with _quiet_report() if manifest is not None else nullcontext():
        model, tokenizer, report = _load_with_report(
            str(folder), dtype=dtype, device_map=device_map, labels=labels, seed=seed
        )
    if manifest is not None and not folder.exists():
        _verify_download(str(folder), manifest)
    recorded = _recorded_methods(manifest, folder)
    chosen = recorded if methods is None else tuple(methods)
    if methods is not None and manifest is not None:
        _compare_methods(recorded, chosen, folder, strict)
    loaded = Converted(model.eval(), tokenizer=tokenizer)
    dense = model.state_dict().keys()
    for method in chosen:
        loaded = convert(loaded, method)
    if manifest is not None or chosen:
        exact = manifest is not None and methods is None
        _load_learned(model, folder, model.state_dict().keys() - dense, report, exact=exact)
    if manifest is not None and methods is None and dtype is None and device_map is None:
        _check_probe(model, manifest, folder)
    if names := non_finite(model):
        logger.warning("The weights in %s contain NaN or infinite values: %s.", folder, ", ".join(names[:3]))
    cast = None
    if dtype is not None and manifest is not None and "digest" in manifest:
        cast = (weights_digest(model), str(manifest["digest"]))
    where = str(Path(path).resolve()) if Path(path).exists() else str(path)
    spread = device_map if isinstance(device_map, str) else None
    return replace(loaded, folder=run, origin=Origin(where, dtype, spread, seed), cast=cast)


def verified_manifest(folder: Path, *, deep: bool = False) -> dict[str, Any]:
    """Manifest of a model folder, after verifying the files that it lists.

    Above `graftwork.core.digests.FULL_LIMIT` (8 GiB), weights are verified by size and the first MiB of each file.

    Args:
        folder: Model folder with a manifest.
        deep: Read every byte of the weights at any size.

    Raises:
        CheckpointMismatchError: If a file is missing or has changed; the message names it.
    """
    manifest: dict[str, Any] = read_json(folder / MANIFEST_FILE)
    if "files" in manifest:
        verify_files(folder, manifest["files"], deep=deep)
    else:
        logger.warning(
            "%s records no digests, so its files are not verified. Save the model again to add them.", folder
        )
    return manifest


@contextmanager
def _quiet_report() -> Generator[None]:
    """Suppress transformers' table of unexpected tensors, which `_load_learned` compares."""
    library = logging.getLogger("transformers.modeling_utils")

    def other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    library.addFilter(other)
    try:
        yield
    finally:
        library.removeFilter(other)


def _load_learned(model: nn.Module, folder: Path, learned: Set[str], report: Mapping[str, Any], *, exact: bool) -> None:
    """Load the tensors that the dense model lacks; with `exact`, none may be missing or left over."""
    unexpected = set(report["unexpected_keys"])
    missing = set(report["missing_keys"]) | (learned - unexpected)
    # a part of the learned tensors is never a valid checkpoint
    exact = exact or bool(learned & unexpected and learned - unexpected)
    if exact and (missing or unexpected - learned):
        parts = {"missing": missing, "left over": unexpected - learned}
        found = "; ".join(f"{words}: {', '.join(sorted(names)[:3])}" for words, names in parts.items() if names)
        raise CheckpointMismatchError(
            f"{folder} does not hold the tensors of the model that its manifest describes ({found}). "
            "Save the model again, or load it with the methods that it was saved with."
        )
    if learned & unexpected:
        model.load_state_dict(_read_tensors(folder, learned & unexpected), strict=False)


def _read_tensors(folder: Path, names: Set[str]) -> dict[str, torch.Tensor]:
    """Read single tensors of a checkpoint, from a folder or the hub's cache."""
    import transformers.utils.hub
    from safetensors import safe_open

    # the hub client of transformers is untyped
    hub: Any = transformers.utils.hub
    place = folder if folder.is_dir() else Path(str(hub.cached_file(str(folder), "config.json"))).parent
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(place.glob("*.safetensors")):
        # safetensors has no type annotations
        opened: Any = safe_open(path, framework="pt")
        with opened as file:
            tensors.update({name: file.get_tensor(name) for name in names & set(file.keys())})
    return tensors


def _hub_manifest(name: str) -> dict[str, Any] | None:
    if Path(name).exists() or name.count("/") != 1:
        return None
    import transformers.utils.hub

    # the hub client of transformers is untyped
    hub: Any = transformers.utils.hub
    found = hub.cached_file(name, MANIFEST_FILE, _raise_exceptions_for_missing_entries=False)
    return None if found is None else read_json(Path(found))


def _verify_download(name: str, manifest: Mapping[str, Any]) -> None:
    """Verify the files of a hub model that the loaders have put into the cache."""
    import transformers.utils.hub

    hub: Any = transformers.utils.hub
    folder = Path(str(hub.cached_file(name, MANIFEST_FILE))).parent
    files = {file: entry for file, entry in manifest.get("files", {}).items() if (folder / file).exists()}
    verify_files(folder, files)


def recorded_names(path: str | Path) -> list[str]:
    """Names of the methods on the model of a run folder or a model folder; empty for any other path."""
    folder = RunFolder(path).model if is_run(path) else Path(path)
    manifest = folder / MANIFEST_FILE
    return [entry["name"] for entry in read_json(manifest)["methods"]] if manifest.exists() else []


def _recorded_methods(manifest: dict[str, Any] | None, folder: Path) -> tuple[Method[Any], ...]:
    from graftwork.core.config import build
    from graftwork.methods import NAMES

    methods: list[Method[Any]] = []
    entries: list[dict[str, Any]] = [] if manifest is None else manifest["methods"]
    for entry in entries:
        cls = NAMES.get(entry["name"])
        settings = {key: value for key, value in entry.items() if key != "name"}
        methods.append(cls(build(cls.config_class, settings, where=f"{folder / MANIFEST_FILE}")))
    return tuple(methods)


def _compare_methods(
    recorded: Sequence[Method[Any]], chosen: Sequence[Method[Any]], folder: Path, strict: bool
) -> None:
    before = {f"{method.name}.{key}": value for method in recorded for key, value in to_plain(method.config).items()}
    now = {f"{method.name}.{key}": value for method in chosen for key, value in to_plain(method.config).items()}
    places = {f"{method.name}.{key}" for method in (*recorded, *chosen) for key in method.places}
    differences = [
        f"{key} was {before.get(key, 'absent')} and is now {now.get(key, 'absent')}"
        for key in sorted((before.keys() | now.keys()) - places)
        if before.get(key) != now.get(key)
    ]
    if not differences:
        return
    message = f"{folder} was saved with other settings: {'; '.join(differences)}."
    if strict:
        raise CheckpointMismatchError(f"{message} Use the recorded settings, or leave strict off.")
    logger.warning("%s The current settings are used.", message)


def _check_probe(model: nn.Module, manifest: Mapping[str, Any], folder: Path) -> None:
    if manifest.get("non_finite"):
        # weights that were saved with allow_non_finite; their outputs are not comparable
        return
    saved, now = manifest["probe"], probe_model(model)
    tolerance = 1e-3 if now["dtype"] == "float32" else 5e-2
    before, after = torch.tensor(saved["values"]), torch.tensor(now["values"])
    scale = before.abs().max().clamp_min(1e-6)
    # a comparison with NaN is False, so that NaN never passes
    if before.shape != after.shape or not bool(((before - after).abs() <= tolerance * scale).all()):
        raise CheckpointMismatchError(
            f"{folder} answers a fixed input differently than when it was saved (largest difference "
            f"{(before - after).abs().max() if before.shape == after.shape else 'in shape'}). Its weights, its "
            "manifest or the version of transformers has changed; `graftwork doctor` shows which."
        )
