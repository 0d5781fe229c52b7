"""A converted model and the files that describe it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from graftwork.core import faults
from graftwork.core.commits import staged
from graftwork.core.config import to_plain
from graftwork.core.digests import describe_files
from graftwork.core.files import apply_umask, read_json, write_record
from graftwork.core.run_folder import MANIFEST_FILE, RunFolder
from graftwork.core.storage import writing
from graftwork.errors import ConfigError, NonFiniteError
from graftwork.grafting.activity import check_active
from graftwork.grafting.base_reference import Base, find_base, link_base, own_tensors
from graftwork.grafting.hub import check_upload, upload_run
from graftwork.grafting.identity import weights_digest
from graftwork.grafting.method import Change, Method
from graftwork.grafting.model_card import write_card
from graftwork.grafting.precision import as_stored
from graftwork.grafting.probe import probe_model
from graftwork.grafting.saving import describe_model, plain_methods, recorded_elsewhere
from graftwork.settings.recipe import RunConfig, read_run, write_run
from graftwork.surgery.finiteness import check_finite
from graftwork.surgery.sites import pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Origin:
    """Checkpoint that a model was loaded from, with the options of loading."""

    model: str
    """Absolute path of a folder, or hub id."""
    dtype: str | None = None
    device_map: str | None = None
    seed: int = 0
    """Seed of a new classification head and of random weights."""
    random_weights: bool = False
    """True if the checkpoint is a configuration only."""
    device: str | None = None
    """Device that was asked for; None for the accelerator if there is one. It belongs to a machine: not recorded."""


@dataclass(frozen=True)
class Converted:
    """A model with the methods grafted onto it: result of `convert` and `load`, argument of the later stages."""

    model: Any
    """The model itself: still a PreTrainedModel, or one wrapped by PEFT."""
    methods: tuple[Method[Any], ...] = ()
    """Methods that changed the model, in order; empty for an untouched model."""
    changes: tuple[Change, ...] = ()
    tokenizer: PreTrainedTokenizerBase | None = None
    folder: RunFolder | None = field(default=None, repr=False)
    """Run folder that the model was loaded from, if any."""
    origin: Origin | None = field(default=None, repr=False)
    """Checkpoint that the model was loaded from, and how; None for a model built in Python."""
    cast: tuple[str, str] | None = field(default=None, repr=False)
    """Digest of the weights after loading in another dtype, and the digest of the saved weights; None if unchanged."""

    def save(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        allow_non_finite: bool = False,
        base_by_reference: bool | None = None,
    ) -> Path:
        """Write `model/`, `conversion.json` and `run.yaml` into a run folder, all or none.

        Args:
            path: Run folder.
            overwrite: Replace another model, and remove the training, the results and everything else derived from it.
            allow_non_finite: Save weights that are NaN or infinite.
            base_by_reference: Link to the weights of the checkpoint that the model was loaded from, in place of a copy;
                None keeps it as it is in a run that the model is saved back to.

        Returns:
            The run folder.

        Raises:
            ConfigError: If the folder contains a training, results or another model, and `overwrite` is off; or if
                `base_by_reference` is on and the model has other weights than its checkpoint.
            NonFiniteError: If a weight is NaN or infinite, and `allow_non_finite` is off.
        """
        return save(
            self,
            path,
            overwrite=overwrite,
            allow_non_finite=allow_non_finite,
            base_by_reference=base_by_reference,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        whole_run: bool = False,
    ) -> str:
        """Upload model, tokenizer, manifest and a generated model card to the hub; `graftwork.load(repo_id)` opens it.

        Args:
            repo_id: Id of the repository, OWNER/NAME; created if it does not exist.
            private: Create a private repository; None takes the owner's default. Ignored for an existing one.
            token: Token of the hub; by default that of `hf auth login` or HF_TOKEN.
            revision: Branch that receives the files; created if it does not exist.
            commit_message: First line of the commit.
            create_pr: Open a pull request instead of a commit.
            whole_run: Also upload the records of the run: configuration, results, predictions, reports, artifacts.

        Returns:
            Address of the commit or of the pull request.

        Raises:
            ConfigError: If there is no token, the hub refuses or cannot be reached, or the model differs from its run.
        """
        check_upload(repo_id, token)
        options: dict[str, Any] = {
            "private": private,
            "token": token,
            "revision": revision,
            "commit_message": commit_message,
            "create_pr": create_pr,
            "whole_run": whole_run,
        }
        if self.folder is not None:
            if not is_saved_in(self, self.folder):
                raise ConfigError(
                    f"Found other weights or methods than those in {self.folder.path}. Save the model there first, or "
                    "to another run."
                )
            return upload_run(self.folder, self.methods, repo_id, **options)
        if whole_run:
            raise ConfigError("Found no run folder of this model to upload. Save it first, or leave whole_run out.")
        with TemporaryDirectory(prefix="graftwork-") as place:
            run = RunFolder(save(self, Path(place) / "run"))
            return upload_run(run, self.methods, repo_id, **options)

    def digest(self) -> str:
        """Digest of the weights, as the manifest of the checkpoint records it if they are unchanged."""
        found = weights_digest(self.model)
        return self.cast[1] if self.cast is not None and self.cast[0] == found else found

    def configuration(self) -> RunConfig:
        """Run configuration that repeats the conversion; `run.yaml` contains it."""
        origin = self.origin or Origin(str(getattr(pretrained(self.model), "name_or_path", "")))
        method = self.methods[-1] if self.methods else None
        return RunConfig(
            model=origin.model,
            method=None if method is None else {"name": method.name, **to_plain(method.config)},
            dtype=origin.dtype,
            device_map=origin.device_map,
            seed=origin.seed,
            random_weights=origin.random_weights,
        )


def required_tokenizer(converted: Converted) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a converted model.

    Raises:
        ConfigError: If it has none.
    """
    if converted.tokenizer is None:
        raise ConfigError(
            "Found a model without a tokenizer. Pass tokenizer= to graftwork.convert, or load both from a folder."
        )
    return converted.tokenizer


