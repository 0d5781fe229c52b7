"""Train a converted model through the phases of its methods, inside a run folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graftwork.core import faults
from graftwork.core.config import to_plain
from graftwork.core.devices import CPU, move, training_device, trains_on_cpu
from graftwork.core.example import Example, Examples
from graftwork.core.files import remove_path
from graftwork.core.processes import init_process_group, is_main_process, main_process_first, wait_for_everyone
from graftwork.core.run_folder import RunFolder, absolute
from graftwork.core.storage import writing
from graftwork.core.stored_rows import join_rows, rows_digest, texts_of
from graftwork.errors import ConfigError, GraftworkError
from graftwork.grafting.base_reference import find_base, linked
from graftwork.grafting.converted import Converted, write_model
from graftwork.pipeline.claims import claim, claimed, finished_file, finished_numbers
from graftwork.pipeline.estimation.announcement import announce
from graftwork.pipeline.finishing import describe_artifacts, manifest_of, training_record, write_finished
from graftwork.pipeline.lengths import cut_lines, with_training_lengths
from graftwork.pipeline.loading import load
from graftwork.pipeline.lora_folder import check_only_adapter, write_base, write_lora
from graftwork.pipeline.phases import phases_of, with_lora, without_lora
from graftwork.pipeline.saved_tasks import with_labels, write_task_files
from graftwork.pipeline.start import matches_recorded, untrained
from graftwork.settings.fields import DataFields
from graftwork.settings.recipe import RunConfig, add_notes, read_run, write_run
from graftwork.settings.training import TrainingSettings
from graftwork.surgery.quantised import check_trained
from graftwork.surgery.sites import pretrained
from graftwork.tasks.chat import use_chat_template
from graftwork.tasks.loading import explained_tasks, load_training, load_validation
from graftwork.training.collecting import collect_phase
from graftwork.training.context import is_spread
from graftwork.training.data import training_data
from graftwork.training.encoding import EncodedExamples, padding_id
from graftwork.training.packing import PackBatch, PackedExamples, check_packing
from graftwork.training.phases import Phase
from graftwork.training.sampling import MixtureSampler, MixtureSchedule, PackedSampler
from graftwork.training.trainer import Linked, PhaseData, train_phase
from graftwork.training.validation import HeldOut, hold_out

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A converted model after training."""

    converted: Converted
    phases: Mapping[str, Mapping[str, float]]
    """Phase to the closing numbers of its training: `train_loss`, `train_runtime` in seconds, …"""


