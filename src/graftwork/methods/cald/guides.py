"""The teachers that a student may follow: one small object for each guide."""

from __future__ import annotations

import copy
import glob
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftwork.errors import CheckpointMismatchError, ConfigError
from graftwork.methods.cald import weights
from graftwork.methods.cald.config import CaldConfig
from graftwork.surgery.modules import undo
from graftwork.surgery.sites import pretrained
from graftwork.training.context import TrainingRun


@dataclass(frozen=True)
class TeacherOutputs:
    """What a teacher makes of a batch."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...]


class Guide(ABC):
    """A teacher, and how it moves. Asked for outputs once for every batch, as long as the student is guided."""

    def __init__(self, config: CaldConfig) -> None:
        self.config = config

    @abstractmethod
    def prepare(self, student: nn.Module) -> None:
        """Build the teacher beside the student, which has the weights that the run starts from."""

    @abstractmethod
    def begin(self, run: TrainingRun) -> None:
        """Get ready for the first batch."""

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """The teacher as it is now, without any wrapper."""

    @abstractmethod
    def outputs(self, batch: Mapping[str, Any]) -> TeacherOutputs:
        """What the teacher makes of a batch, detached."""

    def after_update(self, updates: int) -> None:  # noqa: B027 (a fixed teacher does nothing)
        """The student has been updated `updates` times."""

    def numbers(self) -> Mapping[str, float]:
        """What the log says of the teacher."""
        return {}

    def state(self) -> Mapping[str, Any]:
        """What a checkpoint must hold of the teacher."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take back what `state` returned."""

    def finish(self, folder: Path) -> None:  # noqa: B027
        """Write the teacher, if it was made here and is wanted."""


class FixedTeacher(Guide):
    """The finished, fine-tuned model: target guidance, and the first part of hybrid guidance."""

    teacher: nn.Module
    _run: TrainingRun

    @property
    def model(self) -> nn.Module:
        """The frozen model."""
        return self.teacher

    def prepare(self, student: nn.Module) -> None:
        """Load the teacher, strictly.

        Raises:
            CheckpointMismatchError: If its weights are not those of the dense student.
        """
        self.teacher = dense_copy(student).requires_grad_(False)
        weights.load_dense(self.teacher, weights.weights_file(str(self.config.teacher)))

    def begin(self, run: TrainingRun) -> None:
        """Put the teacher where the student is."""
        self._run = run
        self.teacher = run.place(self.teacher).train(self.config.teacher_drops_out)

    @torch.no_grad()
    def outputs(self, batch: Mapping[str, Any]) -> TeacherOutputs:
        """A forward pass without a graph."""
        with self._run.autocast():
            found = self.teacher(**_inputs(batch), output_hidden_states=True)
        return TeacherOutputs(found.logits, found.hidden_states)


