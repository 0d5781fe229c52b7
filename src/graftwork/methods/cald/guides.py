"""Guides: the teacher signals of guided fine-tuning, one class per kind of teacher."""

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
from jaxtyping import Float
from torch import Tensor, nn

from graftwork.core.digests import file_digest, write_sources
from graftwork.core.files import apply_umask
from graftwork.errors import CheckpointMismatchError, ConfigError
from graftwork.grafting.conversion import restore
from graftwork.methods.cald import weights
from graftwork.methods.cald.config import CaldConfig
from graftwork.methods.cald.positions import ExtendedPositions, extend_positions, position_table, reserved_rows
from graftwork.metrics.fake_tensors import is_fake
from graftwork.surgery.sites import pretrained
from graftwork.training.context import TrainingRun


@dataclass(frozen=True)
class TeacherOutputs:
    """Outputs of a teacher for one batch."""

    logits: Float[Tensor, "batch classes"]
    hidden_states: tuple[Float[Tensor, "batch tokens hidden"], ...]
    """Embeddings, then the output of each layer."""


class Guide(ABC):
    """Guide: the teacher signal used during conversion. `outputs` is called once per batch while guidance lasts."""

    def __init__(self, config: CaldConfig) -> None:
        self.config = config

    @abstractmethod
    def prepare(self, student: nn.Module) -> None:
        """Create the teacher from the student, before the student's initial weights are changed."""

    @abstractmethod
    def begin(self, run: TrainingRun) -> None:
        """Initialise everything that depends on the run, before the first batch."""

    @property
    @abstractmethod
    def model(self) -> nn.Module:
        """Current teacher, without distribution wrapper."""

    @abstractmethod
    def outputs(self, batch: Mapping[str, Any]) -> TeacherOutputs:
        """Compute the detached outputs of the teacher for a batch."""

    def after_update(self, updates: int) -> None:  # noqa: B027 (a fixed teacher does nothing)
        """Advance the teacher after the `updates`-th update of the student."""

    def numbers(self) -> Mapping[str, float]:
        """Return values of the teacher for the training log."""
        return {}

    def state(self) -> Mapping[str, Any]:
        """Return the teacher's part of a checkpoint."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Restore the teacher's part of a checkpoint."""

    def finish(self, folder: Path) -> None:  # noqa: B027
        """Save the teacher into `folder` if it was trained here and `save_teacher` is set."""


