"""Messages to the user on stderr."""

from __future__ import annotations

import sys

from graftwork.core.processes import is_main_process


def say(text: str) -> None:
    """Print one line on stderr, in the main process only."""
    if is_main_process():
        print(text, file=sys.stderr, flush=True)