class Waypoints(FixedTeacher):
    """Snapshots of a fine-tuning, one after another: waypoint guidance."""

    files: Sequence[Path]
    current: int | None = None

    def prepare(self, student: nn.Module) -> None:
        """Find the snapshots and check the shapes of all of them.

        Raises:
            ConfigError: If the pattern fits nothing.
            CheckpointMismatchError: If a snapshot does not fit the model.
        """
        self.teacher = dense_copy(student).requires_grad_(False)
        self.names = sorted_snapshots(str(self.config.snapshots))
        self.files = [weights.weights_file(name) for name in self.names]
        for file in self.files:
            weights.check(self.teacher, file)

    def begin(self, run: TrainingRun) -> None:
        """Load the snapshot that guides the next update.

        Raises:
            ConfigError: If there are more snapshots than updates.
        """
        super().begin(run)
        if len(self.files) > run.total_updates:
            raise ConfigError(
                f"Found {len(self.files)} snapshots for {self.config.snapshots!r} and {run.total_updates} updates. "
                "Expected no more snapshots than updates; narrow the pattern, or train longer."
            )
        self.after_update(run.updates)

    def after_update(self, updates: int) -> None:
        """Go on to the snapshot that guides the update after this one."""
        chosen = snapshot_at(updates, self._run.total_updates, self.names, self.config.waypoint_rule)
        if chosen != self.current:
            self.current = chosen
            weights.load_dense(self.teacher, self.files[chosen])

    def numbers(self) -> Mapping[str, float]:
        """The number of the snapshot, from 0."""
        return {"teacher/snapshot": float(self.current or 0)}

    def state(self) -> Mapping[str, Any]:
        """The names of the snapshots."""
        return {"snapshots": list(self.names)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See that the snapshots are those that the run began with.

        Raises:
            CheckpointMismatchError: If they are not.
        """
        if state["snapshots"] != list(self.names):
            raise CheckpointMismatchError(
                f"Found {len(self.names)} snapshots for {self.config.snapshots!r}, others than the "
                f"{len(state['snapshots'])} that this run began with. Put those back, or start anew with --overwrite."
            )


class MovingTeacher(Guide):
    """The dense model, fine-tuned at the same time on the same batches: trajectory guidance."""

    source: nn.Module
    teacher: nn.Module
    _run: TrainingRun

    @property
    def model(self) -> nn.Module:
        """The model that is fine-tuned."""
        return self.source

    def prepare(self, student: nn.Module) -> None:
        """Copy the student before anything changes it."""
        self.source = dense_copy(student).requires_grad_(True)

    def begin(self, run: TrainingRun) -> None:
        """Make the teacher's optimiser and schedule."""
        self._run = run
        cycle, own = self.config.teacher_update_cycle, self.config.own_teacher_schedule
        guided = min(run.total_updates, self.config.distill_steps or run.total_updates)
        shorter = cycle if own else 1
        self.source = run.place(self.source)
        self.teacher = run.distribute(self.source).train()
        rate = self.config.teacher_learning_rate or run.settings.learning_rate
        self.optimizer = run.optimizer(self.source, rate)
        total = guided // cycle if own else run.total_updates
        self.schedule = run.schedule(self.optimizer, run.warmup_updates // shorter, total)
        self.updates = 0
        self.loss = 0.0

    def outputs(self, batch: Mapping[str, Any]) -> TeacherOutputs:
        """Forward with the weights before this update; in windows that update the teacher, backward too."""
        run = self._run
        due = self._is_due(run.updates + 1)
        with torch.set_grad_enabled(due), run.gather(self.teacher):
            found = self.teacher(**batch, output_hidden_states=True)
            self.loss = float(found.loss.detach())
            if due:
                window = run.settings.gradient_accumulation_steps if self.config.compat else run.window
                run.backward(found.loss / window)
        return TeacherOutputs(found.logits.detach(), tuple(state.detach() for state in found.hidden_states))

    def after_update(self, updates: int) -> None:
        """Update the teacher, if it is due."""
        if self._is_due(updates):
            self._run.clip(self.teacher)
            self.optimizer.step()
            self.schedule.step()
            self.updates += 1
            self.optimizer.zero_grad()

    def numbers(self) -> Mapping[str, float]:
        """The teacher's loss, learning rate and updates."""
        rate = float(self.schedule.get_last_lr()[0])
        return {"teacher/loss": self.loss, "teacher/lr": rate, "teacher/step": float(self.updates)}

    def state(self) -> Mapping[str, Any]:
        """Weights, optimiser, schedule and clock of the teacher."""
        return {
            "model": {name: value.detach().cpu() for name, value in self.source.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "updates": self.updates,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from where the teacher was."""
        self.source.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.updates = int(state["updates"])

    def finish(self, folder: Path) -> None:
        """Write the teacher as an ordinary model."""
        if self.config.save_teacher and self._run.is_main_process:
            pretrained(self.source).save_pretrained(folder / "teacher")

    def _is_due(self, update: int) -> bool:
        return update % self.config.teacher_update_cycle == 0


def make_guide(config: CaldConfig) -> Guide | None:
    """The guide of a configuration; None where nothing of a teacher would reach the student."""
    if config.effective_layer_weight == 0 and config.output_weight == 0:
        return None
    kinds = {"target": FixedTeacher, "hybrid": FixedTeacher, "waypoint": Waypoints, "trajectory": MovingTeacher}
    return kinds[config.guide](config)


def dense_copy(model: nn.Module) -> nn.Module:
    """A copy of a converted model, with its weights and without what any method did to it."""
    copied = copy.deepcopy(pretrained(model))
    undo(copied)
    return copied


def sorted_snapshots(pattern: str) -> list[str]:
    """The paths that a pattern fits, by the number that their names end with, else by name.

    Raises:
        ConfigError: If there are none.
    """
    found = glob.glob(pattern)
    if not found:
        raise ConfigError(f"Found nothing for the snapshots {pattern!r}. Expected folders or files of dense weights.")
    numbers = [_number(name) for name in found]
    if any(number is None for number in numbers):
        return sorted(found)
    return sorted(found, key=lambda name: (_number(name) or 0, name))


def snapshot_at(updates: int, total: int, names: Sequence[str], rule: str) -> int:
    """The snapshot that guides the student after `updates` updates.

    Source: He & Garner 2025; equal_split is the rule of the authors' part nlp, next_ahead that of their part speech.

    Raises:
        ConfigError: If next_ahead is asked of snapshots without numbers.
    """
    if rule == "equal_split":
        return min(updates // max(1, total // len(names)), len(names) - 1)
    numbers = [_number(name) for name in names]
    if any(number is None for number in numbers):
        raise ConfigError(
            f"waypoint_rule is 'next_ahead', and {names[0]} does not end with a number. Expected names such as "
            "checkpoint-100; rename the snapshots, or use equal_split."
        )
    return next((i for i, number in enumerate(numbers) if (number or 0) > updates), len(names) - 1)


def _number(name: str) -> int | None:
    found = re.search(r"[_-](\d+)(?:\.\w+)?/?$", name)
    return None if found is None else int(found[1])


def _inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    # a fixed teacher's own loss is of no use; an encoder–decoder would need the labels, and is no encoder
    return {name: value for name, value in batch.items() if name != "labels"}