def save(
    converted: Converted,
    path: str | Path,
    *,
    overwrite: bool = False,
    allow_non_finite: bool = False,
    base_by_reference: bool | None = None,
) -> Path:
    """Write a converted model and its run configuration into a run folder; see `Converted.save`.

    Args:
        converted: The model.
        path: Run folder.
        overwrite: As in `Converted.save`.
        allow_non_finite: As in `Converted.save`.
        base_by_reference: As in `Converted.save`.

    Returns:
        The run folder.

    Raises:
        ConfigError: If the folder contains a training, results or another model, and `overwrite` is off.
        NonFiniteError: If a weight is NaN or infinite, and `allow_non_finite` is off.
    """
    run = RunFolder(path)
    config = converted.configuration()
    own = converted.folder is not None and converted.folder.path.resolve() == run.path.resolve()
    with run.training():
        derived = _check_replaceable(converted, run, overwrite=overwrite, own=own)
        if own and run.run_file.exists():
            # a model saved back to its own run still starts from the checkpoint that the run started from
            config = replace(read_run(run), method=config.method)
        if base_by_reference is not None:
            config = replace(config, base_by_reference=base_by_reference)
        options: dict[str, Any] = {"allow_non_finite": allow_non_finite, "by_reference": base_by_reference}
        write_model(converted, run, config=config, remove=derived, **options)
    return run.path


def _check_replaceable(converted: Converted, run: RunFolder, *, overwrite: bool, own: bool) -> list[str]:
    """Names of what is derived from the model in a run; raise if a model must not be written there."""
    derived = run.derived()
    found = [] if overwrite else list(derived)
    if run.model.exists() and not own and not overwrite and not is_saved_in(converted, run):
        found = ["model", *found]
    if found:
        raise ConfigError(
            f"{run.path} already contains {', '.join(found)}. Give another run folder, or replace the model and remove "
            "everything derived from it with --overwrite (overwrite=True in Python)."
        )
    return derived


def is_saved_in(converted: Converted, run: RunFolder) -> bool:
    """True if the model in a run has the same weights and methods."""
    file = run.model / MANIFEST_FILE
    manifest: dict[str, Any] = read_json(file) if file.exists() else {}
    same = manifest.get("methods") == plain_methods(converted.methods)
    return same and manifest.get("digest") == converted.digest()


