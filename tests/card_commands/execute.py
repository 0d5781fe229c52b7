"""Execution of card scripts in this process: `graftwork …`, `python benchmarks/….py …`, `call PYTHON`.

`refused [WHAT]: graftwork …` must fail with a one-line error and covers the row whose left cell contains WHAT.
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

from card_commands.rows import Executed, lines_of, normal
from graftwork.cli.app import run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def execute(script: Path, variables: Mapping[str, str], names: Mapping[str, Any]) -> Executed:
    """Execute every line of a script in the current folder.

    Args:
        script: Path of the script; `$NAME` is replaced by a variable.
        variables: Values by name.
        names: Python names available to `call`.
    """
    executed = Executed(environment=[f"{name}={value}" for name, value in os.environ.items()])
    for line in lines_of(script):
        text = Template(line).substitute(variables)
        if text.startswith("call "):
            eval(text.removeprefix("call "), dict(names))
            executed.calls.append(line.removeprefix("call "))
            continue
        what, colon, command = text.partition("]: ")
        expected = what.removeprefix("refused [") if colon else None
        words = shlex.split(command if colon else text)
        code, stderr = _benchmark(words) if words[0] == "python" else _graftwork(words)
        _record(executed, words, code, stderr, expected)
    found = list(Path().rglob("*"))
    executed.files = [*map(str, found), *(f"{path}/" for path in found if path.is_dir())]
    return executed


def _record(executed: Executed, words: list[str], code: int, stderr: str, expected: str | None) -> None:
    lines = stderr.strip().splitlines() or [""]
    unexpected = "not foreseen" in stderr or "Unexpected error" in stderr
    if expected is None and code == 0:
        executed.commands.append(normal(words))
    elif expected is not None and code in (1, 2) and len(lines) == 1 and not unexpected:
        executed.refused[expected] = normal(words)
    else:
        executed.failed.append(f"{shlex.join(words)}\n  ended with {code}: {lines[-1]}")


def _graftwork(words: list[str]) -> tuple[int, str]:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as stderr:
        code = run(words[1:])
    return code, stderr.getvalue()


def _benchmark(words: list[str]) -> tuple[int, str]:
    script = BENCHMARKS.parent / words[1]
    with (
        patch.object(sys, "argv", words[1:]),
        patch.object(sys, "path", [str(BENCHMARKS), *sys.path]),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()) as stderr,
    ):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as ended:
            return int(bool(ended.code)), stderr.getvalue()
    return 0, stderr.getvalue()