def train(
    model: Converted | str | Path,
    settings: TrainingSettings,
    *,
    data: str | Path | None = None,
    run: str | Path | None = None,
    seed: int | None = None,
    overwrite: bool = False,
    estimate: bool = True,
    device: str | None = None,
) -> Trained:
    """Train a converted (or untouched) model through the phases of its methods, and record it in the run's `run.yaml`.

    Resumes from the newest checkpoint after a stop and ends with the weights of an uninterrupted run; loads the trained
    weights if the training is finished.

    Args:
        model: Result of `convert` or `load`, changed in place; or a run folder, model folder or hub id.
        settings: Tasks and hyperparameters.
        data: Folder of the tasks' files.
        run: Run folder, which receives `train/<phase>/` and, at the end, `model/`; the model's own run by default.
        seed: Seed of the order of examples and of dropout; the run's recorded seed by default, else 0.
        estimate: Print the estimated memory before a training starts, and warn if the device has less; takes seconds.
        overwrite: Start anew if the folder contains another training. A finished training of one phase needs none to
            be extended: with a larger `max_steps`, it continues from its last checkpoint.
        device: cpu, or a kind of accelerator such as cuda; the one that the model was loaded for by default, else the
            accelerator if there is one.

    Raises:
        ConfigError: If there is nothing to train on, if the folder contains a training with other settings, if another
            process trains there, or if no run folder is known.
    """
    converted = model if isinstance(model, Converted) else load(model, device=loading_device(settings, device))
    use_chat_template(converted.tokenizer, settings.chat_template)
    chosen_device = device
    if device is None and converted.origin is not None and not settings.shards_weights:
        chosen_device = converted.origin.device
    on_cpu = trains_on_cpu(chosen_device)
    if run is None and converted.folder is None:
        raise ConfigError("Found no run folder to train in. Pass run=FOLDER, or the result of load on a run folder.")
    folder = converted.folder if run is None and converted.folder is not None else RunFolder(str(run))
    recorded = _configuration(converted, folder)
    if converted.origin is not None and _is_from(converted, folder):
        origin = converted.origin
        recorded = replace(
            recorded,
            dtype=origin.dtype or recorded.dtype,
            device_map=origin.device_map or recorded.device_map,
        )
    chosen_seed = recorded.seed if seed is None else seed
    init_process_group(cpu=on_cpu)
    loaded = load_training(settings, data, chosen_seed)
    validation = load_validation(settings, data, chosen_seed)
    own = explained_tasks(settings, chosen_seed)
    settings = with_labels(with_training_lengths(converted, settings, loaded.lengths), own)
    # the seed of the conversion is the run's own, whatever seed the training has
    before = replace(recorded, train=settings, data=_data(data, recorded))
    before = replace(before, device=loading_device(settings, chosen_device))
    anew = partial(untrained, before, converted.methods)
    # all processes of a training share the folder; the first one holds its lock
    with folder.training() if is_main_process() else nullcontext():
        with _recorded(folder, replace(recorded, train=settings, data=_data(data, recorded), seed=chosen_seed)):
            notes = [*loaded.notes, *cut_lines(converted, loaded.examples, settings)]
            if notes and is_main_process():
                add_notes(folder, notes)
            converted, phases = train_phases(
                converted,
                settings,
                loaded.examples,
                folder,
                seed=chosen_seed,
                overwrite=overwrite,
                shares=loaded.shares,
                validation=validation,
                anew=anew if _is_from(converted, folder) else None,
                estimate=estimate,
                start=recorded.model,
                device=chosen_device,
            )
        if is_main_process():
            write_task_files(folder, own)
            _commit(converted, folder, phases)
        wait_for_everyone()
    return Trained(replace(converted, folder=folder), phases)


def loading_device(settings: TrainingSettings, device: str | None) -> str | None:
    """Device that the model of a training is loaded on: the CPU if its weights are distributed afterwards.

    Args:
        settings: Settings of the training.
        device: Device that the training asks for; None for the accelerator if there is one.
    """
    return CPU if settings.shards_weights else device


def _configuration(converted: Converted, folder: RunFolder) -> RunConfig:
    """Configuration of the run, with the method of the model that is trained if it is another than recorded."""
    own = converted.configuration()
    if not folder.run_file.exists():
        return own
    recorded = read_run(folder)
    same = recorded.method is None or matches_recorded(converted, recorded.method)
    return recorded if same else replace(recorded, method=own.method)


def _is_from(converted: Converted, folder: RunFolder) -> bool:
    """True if the model was loaded from the run, so that its weights may be the outcome of a training there."""
    return converted.folder is not None and converted.folder.path.resolve() == folder.path.resolve()


def _data(data: str | Path | None, recorded: RunConfig) -> str | None:
    return recorded.data if data is None else absolute(data)


@contextmanager
def _recorded(folder: RunFolder, config: RunConfig) -> Generator[None]:
    """Write `run.yaml` before training, so that a stopped training can be repeated; put it back if it is refused."""
    if not is_main_process():
        yield
        return
    with folder.writing():
        before = read_run(folder) if folder.run_file.exists() else None
        write_run(folder.run_file, config)
    try:
        yield
    except GraftworkError:
        with folder.writing():
            if before is None:
                folder.run_file.unlink(missing_ok=True)
            else:
                # an evaluation may have recorded its own section meanwhile
                now = read_run(folder)
                write_run(folder.run_file, replace(before, evaluate=now.evaluate))
        raise


