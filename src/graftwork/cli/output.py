"""What commands print, results on stdout and everything else on stderr, and how words of a command are spelt."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout


def hyphenated(word: str) -> str:
    """An option as it is declared; --window_size is --window-size, as the commands of papers often write it."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def one_line(error: Exception) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split())


@contextmanager
def results_only() -> Iterator[None]:
    """Send what libraries print, such as the Trainer's log, to stderr."""
    with redirect_stdout(sys.stderr):
        yield


def quiet_libraries(debug: bool) -> None:
    """Keep the log of libraries off the screen unless asked for; our own warnings are shown."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.DEBUG if debug else logging.WARNING)
    if debug:
        return
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # it says every retry twice; what came of them is in our own error
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", module="(?!graftwork)")
    # read by transformers when it is imported; a process that has done so before is told directly
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
