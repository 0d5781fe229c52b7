"""TensorBoard's writer: errors of its thread reach the training instead of the terminal."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from graftwork.core.storage import storage_error, writing

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@contextmanager
def quiet_writer_threads() -> Generator[None]:
    """Print no traceback for a thread that fails on a full disk; the writer raises its error in the training."""
    before = threading.excepthook

    def quiet(arguments: threading.ExceptHookArgs) -> None:
        failed = getattr(arguments.thread, "exception", None)
        if failed is None or failed is not arguments.exc_value or storage_error(failed) is None:
            before(arguments)

    threading.excepthook = quiet
    try:
        yield
    finally:
        threading.excepthook = before


def writer_thread(writer: Any) -> Any:
    """Thread of a SummaryWriter; TensorBoard has no public accessor."""
    return writer.file_writer.event_writer._async_writer._worker


def close_writer(writer: Any, thread: Any) -> None:
    """Close a SummaryWriter; raise the error of its thread if that failed after the last check."""
    writer.close()
    if thread.exception is not None:
        raise thread.exception


@contextmanager
def summary_writer(folder: Path, arguments: TrainingArguments) -> Generator[SummaryWriter | None]:
    """Open a TensorBoard writer in the main process; None in the others."""
    if arguments.process_index != 0:  # pyright: ignore[reportUnknownMemberType]
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    place = folder / "tensorboard"
    with quiet_writer_threads():
        with writing(place):
            writer = SummaryWriter(str(place))
            thread = writer_thread(writer)
        try:
            yield writer
        finally:
            # the last events are written here
            with writing(place):
                close_writer(writer, thread)
