"""Lengths of a stage: the given ones, else those of the run's training, else those that the tasks declare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.lengths import GENERAL, NEW_TOKENS, Lengths
from graftwork.settings.training import TrainingSettings
from graftwork.tasks.task import Task


def declared_lengths(tasks: Sequence[Task]) -> Lengths:
    """Largest lengths that the tasks declare; those of a general task without any."""
    found = [task.lengths for task in tasks] or [GENERAL]
    return Lengths(max(own.input for own in found), max(own.target for own in found))


def training_lengths(
    settings: TrainingSettings, declared: Lengths, *, positions: int, causal: bool = False
) -> TrainingSettings:
    """Return training settings with lengths; declared ones are limited to the positions of the model.

    Args:
        settings: Settings of the training.
        declared: Lengths that its tasks declare.
        positions: Number of positions of the model.
        causal: True if input and target share the positions.
    """
    target = min(declared.target, positions // 2 if causal else positions)
    target = target if settings.max_target_tokens is None else settings.max_target_tokens
    room = positions - target - 1 if causal else positions
    source = min(declared.input, max(1, room)) if settings.max_input_tokens is None else settings.max_input_tokens
    return replace(settings, max_input_tokens=source, max_target_tokens=target)


def evaluation_lengths(
    settings: EvaluationSettings,
    task: Task | None,
    trained: TrainingSettings | None,
    *,
    positions: int,
    causal: bool = False,
) -> EvaluationSettings:
    """Return evaluation settings with lengths; those that are not given are limited to the positions of the model.

    Args:
        settings: Settings of the evaluation.
        task: Task that is answered; None for inputs without one.
        trained: Settings of the run's training; None without one.
        positions: Number of positions of the model.
        causal: True if input and answer share the positions.
    """
    own = GENERAL if task is None else task.lengths
    new = settings.max_new_tokens
    if new is None:
        # without a task and a training, answers are as long as those of a general task
        new = (NEW_TOKENS if trained is None else None) if task is None else task.new_tokens
        inherited = None if trained is None else trained.max_target_tokens
        new = new if new is not None else inherited if inherited is not None else own.target
        new = min(new, positions // 2 if causal else positions)
    source = settings.max_input_tokens
    if source is None:
        inherited = None if trained is None else trained.max_input_tokens
        source = own.input if inherited is None else inherited
        source = min(source, max(1, positions - new - 1 if causal else positions))
    return replace(settings, max_input_tokens=source, max_new_tokens=new)
