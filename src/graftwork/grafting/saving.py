"""`save_pretrained` of a graft: mark, manifest and digests beside the weights, whoever calls it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graftwork.core.config import to_plain
from graftwork.core.digests import describe_files
from graftwork.core.files import write_record
from graftwork.core.run_folder import MANIFEST_FILE
from graftwork.core.version import __version__
from graftwork.grafting.activity import check_active
from graftwork.grafting.base_reference import LINKED, link_base
from graftwork.grafting.identity import weights_digest
from graftwork.grafting.marks import APPLIED, write_refusal
from graftwork.grafting.method import Change, Method
from graftwork.grafting.precision import as_stored
from graftwork.grafting.probe import probe_model
from graftwork.surgery.finiteness import non_finite
from graftwork.surgery.quantised import check_savable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
"""Patterns of the files that `save_pretrained` writes."""
_RECORDED_ELSEWHERE: ContextVar[bool] = ContextVar("recorded_elsewhere", default=False)


def applied_to(model: PreTrainedModel) -> Mapping[str, tuple[Method[Any], tuple[Change, ...]]]:
    """Methods on a transformers model by name, each with its changes."""
    return model.__dict__.get(APPLIED, {})


def plain_methods(methods: Sequence[Method[Any]]) -> list[dict[str, Any]]:
    """Names and settings of methods, as a manifest records them."""
    return [{"name": method.name, **to_plain(method.config)} for method in methods]


def describe_model(
    model: Any,
    methods: Sequence[Method[Any]],
    *,
    probe: Mapping[str, Any] | None,
    finite: bool = True,
    digest: bool = True,
) -> dict[str, Any]:
    """Manifest of a model without the digests of its files.

    Args:
        model: The model.
        methods: Methods on it.
        probe: Output for the fixed input; None if it was not computed.
        finite: False if that output is NaN or +inf.
        digest: Record the digest of the weights.
    """
    bad = non_finite(model)
    return {
        "graftwork": __version__,
        "methods": plain_methods(methods),
        **({} if probe is None else {"probe": dict(probe)}),
        **({"digest": weights_digest(model)} if digest else {}),
        **({"non_finite": bad or ["outputs"]} if bad or not finite else {}),
    }


@contextmanager
def recorded_elsewhere() -> Generator[None]:
    """Write no manifest within the context: the caller writes one for the whole folder."""
    token = _RECORDED_ELSEWHERE.set(True)
    try:
        yield
    finally:
        _RECORDED_ELSEWHERE.reset(token)


def save_graft(
    model: PreTrainedModel, write: Callable[..., None], folder: Path, *, given_state: bool, recorded: bool
) -> None:
    """Write a graft with its mark and its manifest.

    Args:
        model: The model.
        write: Writes configuration and weights.
        folder: Folder that `write` writes to.
        given_state: True if other tensors than those of the model are saved, as by a sharded training.
        recorded: False in processes other than the main one, which write no files.
    """
    check_active(model, f"save the model to {folder}")
    check_savable(model)
    with as_stored(model):
        write()
        if recorded:
            write_refusal(folder)
            base = LINKED.get()
            entry = None if base is None else link_base(folder, base)
            if not _RECORDED_ELSEWHERE.get():
                _record(model, folder, given_state=given_state, base=entry)


def _record(model: PreTrainedModel, folder: Path, *, given_state: bool, base: Mapping[str, Any] | None = None) -> None:
    """Write the manifest of a graft beside its weights.

    Args:
        model: The model.
        folder: Its folder.
        given_state: True if other tensors than those of the model were saved, as by a sharded training.
        base: Entry about the base that the weights are linked to.
    """
    methods = [method for method, _ in applied_to(model).values()]
    shared = torch.distributed.is_available() and torch.distributed.is_initialized()
    shared = shared and torch.distributed.get_world_size() > 1
    probe = None
    # within a training, an additional forward pass would change the mode of frozen modules, or wait for other processes
    if not (given_state or shared or any(module.training for module in model.modules())):
        probe = probe_model(model)
    finite = True if probe is None else bool(probe.pop("finite"))
    manifest = describe_model(model, methods, probe=probe, finite=finite, digest=not (given_state or shared))
    if base is not None:
        manifest["base"] = dict(base)
    manifest["files"] = describe_files(folder, [path for pattern in _FILES for path in folder.glob(pattern)])
    write_record(folder / MANIFEST_FILE, manifest)


def upload(folder: Path, *, token: Any, repo_id: str | None = None, **options: Any) -> None:
    """Upload the files of a saved graft to the hub, the manifest included."""
    from huggingface_hub import HfApi

    api = HfApi(token=token if isinstance(token, str) else None)
    name = api.create_repo(repo_id or folder.name, private=options.pop("private", None), exist_ok=True).repo_id
    api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=[*_FILES, MANIFEST_FILE], **options)