def train_phases(
    converted: Converted,
    settings: TrainingSettings,
    examples: Sequence[Examples],
    folder: RunFolder,
    *,
    seed: int,
    overwrite: bool,
    shares: Mapping[str, float] | None = None,
    validation: Sequence[Examples] = (),
    anew: Callable[[], Converted] | None = None,
    estimate: bool = False,
    start: str = "",
    device: str | None = None,
) -> tuple[Converted, dict[str, dict[str, float]]]:
    """Run the phases, each from its newest checkpoint; if all are finished, take the weights that they led to.

    Args:
        converted: Model and tokenizer; changed in place.
        settings: How to train.
        examples: What to train on, one entry for each task.
        folder: Run folder.
        seed: Seed of the order of examples and of dropout.
        overwrite: Remove a training with other settings.
        shares: Share of draws of each task of a mixture; None passes over all examples equally often.
        validation: What is scored on the way where the settings name a split, one entry for each task.
        anew: Makes the model as it was before any training; called if `overwrite` removes a training whose outcome
            `converted` is. None where `converted` is not from the folder.
        estimate: Print the estimated memory first.
        start: Checkpoint that the run starts from, the base of an adapter; empty if unknown.
        device: As in `train`.

    Returns:
        The trained model, and each phase's closing numbers.

    Raises:
        ConfigError: If the folder holds a training with other settings, or there is no tokenizer.
    """
    if converted.tokenizer is None:
        raise ConfigError("Found a model without a tokenizer. Pass tokenizer= to graftwork.convert.")
    init_process_group(cpu=trains_on_cpu(device))
    held = validation
    if isinstance(settings.validation, float) and not validation:
        chosen = seed if settings.subset_seed is None else settings.subset_seed
        examples, held = hold_out(examples, settings.validation, chosen)
    rows = join_rows(part.rows for part in examples)
    phases = phases_of(converted)
    trained = "training" in manifest_of(folder) or any(finished_file(folder, phase).exists() for phase in phases)
    identity = _identity(converted, settings, rows, seed, shares)
    if not (trained and anew is not None):
        # the weights of a finished training are not those that it started from
        identity["start"] = converted.digest()
    wait_for_everyone()
    # one process clears and claims the folder, and the others look at it afterwards
    with main_process_first():
        extended = [claim(folder, phase, identity, overwrite, alone=len(phases) == 1) for phase in phases]
    numbers = {phase.name: finished_numbers(folder, phase, identity) for phase in phases}
    known = {name: found for name, found in numbers.items() if found is not None}
    if len(known) == len(phases) and not any(extended):
        logger.warning("The training in %s is finished; its weights are used as they are.", folder.path)
        converted.model.load_state_dict(load(folder.path, device=device).model.state_dict())
        converted.model.eval()
        return converted, known
    if trained and anew is not None:
        converted.model.load_state_dict(anew().model.state_dict())
    if not settings.shards_weights and not is_spread(converted.model):
        # also for phases that only collect, which the Trainer does not see
        move(converted.model, training_device(device))
    _warn_of_half_precision(converted.model)
    if estimate and is_main_process():
        announce(converted, settings, device)
    closing: dict[str, dict[str, float]] = {}
    base = ""
    if is_main_process():
        remove_path(folder.adapter)
        base = write_base(converted, folder, start) if settings.lora_adapter else ""
    model = with_lora(converted.model, settings.lora)
    if settings.lora_adapter:
        check_only_adapter(model, phases)
    whole, pad, sampler = _batches(converted, settings, examples, shares, seed, phases)
    scored = HeldOut(*training_data(converted.model, converted.tokenizer, held, settings)) if held else None
    for phase in phases:
        check_trained(model, [each for group in phase.parameters(model) for each in group.parameters], phase.name)
        own = phase.settings(settings)
        dataset, collate = phase.examples(model, whole, pad, folder)
        if not phase.parameters(model):
            closing[phase.name] = collect_phase(model, phase, dataset, folder.phase(phase.name), own, collate=collate)
            continue
        # sampler and validation data belong to the data of the run, not to data that a phase provides
        own_data = dataset is whole
        data = PhaseData(dataset, collate, sampler if own_data else None, scored if own_data else None)
        closing[phase.name] = train_phase(
            model,
            phase,
            data,
            folder.phase(phase.name),
            own,
            tokenizer=converted.tokenizer,
            seed=seed,
            device=device,
            linked=_linked(folder),
        )
    if base:
        write_lora(model, folder, base)
    return replace(converted, model=without_lora(model, converted.model).eval()), closing


