"""Trainer callbacks that log: JSON lines in the run folder, progress on stderr."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from graftwork.core.files import append_record, drop_torn_line, read_lines, write_records
from graftwork.core.progress import Progress


class LogFile(TrainerCallback):
    """Writes the Trainer's logs as JSON lines.

    Args:
        path: Log file; a resumed run continues it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the lines that were logged after the checkpoint to resume from."""
        if not state.is_world_process_zero:
            return
        drop_torn_line(self.path)
        # the summary line of an interrupted run covers only a part of the training
        kept = [
            row
            for row in read_lines(self.path)
            if row.get("step", 0) <= state.global_step and "train_runtime" not in row
        ]
        write_records(self.path, kept)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line. Implements `TrainerCallback.on_log`."""
        if state.is_world_process_zero:
            append_record(self.path, {"step": state.global_step, **(logs or {})})


class TrainingProgress(TrainerCallback):
    """Shows steps and loss on stderr; the Trainer's own callbacks write to stdout, which is reserved for results.

    Args:
        name: Label of the progress bar.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.progress = Progress(name, total=0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start at the step to resume from."""
        if state.is_world_process_zero:
            self.progress = Progress(self.name, total=state.max_steps).__enter__()
            self.progress.advance(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance by one step."""
        if state.is_world_process_zero:
            self.progress.advance(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the newest loss. Implements `TrainerCallback.on_log`."""
        if logs and "loss" in logs:
            self.progress.describe(f"{self.name}, loss {float(logs['loss']):.3f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the progress bar."""
        self.progress.__exit__(None, None, None)
