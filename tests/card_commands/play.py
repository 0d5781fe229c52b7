"""Plays a card's script in this process: `graftwork …`, `python benchmarks/….py …`, `call PYTHON`.

`refused [WHAT]: graftwork …` must fail with one line, which stands for the row whose left-hand cell holds WHAT.
"""

from __future__ import annotations

import io
import os
import runpy
import shlex
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from string import Template
from typing import Any
from unittest.mock import patch

from card_commands.rows import Played, lines_of, normal
from graftwork.cli.app import run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def play(script: Path, variables: Mapping[str, str], names: Mapping[str, Any]) -> Played:
    """Run every line in the current folder.

    Args:
        script: The script; `$NAME` in it is one of the variables.
        variables: Name to value.
        names: What `call` may use.
    """
    played = Played(environment=[f"{name}={value}" for name, value in os.environ.items()])
    for line in lines_of(script):
        text = Template(line).substitute(variables)
        if text.startswith("call "):
            eval(text.removeprefix("call "), dict(names))
            played.calls.append(line.removeprefix("call "))
            continue
        what, colon, command = text.partition("]: ")
        expected = what.removeprefix("refused [") if colon else None
        words = shlex.split(command if colon else text)
        code, said = _benchmark(words) if words[0] == "python" else _graftwork(words)
        _note(played, words, code, said, expected)
    found = list(Path().rglob("*"))
    played.files = [*map(str, found), *(f"{path}/" for path in found if path.is_dir())]
    return played


def _note(played: Played, words: list[str], code: int, said: str, expected: str | None) -> None:
    lines = said.strip().splitlines() or [""]
    if expected is None and code == 0:
        played.commands.append(normal(words))
    elif expected is not None and code in (1, 2) and len(lines) == 1 and "not foreseen" not in said:
        played.refused[expected] = normal(words)
    else:
        played.failed.append(f"{shlex.join(words)}\n  ended with {code}: {lines[-1]}")


def _graftwork(words: list[str]) -> tuple[int, str]:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
        code = run(words[1:])
    return code, said.getvalue()


def _benchmark(words: list[str]) -> tuple[int, str]:
    script = BENCHMARKS.parent / words[1]
    with (
        patch.object(sys, "argv", words[1:]),
        patch.object(sys, "path", [str(BENCHMARKS), *sys.path]),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()) as said,
    ):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as ended:
            return int(bool(ended.code)), said.getvalue()
    return 0, said.getvalue()