class FixedTeacher(Guide):
    """Fine-tuned dense model: the guides target and hybrid."""

    teacher: nn.Module
    digests: Mapping[str, str]
    """SHA-256 of every file of the teacher."""
    _run: TrainingRun

    @property
    def model(self) -> nn.Module:
        """The frozen teacher."""
        return self.teacher

    def prepare(self, student: nn.Module) -> None:
        """Load the weights of the teacher.

        Raises:
            CheckpointMismatchError: If names or shapes of the weights differ from the dense student's.
        """
        self.teacher = dense_copy(student).requires_grad_(False)
        self.digests = {}
        if has_no_values(self.teacher):
            return
        file = weights.weights_file(str(self.config.teacher))
        weights.check_labels(student, file)
        self.digests = {str(file.resolve()): file_digest(file)}
        weights.load_dense(self.teacher, file, self.config.extend_positions)

    def begin(self, run: TrainingRun) -> None:
        """Move the teacher to the student's device and set its mode."""
        self._run = run
        self.teacher = run.place(self.teacher).train(self.config.teacher_drops_out)

    @torch.no_grad()
    def outputs(self, batch: Mapping[str, Any]) -> TeacherOutputs:
        """Run the teacher without autograd."""
        with self._run.autocast():
            found = self.teacher(**_inputs(batch), output_hidden_states=True)
        return TeacherOutputs(found.logits, found.hidden_states)

    def state(self) -> Mapping[str, Any]:
        """Digests of the files of the teacher."""
        return {"digests": dict(self.digests)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Check that the teacher is that of the checkpoint; checkpoints of earlier versions do not record it.

        Raises:
            CheckpointMismatchError: If a file of the teacher has changed.
        """
        recorded = state.get("digests", self.digests)
        if sorted(recorded.values()) != sorted(self.digests.values()):
            raise CheckpointMismatchError(
                f"The weights of the teacher {self.config.teacher or self.config.snapshots} have changed since this "
                "training started. Restore them, or restart with --overwrite."
            )

    def finish(self, folder: Path) -> None:
        """Record the files of the teacher and their digests."""
        if self._run.is_main_process:
            write_sources(folder, self.digests)


class Waypoints(FixedTeacher):
    """Checkpoints of a dense fine-tuning, one after another: the guide waypoint."""

    files: Sequence[Path]
    current: int | None = None

    def prepare(self, student: nn.Module) -> None:
        """Find the snapshots and check the names and shapes of their weights.

        Raises:
            ConfigError: If the pattern matches nothing.
            CheckpointMismatchError: If the weights of a snapshot do not match the model.
        """
        self.teacher = dense_copy(student).requires_grad_(False)
        self.names, self.files, self.digests = [], [], {}
        if has_no_values(self.teacher):
            return
        self.names = sorted_snapshots(str(self.config.snapshots))
        self.files = [weights.weights_file(name) for name in self.names]
        for file in self.files:
            weights.check_labels(student, file)
            weights.check(self.teacher, file, short_positions=True)
        self.digests = {str(file.resolve()): file_digest(file) for file in self.files}

    def begin(self, run: TrainingRun) -> None:
        """Load the snapshot that guides the next update.

        Raises:
            ConfigError: If there are more snapshots than updates.
        """
        super().begin(run)
        if len(self.files) > run.total_updates:
            raise ConfigError(
                f"Found {len(self.files)} snapshots for {self.config.snapshots!r} and {run.total_updates} updates. "
                "Expected no more snapshots than updates. Narrow the pattern, or train longer."
            )
        self.after_update(run.updates)

    def after_update(self, updates: int) -> None:
        """Load the snapshot that guides the next update, if it changes."""
        guided = min(self._run.total_updates, self.config.distill_steps or self._run.total_updates)
        if not self.files or (self.current is not None and updates >= guided):
            return
        chosen = snapshot_at(updates, self._run.total_updates, self.names, self.config.waypoint_rule)
        if chosen != self.current:
            self.current = chosen
            weights.load_dense(self.teacher, self.files[chosen], self.config.extend_positions)

    def numbers(self) -> Mapping[str, float]:
        """Index of the snapshot."""
        return {"teacher/snapshot": float(self.current or 0)}

    def state(self) -> Mapping[str, Any]:
        """Paths of the snapshots."""
        return {**super().state(), "snapshots": list(self.names)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Check that the snapshots are those of the checkpoint.

        Raises:
            CheckpointMismatchError: If they differ.
        """
        if state["snapshots"] != list(self.names):
            raise CheckpointMismatchError(
                f"Found {len(self.names)} snapshots for {self.config.snapshots!r}. Expected the "
                f"{len(state['snapshots'])} with which this run started. Restore them, or restart with --overwrite."
            )
        super().load_state(state)


class MovingTeacher(Guide):
    """Dense model fine-tuned at the same time on the same batches: the guide trajectory."""

    source: nn.Module
    teacher: nn.Module
    _run: TrainingRun

    @property
    def model(self) -> nn.Module:
        """The teacher without distribution wrapper."""
        return self.source

    def prepare(self, student: nn.Module) -> None:
        """Copy the dense student."""
        self.source = dense_copy(student).requires_grad_(True)

    def begin(self, run: TrainingRun) -> None:
        """Create the teacher's optimizer and learning-rate schedule."""
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
        """Run the teacher with its weights before this update; also run its backward pass if it is updated next."""
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
        """Update the teacher every `teacher_update_cycle` updates of the student."""
        if self._is_due(updates):
            self._run.clip(self.teacher)
            self.optimizer.step()
            self.schedule.step()
            self.updates += 1
            self.optimizer.zero_grad()

    def numbers(self) -> Mapping[str, float]:
        """Loss, learning rate and number of updates of the teacher."""
        rate = float(self.schedule.get_last_lr()[0])
        return {"teacher/loss": self.loss, "teacher/lr": rate, "teacher/step": float(self.updates)}

    def state(self) -> Mapping[str, Any]:
        """Weights, optimizer, schedule and number of updates of the teacher."""
        return {
            "model": {name: value.detach().cpu() for name, value in self.source.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "updates": self.updates,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore weights, optimizer, schedule and number of updates."""
        self.source.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.updates = int(state["updates"])

    def finish(self, folder: Path) -> None:
        """Save the teacher as an ordinary model in `folder`/teacher."""
        if self.config.save_teacher and self._run.is_main_process:
            pretrained(self.source).save_pretrained(folder / "teacher")  # pyright: ignore[reportUnknownMemberType]
            apply_umask(folder / "teacher")

    def _is_due(self, update: int) -> bool:
        return update % self.config.teacher_update_cycle == 0


def make_guide(config: CaldConfig) -> Guide | None:
    """Create the guide of a configuration; None if both weights of the teacher's losses are 0."""
    if config.effective_layer_weight == 0 and config.effective_output_weight == 0:
        return None
    kinds = {"target": FixedTeacher, "hybrid": FixedTeacher, "waypoint": Waypoints, "trajectory": MovingTeacher}
    return kinds[config.guide](config)


def has_no_values(model: nn.Module) -> bool:
    """True for a model on fake tensors, as in memory estimates, into which no weights can be loaded."""
    return any(map(is_fake, model.parameters()))


def dense_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model with the same weights, and the changes of all methods undone.

    Extended position embeddings are extended again, because a teacher has the inputs of its student.
    """
    copied = copy.deepcopy(pretrained(model))
    table = position_table(copied)
    restore(copied)
    if isinstance(table, ExtendedPositions):
        extend_positions(copied, "cald", len(table.weight) - reserved_rows(copied), table.extension)
    return copied


def sorted_snapshots(pattern: str) -> list[str]:
    """Return the paths that match a glob pattern, ordered by trailing number, or by name if one has no number.

    Raises:
        ConfigError: If nothing matches.
    """
    found = glob.glob(pattern)
    if not found:
        raise ConfigError(
            f"Found no path for the snapshots {pattern!r}. Expected folders or files with weights of a dense model. "
            "Correct the pattern."
        )
    numbers = [_number(name) for name in found]
    if any(number is None for number in numbers):
        return sorted(found)
    return sorted(found, key=lambda name: (_number(name) or 0, name))


def snapshot_at(updates: int, total: int, names: Sequence[str], rule: str) -> int:
    """Return the index of the snapshot that guides the next update, after `updates` of `total` updates.

    With W snapshots and c = total div W, equal_split chooses min(updates div c, W − 1); next_ahead chooses the first
    snapshot whose number is above `updates`, else the last.

    Source: He & Garner 2025; equal_split is the rule of the authors' part nlp, next_ahead that of their part speech.

    Raises:
        ConfigError: If `rule` is next_ahead and a name does not end with a number.
    """
    if rule == "equal_split":
        return min(updates // max(1, total // len(names)), len(names) - 1)
    numbers = [_number(name) for name in names]
    if any(number is None for number in numbers):
        raise ConfigError(
            f"waypoint_rule is 'next_ahead', and {names[0]} does not end with a number. Expected names such as "
            "checkpoint-100. Rename the snapshots, or use equal_split."
        )
    return next((i for i, number in enumerate(numbers) if (number or 0) > updates), len(names) - 1)


def _number(name: str) -> int | None:
    """Trailing number of a path, such as 100 of checkpoint-100."""
    found = re.search(r"[_-](\d+)(?:\.\w+)?/?$", name)
    return None if found is None else int(found[1])


def _inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    # the loss of a fixed teacher is unused; encoder–decoders, which need labels to run, are not converted
    return {name: value for name, value in batch.items() if name != "labels"}
