"""Streams and logging of commands, and spelling of options."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager, redirect_stdout
from io import TextIOWrapper

from graftwork.core.messages import printable


def hyphenated(word: str) -> str:
    """Replace underscores in the name of an option by hyphens; commands in papers often write --window_size."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def one_line(error: BaseException) -> str:
    """Message of an error without line breaks."""
    return " ".join(str(error).split())


def accept_any_text() -> None:
    """Let stdout and stderr escape characters that their encoding lacks, in place of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _PrintableFormatter(logging.Formatter):
    """Formatter that escapes control codes: messages may quote data."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextmanager
def results_only() -> Generator[None]:
    """Redirect the output of libraries, such as the Trainer's log, to stderr."""
    with redirect_stdout(sys.stderr):
        yield


def quiet_libraries(debug: bool) -> None:
    """Silence the logs of libraries unless `debug`; warnings of Graftwork are shown, in any encoding."""
    accept_any_text()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PrintableFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.DEBUG if debug else logging.WARNING)
    if debug:
        return
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # the hub client logs every retry twice; the final error contains the outcome
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", module="(?!graftwork)")
    # transformers reads the variables when it is imported; set the level directly if it is imported already
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
