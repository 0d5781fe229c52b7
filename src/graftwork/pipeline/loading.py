"""Read and write models: ordinary checkpoints, with a manifest when a method has changed them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graftwork.core.config import to_plain
from graftwork.core.files import read_json, recover_folder
from graftwork.core.run_folder import MANIFEST_FILE, RunFolder, is_run
from graftwork.errors import CheckpointMismatchError, ConfigError, IncompleteRunError
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import Converted, Origin, probe_model
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
    """An untouched model and its tokenizer, from a folder or the hub.

    Args:
        name: Folder or hub id.
        dtype: Name of a torch dtype; None for what the checkpoint was saved in.
        device_map: As in `from_pretrained`.
        revision: Revision on the hub.
        labels: Classes to tell apart. An encoder without a head for classes gets a new one; one that has a head must
            know these classes; a model that writes text stays as it is.
        seed: Draws the new head's weights.

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
    """As `load_model`, and what transformers says of missing and unexpected tensors."""
    from transformers import AutoConfig, AutoTokenizer

    # what cannot be a hub id need not be looked for there, which takes half a minute without a network
    if (name.startswith((".", "/", "~")) or name.count("/") > 1) and not Path(name).exists():
        raise ConfigError(f"Cannot load a model from {name!r}: there is no such folder. Check the path.")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        options: dict[str, Any] = {"dtype": dtype or "auto", "revision": revision, "output_loading_info": True}
        if device_map is not None:
            options["device_map"] = device_map
        model_class = _auto_class(config)
        if labels is not None and not model_class.can_generate():
            model_class, head = _head(config, labels, name)
            options |= head
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            model, report = _from_pretrained(model_class, config, name, options)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"Cannot load a model from {name!r}: {first} Expected a folder that save_pretrained wrote, a run folder, "
            "or a hub id that can be reached."
        ) from None
    return model, tokenizer, report


def _head(config: Any, labels: Sequence[str], name: str) -> tuple[Any, dict[str, Any]]:
    """The class of model that tells these classes apart, and what it must know of them."""
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
    """A model with its loading report; with random weights if a folder holds a configuration only."""
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
    """Load a model that Graftwork saved, converted as it was; or an untouched one.

    Args:
        path: Run folder, model folder or hub id.
        methods: Convert with these in place of the recorded ones. A difference is warned about.
        strict: Make that warning an error.
        dtype: Name of a torch dtype; None for what the checkpoint was saved in.
        device_map: As in `from_pretrained`.
        labels: Classes to tell apart, as in `load_model`.
        seed: Draws the weights of a new head.

    Raises:
        CheckpointMismatchError: If tensors are missing or left over, if the model computes something else than when it
            was saved, or if `methods` differ from the recorded ones and `strict` is on.
        IncompleteRunError: If a run folder holds no model.
    """
    run = RunFolder(path) if is_run(path) else None
    if run is not None:
        recover_folder(run.model)
    folder = Path(path) if run is None else run.require(run.model, "convert")
    manifest = read_json(folder / MANIFEST_FILE) if (folder / MANIFEST_FILE).exists() else _hub_manifest(str(path))
    with _quiet_report() if manifest is not None else nullcontext():
        model, tokenizer, report = _load_with_report(
            str(folder), dtype=dtype, device_map=device_map, labels=labels, seed=seed
        )
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
        _check_probe(model, manifest["probe"], folder)
    where = str(Path(path).resolve()) if Path(path).exists() else str(path)
    spread = device_map if isinstance(device_map, str) else None
    return replace(loaded, folder=run, origin=Origin(where, dtype, spread, seed))


@contextmanager
def _quiet_report() -> Iterator[None]:
    """Without the table that transformers logs of tensors unknown to it: they are the methods', and we compare them."""
    library = logging.getLogger("transformers.modeling_utils")

    def other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    library.addFilter(other)
    try:
        yield
    finally:
        library.removeFilter(other)


def _load_learned(model: nn.Module, folder: Path, learned: Set[str], report: Mapping[str, Any], *, exact: bool) -> None:
    """Read what the methods learned, which the dense model had no place for; `exact` lets no tensor miss or be left."""
    unexpected = set(report["unexpected_keys"])
    missing = set(report["missing_keys"]) | (learned - unexpected)
    # some of what was learned, but not all, is never what was asked for
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
    """Single tensors out of a checkpoint, in a folder or in the hub's cache."""
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    place = folder if folder.is_dir() else Path(str(cached_file(str(folder), "config.json"))).parent
    tensors = {}
    for path in sorted(place.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in names & set(file.keys())})
    return tensors


def _hub_manifest(name: str) -> dict[str, Any] | None:
    if Path(name).exists() or name.count("/") != 1:
        return None
    from transformers.utils.hub import cached_file

    found = cached_file(name, MANIFEST_FILE, _raise_exceptions_for_missing_entries=False)
    return None if found is None else read_json(Path(found))


def recorded_names(path: str | Path) -> list[str]:
    """The methods that the model of a run folder or a model folder is converted with; none for any other path."""
    folder = RunFolder(path).model if is_run(path) else Path(path)
    manifest = folder / MANIFEST_FILE
    return [entry["name"] for entry in read_json(manifest)["methods"]] if manifest.exists() else []


def _recorded_methods(manifest: dict[str, Any] | None, folder: Path) -> tuple[Method[Any], ...]:
    from graftwork.core.config import build
    from graftwork.methods import NAMES

    methods = []
    for entry in [] if manifest is None else manifest["methods"]:
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
    logger.warning("%s The results are those of the settings of now.", message)


def _check_probe(model: nn.Module, saved: dict[str, Any], folder: Path) -> None:
    now = probe_model(model)
    tolerance = 1e-3 if now["dtype"] == "float32" else 5e-2
    before, after = torch.tensor(saved["values"]), torch.tensor(now["values"])
    scale = before.abs().max().clamp_min(1e-6)
    if before.shape != after.shape or bool(((before - after).abs() > tolerance * scale).any()):
        raise CheckpointMismatchError(
            f"{folder} answers a fixed input differently than when it was saved (largest difference "
            f"{(before - after).abs().max() if before.shape == after.shape else 'in shape'}). Its weights, its "
            "manifest or the version of transformers has changed; `graftwork doctor` tells which."
        )
