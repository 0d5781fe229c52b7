"""Messages to the user on stderr."""

from __future__ import annotations

import sys

from graftwork.core.processes import first_process


def say(text: str) -> None:
    """One line on stderr, once for all processes."""
    if first_process():
        print(text, file=sys.stderr, flush=True)
