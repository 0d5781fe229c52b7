"""Callbacks that tie a phase to the trainer's clock, and stop a run at the end of a step."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from graftwork.training.context import TrainingRun
from graftwork.training.phases import Phase

STOPPING = (signal.SIGTERM, signal.SIGINT)


class PhaseClock(TrainerCallback):
    """Tells a phase when training begins and when an update is done.

    Args:
        run: What the phase may know.
        phase: The phase.
        state: File with the phase's part of the checkpoint that the run goes on from, if there is one.
    """

    def __init__(self, run: TrainingRun, phase: Phase, state: Path | None) -> None:
        self.run = run
        self.phase = phase
        self.state = state

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin, and take back the phase's state."""
        self.phase.begin(self.run)
        if self.state is not None and self.state.exists():
            self.phase.load_state(torch.load(self.state, map_location=args.device, weights_only=True))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One update is done; a checkpoint may follow."""
        self.phase.after_update(state.global_step)


class StopOnSignal(TrainerCallback):
    """Lets SIGTERM and Ctrl-C end the step at hand and write a checkpoint; a second one ends at once."""

    def __init__(self) -> None:
        self.stopped = False
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen. Only the main thread of a process may."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOPPING}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Write a checkpoint and stop, in all processes at the same step."""
        if args.world_size > 1:
            flag = torch.tensor(int(self.stopped), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.stopped = bool(flag)
        if self.stopped and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
        else:
            self.stopped = False
        return control

    def release(self) -> None:
        """Listen no more."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
