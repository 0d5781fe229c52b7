"""What commands print, results on stdout and everything else on stderr, and how words of a command are spelt."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from graftwork.core.processes import is_main_process


def show(value: Any, *, as_json: bool) -> None:
    """Print a result: as JSON, or as a table where it is a list of records, or line by line; once for all processes."""
    if not is_main_process():
        return
    if as_json:
        print(json.dumps(value, ensure_ascii=False, indent=2))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            print(f"{key}: {item}")
    elif isinstance(value, Sequence) and not isinstance(value, str) and value and isinstance(value[0], Mapping):
        table(value)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            print(item)
    else:
        print(value)


def table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print records as a table that fits the terminal; tab-separated where stdout is no terminal."""
    header = list(rows[0])
    if not sys.stdout.isatty():
        print("\t".join(header))
        for row in rows:
            print("\t".join(str(row[name]) for name in header))
        return
    from rich.console import Console
    from rich.table import Table

    grid = Table(*header, box=None, header_style="bold")
    for row in rows:
        grid.add_row(*(str(row[name]) for name in header))
    Console().print(grid)


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