def write_model(
    converted: Converted,
    run: RunFolder,
    *,
    config: RunConfig | None = None,
    training: Mapping[str, Any] | None = None,
    remove: Sequence[str] = (),
    allow_non_finite: bool = False,
    by_reference: bool | None = None,
) -> str:
    """Replace `model/` and `conversion.json` of a run in one step.

    Args:
        converted: The model.
        run: Run folder.
        config: New content of `run.yaml`, replaced in the same step; None leaves it as it is.
        training: Record of the finished training that led to these weights.
        remove: Names in the run folder that are removed in the same step.
        allow_non_finite: Write weights that are NaN or infinite.
        by_reference: Link to the weights of the base, or raise; None links to them if the run's configuration does and
            they are unchanged.

    Returns:
        Digest of the weights.

    Raises:
        ConfigError: If the model is wrapped by PEFT, or differs from its base, and `by_reference` is on.
        NonFiniteError: If a weight is NaN or infinite, and `allow_non_finite` is off.
    """
    if converted.model is not pretrained(converted.model) and hasattr(converted.model, "peft_config"):
        raise ConfigError(
            f"Cannot save the model to {run.path}: it is wrapped by PEFT, whose save_pretrained writes the adapter "
            "alone. Merge the adapter first (merge_and_unload), or save the graft before wrapping it, and then the "
            "adapter with PEFT."
        )
    check_active(converted.model, f"save the model to {run.path}")
    with writing(run.model):
        faults.point("model.weights", run.model, converted.model.parameters())
    if not allow_non_finite:
        check_finite(converted.model, f"save the model to {run.path}")
    with staged(run.path, remove=remove) as new, as_stored(converted.model):
        folder = new / run.model.name
        referenced = _reference(converted, run, config, by_reference)
        entry: dict[str, Any] | None = None
        with writing(run.model), recorded_elsewhere():
            if referenced is None:
                converted.model.save_pretrained(folder)
            else:
                base, own = referenced
                converted.model.save_pretrained(folder, state_dict=own)
                entry = link_base(folder, base)
            if converted.tokenizer is not None:
                tokenizer: Any = converted.tokenizer
                tokenizer.save_pretrained(folder)
            faults.point("model.saved", run.model)
        probe = probe_model(converted.model)
        finite = probe.pop("finite")
        if not finite and not allow_non_finite:
            raise NonFiniteError(
                f"Cannot save the model to {run.path}: its outputs for a fixed input are NaN or infinite. Lower the "
                "learning rate, or pass allow_non_finite=True to save it nevertheless."
            )
        manifest = describe_model(converted.model, converted.methods, probe=probe, finite=finite)
        if training is not None:
            manifest["training"] = dict(training)
        if entry is not None:
            manifest["base"] = entry
        manifest["files"] = describe_files(folder)
        write_record(folder / MANIFEST_FILE, manifest)
        changes = [change.plain() for change in converted.changes]
        record = {"changes": changes, "probe": manifest["probe"], "digest": manifest["digest"]}
        write_record(new / run.conversion_file.name, record)
        if config is not None:
            write_run(new / run.run_file.name, config)
        elif run.run_file.exists():
            config = read_run(run)
        write_card(RunFolder(new), converted.methods, config=config, name=run.path.resolve().name)
        apply_umask(new)
    return str(manifest["digest"])


def _reference(
    converted: Converted, run: RunFolder, config: RunConfig | None, asked: bool | None
) -> tuple[Base, dict[str, Any]] | None:
    """Base that the weights are linked to, with the tensors that it lacks; None if they are copied."""
    if config is None and run.run_file.exists():
        config = read_run(run)
    if config is None or not config.base_by_reference:
        return None
    try:
        base = find_base(config.model)
        return base, own_tensors(converted.model, base)
    except ConfigError as error:
        if asked:
            raise
        logger.warning("%s contains a copy of the weights: %s", run.model, str(error).partition(". ")[0])
        return None
