"""Trainer callbacks that call a phase's hooks, and that stop a run at the end of a step."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from graftwork.training.context import TrainingRun
from graftwork.training.phases import Phase

STOPPING = (signal.SIGTERM, signal.SIGINT)


class PhaseCallback(TrainerCallback):
    """Calls the hooks of a phase at the start of training and after every update.

    Args:
        run: Interface to the trainer.
        phase: Phase whose hooks are called.
        state: File of the phase's state in the checkpoint to resume from; None for a new run.
    """

    def __init__(self, run: TrainingRun, phase: Phase, state: Path | None) -> None:
        self.run = run
        self.phase = phase
        self.state = state

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Call `begin` and restore the phase's state."""
        self.phase.begin(self.run)
        if self.state is not None and self.state.exists():
            self.phase.load_state(torch.load(self.state, map_location=args.device, weights_only=True))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Call `after_update`; a checkpoint may follow."""
        self.phase.after_update(state.global_step)


class StopOnSignal(TrainerCallback):
    """Stops training after the current step with a checkpoint on SIGTERM or Ctrl-C; a second signal stops at once."""

    def __init__(self) -> None:
        self.stopped = False
        self._before: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Install the signal handlers, which only the main thread can do."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOPPING}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> Any:  # the handler accepts a control, but the base class declares None
        """Request a checkpoint and stop, at the same step in all processes."""
        if args.world_size > 1:  # pyright: ignore[reportUnknownMemberType]
            flag = torch.tensor(int(self.stopped), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)  # pyright: ignore[reportUnknownMemberType]
            self.stopped = bool(flag)
        if self.stopped and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
        else:
            self.stopped = False
        return control

    def release(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
