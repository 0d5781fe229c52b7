"""Forked processes: functions run in children of a process that has imported the libraries.

A killed child is killed by the operating system like any other process. The parent runs no computation and starts no
thread, because threads do not survive forking.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any


class ChildError(Exception):
    """A child raised an error; the message is its traceback."""


def start(action: Callable[[], Any], result: Path) -> int:
    """Run a function in a forked child, which writes its JSON value or its traceback to a file; return its id."""
    result.unlink(missing_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        # progress bars of libraries
        for number in (1, 2):
            os.dup2(os.open(result.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        value = {"value": action()}
        code = 0
    except BaseException:
        value = {"error": traceback.format_exc()}
    try:
        # a result that is cut off by a kill is no result
        temporary = result.with_suffix(".writing")
        temporary.write_text(json.dumps(value))
        temporary.replace(result)
    finally:
        os._exit(code)


def value_of(status: int, result: Path) -> Any:
    """Value of an ended child; None if it was killed.

    Raises:
        ChildError: If it raised an error.
    """
    if os.WIFSIGNALED(status):
        return None
    content = json.loads(result.read_text())
    if "error" in content:
        raise ChildError(content["error"])
    return content["value"]


def call(action: Callable[[], Any], result: Path, *, kill_after: float | None = None) -> tuple[bool, Any]:
    """Run a function in a forked child.

    Args:
        action: Function with a JSON value.
        result: File for the value.
        kill_after: Seconds after which the child gets SIGKILL; None lets it end.

    Returns:
        True if the child was killed, and its value.
    """
    child = start(action, result)
    if kill_after is not None:
        deadline = time.monotonic() + kill_after
        while (left := deadline - time.monotonic()) > 0:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                break
            time.sleep(min(left, 0.002))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status), value_of(status, result)


def call_all(
    actions: Iterable[tuple[str, Callable[[], Any]]], folder: Path, *, at_once: int
) -> Iterator[tuple[str, Any, str | None]]:
    """Run functions in forked children, some at once; yield name, value and traceback of each as they end."""
    waiting, running = iter(actions), dict[int, tuple[str, Path]]()
    numbers = iter(range(1 << 30))
    while True:
        while len(running) < at_once and (following := next(waiting, None)) is not None:
            name, action = following
            result = folder / f"result-{next(numbers)}.json"
            running[start(action, result)] = name, result
        if not running:
            return
        child, status = os.wait()
        name, result = running.pop(child)
        try:
            yield name, value_of(status, result), None
        except ChildError as error:
            yield name, None, str(error)
