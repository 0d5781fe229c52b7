"""Lengths of a stage for a model, and what they cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graftwork.core.example import AUXILIARY, Example, Examples
from graftwork.core.messages import say
from graftwork.core.processes import is_main_process
from graftwork.core.run_folder import RunFolder
from graftwork.core.stored_rows import has_metadata, with_auxiliary
from graftwork.grafting.converted import Converted
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.lengths import Lengths
from graftwork.settings.recipe import read_run
from graftwork.settings.training import TrainingSettings
from graftwork.surgery.sites import is_classifier, pretrained
from graftwork.tasks.lengths import evaluation_lengths, training_lengths
from graftwork.tasks.task import Task
from graftwork.training.cuts import Cuts, count_cuts
from graftwork.training.encoding import has_chat
from graftwork.training.running_text import positions_of


def with_training_lengths(converted: Converted, settings: TrainingSettings, declared: Lengths) -> TrainingSettings:
    """Return training settings with lengths; see `training_lengths`."""
    return training_lengths(settings, declared, **_room(converted))


def with_lengths(
    converted: Converted, settings: EvaluationSettings, task: Task | None, folder: RunFolder | None
) -> EvaluationSettings:
    """Return settings of evaluation or prediction with lengths; see `evaluation_lengths`.

    Args:
        converted: The model.
        settings: Settings of the stage.
        task: Task that is answered; None for inputs without one.
        folder: Run whose training the lengths are inherited from, if there was one.
    """
    trained = None
    if folder is not None and folder.run_file.is_file():
        trained = read_run(folder).train
    return evaluation_lengths(settings, task, trained, **_room(converted))


def _room(converted: Converted) -> dict[str, Any]:
    inner = pretrained(converted.model)
    causal = not (inner.config.is_encoder_decoder or is_classifier(inner))
    return {"positions": positions_of(inner), "causal": causal}


def cut_lines(converted: Converted, examples: Sequence[Examples], settings: TrainingSettings) -> list[str]:
    """Print one line for each task of a training with inputs or targets that are cut, and return the lines."""
    lines: list[str] = []
    for part in examples:
        cuts = None if part.running_text else _count(converted, part.rows, settings.input_limit, settings.target_limit)
        if cuts is not None and (line := cuts.line(f"training on {part.task}")) is not None:
            lines.append(line)
            if is_main_process():
                say(line)
    return lines


def report_cuts(
    converted: Converted, what: str, rows: Sequence[Example], settings: EvaluationSettings
) -> Mapping[str, int]:
    """Print one line if inputs or gold targets of an evaluation are cut, and return the numbers.

    Args:
        converted: The model.
        what: Name of the data, for the line.
        rows: Examples.
        settings: Settings with lengths.
    """
    cuts = _count(converted, rows, settings.input_limit, settings.answer_limit)
    if cuts is None:
        return {}
    if is_main_process() and (line := cuts.line(what)) is not None:
        say(line)
    return cuts.plain()


def _count(converted: Converted, rows: Sequence[Example], inputs: int, targets: int) -> Cuts | None:
    """Numbers of what is cut; None for conversations, whose oldest turns are dropped, and for class targets."""
    inner = pretrained(converted.model)
    if converted.tokenizer is None or is_classifier(inner) or not inner.can_generate() or has_chat(rows):
        return None
    return count_cuts(
        # two prompts of one example count as two
        tuple(with_auxiliary(rows)) if has_metadata(rows, AUXILIARY) else rows,
        converted.tokenizer,
        encoder_decoder=bool(inner.config.is_encoder_decoder),
        input_limit=inputs,
        target_limit=targets,
    )
