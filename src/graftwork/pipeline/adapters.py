"""Adapter folders of PEFT in place of a model: the base model that they name, with the adapter merged into it."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graftwork.core.hub import talking_to_hub
from graftwork.core.messages import say
from graftwork.core.readers import read_json_mapping
from graftwork.core.run_folder import is_path
from graftwork.core.storage import disk_error
from graftwork.errors import ConfigError, GraftworkError, MissingExtraError
from graftwork.grafting.conversion import is_usable
from graftwork.grafting.peft_folder import CONFIG_FILE, WEIGHTS_FILE, is_adapter_folder
from graftwork.pipeline.model_files import check_file, has_tokenizer
from graftwork.pipeline.verification import hub_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_PICKLED = "adapter_model.bin"


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter folder, in the file system or in the hub's cache."""

    folder: Path
    base: str
    """Folder or hub id of the base model."""
    revision: str | None
    """Revision of the base model on the hub."""
    kind: str
    """Type of the adapter, such as LORA."""


def adapter_of(name: str | Path, revision: str | None = None) -> Adapter | None:
    """Read the adapter that a model's name denotes; None for whole models.

    Args:
        name: Folder or hub id.
        revision: Revision on the hub.

    Raises:
        ConfigError: If an adapter names no base model, or one that is not there.
        CheckpointMismatchError: If a file of the adapter is missing, truncated or a pointer.
    """
    folder = Path(name)
    if not folder.is_dir():
        found = _downloaded(str(name), revision)
        if found is None:
            return None
        folder = found
    if not is_adapter_folder(folder):
        return None
    file = folder / CONFIG_FILE
    check_file(file)
    config = read_json_mapping(file, error=ConfigError)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ConfigError(
            f"Cannot load the adapter in {name}: {CONFIG_FILE} names no base model. Add its folder or hub id as "
            "base_model_name_or_path."
        )
    if is_path(base) and not Path(base).is_dir():
        raise ConfigError(
            f"Cannot load the adapter in {name}: its base model {base!r} does not exist here. Put the model there, or "
            f"correct base_model_name_or_path in {CONFIG_FILE}."
        )
    if is_adapter_folder(Path(base)):
        raise ConfigError(
            f"Cannot load the adapter in {name}: its base model {base!r} is an adapter too. Merge that one first: load "
            "it with Graftwork and save the model."
        )
    weights = next((folder / name for name in (WEIGHTS_FILE, _PICKLED) if (folder / name).is_file()), None)
    if weights is None:
        raise ConfigError(f"Cannot load the adapter in {name}: found no {WEIGHTS_FILE}. Copy the file too.")
    check_file(weights)
    pinned = config.get("revision")
    return Adapter(folder, base, pinned if isinstance(pinned, str) else None, str(config.get("peft_type")))


def merge_adapter(model: nn.Module, adapter: Adapter) -> Any:
    """Merge an adapter into its base model, and print one line.

    Args:
        model: The base model; changed in place.
        adapter: The adapter.

    Raises:
        ConfigError: If peft cannot load the adapter onto this model, or merge adapters of its kind.
        MissingExtraError: If peft is not installed.
    """
    try:
        import peft
    except ImportError:
        raise MissingExtraError("peft", "lora") from None
    # the loaders of peft are untyped
    peft_model: Any = peft.PeftModel
    with _loading(adapter), warnings.catch_warnings():
        # missing tensors are refused below
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        wrapped = peft_model.from_pretrained(model, str(adapter.folder), torch_device="cpu")
        _check_names(peft, wrapped, adapter)
        unload = getattr(wrapped, "merge_and_unload", None)
        if unload is None:
            raise ConfigError(
                f"Cannot merge the adapter in {adapter.folder}: its type is {adapter.kind}, which changes no weights. "
                "Expected one such as LORA. Use it with PEFT on the base model."
            )
        merged = unload(safe_merge=True)
    # a configuration of an adapter left behind would make save_pretrained write the adapter alone
    merged.__dict__.pop("peft_config", None)
    say(f"Merged the adapter in {adapter.folder} ({adapter.kind}) into {adapter.base}.")
    return merged


def tokenizer_beside(adapter: Adapter, base: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase | None:
    """Tokenizer in the folder of an adapter; that of the base model if there is none."""
    if not has_tokenizer(adapter.folder):
        return base
    import transformers

    # the loader of transformers is untyped
    auto_tokenizer: Any = transformers.AutoTokenizer
    with _loading(adapter):
        found = auto_tokenizer.from_pretrained(str(adapter.folder), trust_remote_code=False)
    return found if is_usable(found) else base


def _check_names(peft: Any, wrapped: Any, adapter: Adapter) -> None:
    """Refuse tensors that are missing or left over; peft only warns of some."""
    saved = set(peft.load_peft_weights(str(adapter.folder), device="cpu"))
    expected = set(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    # embeddings of an enlarged vocabulary
    extra = {name for name in saved - expected if not name.endswith(("embed_tokens.weight", "lm_head.weight"))}
    if expected - saved or extra:
        found = f"no tensor {min(expected - saved)}" if expected - saved else f"an unknown tensor {min(extra)}"
        raise ConfigError(
            f"Cannot load the adapter in {adapter.folder} onto {adapter.base}: found {found}. Expected an adapter that "
            "was trained on this model; correct base_model_name_or_path."
        )


@contextmanager
def _loading(adapter: Adapter) -> Generator[None]:
    """Convert the errors of peft, torch and safetensors to one line."""
    try:
        yield
    except GraftworkError:
        raise
    except Exception as error:
        if found := disk_error(error):
            raise found from None
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise GraftworkError(f"Cannot load the adapter in {adapter.folder}: out of memory.") from None
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        shown = " ".join(lines[:2]).rstrip(".") or type(error).__name__
        raise ConfigError(
            f"Cannot load the adapter in {adapter.folder} onto {adapter.base}: {shown}. Expected an adapter that was "
            "trained on this model; correct base_model_name_or_path."
        ) from None


def _downloaded(name: str, revision: str | None) -> Path | None:
    """Folder of an adapter on the hub, in the cache; None for other repositories.

    Raises:
        ConfigError: If the repository does not exist, may not be read, or cannot be reached.
    """
    if "/" not in name or is_path(name) or hub_file(name, "config.json", revision) is not None:
        return None
    if hub_file(name, CONFIG_FILE, revision) is None:
        return None
    import huggingface_hub

    # the client of the hub is untyped
    client: Any = huggingface_hub
    patterns = ["*.json", WEIGHTS_FILE, "*.model", "*.txt", "*.jinja"]
    with talking_to_hub("load the adapter in", name):
        return Path(client.snapshot_download(name, revision=revision, allow_patterns=patterns))