def _commit(converted: Converted, folder: RunFolder, phases: Mapping[str, Mapping[str, float]]) -> None:
    """Write the trained weights together with the record of the training, unless `model/` already has them."""
    identity = claimed(folder, next(iter(phases)))
    record = manifest_of(folder).get("training")
    if record is not None and record["identity"] == identity:
        digest = str(manifest_of(folder)["digest"])
    else:
        artifacts = describe_artifacts(folder, phases_of(converted))
        with writing(folder.path):
            faults.point("training.trained", folder.path)
        digest = write_model(converted, folder, training=training_record(identity, phases, artifacts))
    with writing(folder.path):
        faults.point("training.committed", folder.path)
    write_finished(folder, phases, digest)


def _batches(
    converted: Converted,
    settings: TrainingSettings,
    examples: Sequence[Examples],
    shares: Mapping[str, float] | None,
    seed: int,
    phases: Sequence[Phase],
) -> tuple[Any, Any, Any]:
    """Encoded examples, their collator, and the sampler where the Trainer's own order will not do."""
    unlabelled = not any(phase.needs_labels for phase in phases)
    encoded, collate = training_data(converted.model, converted.tokenizer, examples, settings, unlabelled=unlabelled)
    sizes = [len(part.rows) for part in examples]
    if shares is None and not settings.packing:
        return encoded, collate, None
    if any(part.running_text for part in examples):
        raise ConfigError("Found a mixture or packing of running text. Train on its tasks without either.")
    weights = sizes if shares is None else [shares[part.task] for part in examples]
    schedule = MixtureSchedule(sizes, [float(weight) for weight in weights], seed)
    at_once = settings.sequences_per_step
    if not settings.packing:
        return encoded, collate, MixtureSampler(schedule, -(-len(encoded) // at_once) * at_once)
    check_packing(converted.model)
    if not isinstance(encoded, EncodedExamples):
        raise ConfigError("Found packing with a classification head. Only texts can be packed; leave packing out.")
    room = (settings.input_limit, settings.target_limit)
    sampler = PackedSampler(schedule, encoded.lengths(), room, at_once)
    start = int(pretrained(converted.model).config.decoder_start_token_id)
    return PackedExamples(encoded, start), PackBatch(padding_id(converted.tokenizer)), sampler


def _identity(
    converted: Converted,
    settings: TrainingSettings,
    rows: Sequence[Example],
    seed: int,
    shares: Mapping[str, float] | None,
) -> dict[str, Any]:
    # mappings that are not given are omitted, so that trainings of earlier versions have the same identity
    unused = {entry.name for entry in fields(DataFields)} - set(settings.given)
    unused |= set() if settings.lora_adapter else {"lora_adapter"}
    return {
        "train": {name: value for name, value in to_plain(settings).items() if name not in unused},
        "methods": [{"name": method.name, **to_plain(method.config)} for method in converted.methods],
        "examples": len(rows),
        "content": rows_digest(texts_of(rows))[:16],
        "seed": seed,
        **({} if shares is None else {"shares": dict(shares)}),
    }


def _warn_of_half_precision(model: nn.Module) -> None:
    """Warn about 16-bit weights, in which small updates are rounded away."""
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    if half := kinds & {torch.bfloat16, torch.float16}:
        logger.warning(
            "The weights are in %s, in which small updates are lost. Load or convert with dtype float32; train.bf16 "
            "computes in bfloat16 all the same.",
            ", ".join(sorted(str(kind).removeprefix("torch.") for kind in half)),
        )


def _linked(folder: RunFolder) -> Linked | None:
    """Context in which checkpoints of a run link to its base; None for a run with weights of its own."""
    if "base" not in manifest_of(folder):
        return None
    return partial(linked, base=find_base(read_run(folder).model))
