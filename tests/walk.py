"""Code blocks of the documents, and their execution in one folder in reading order.

Shell blocks run in bash. Their `graftwork` sends its arguments to this process, unless `alone` is set: a process of its
own for each command would import torch again.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from unittest.mock import patch

from graftwork.cli.app import run
from graftwork.methods import NAMES

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(?:<!-- not run: (?P<mark>[^\n]+) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```", re.S | re.M)
STUB = """#!{python} -SE
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
stdin = sys.stdin.buffer.read().decode() if "-" in sys.argv else ""
request = {{"words": sys.argv[1:], "folder": os.getcwd(), "stdin": stdin, "environment": dict(os.environ)}}
server.sendall(json.dumps(request).encode())
server.shutdown(socket.SHUT_WR)
answer = json.loads(b"".join(iter(lambda: server.recv(65536), b"")))
sys.stdout.write(answer["out"])
sys.stderr.write(answer["err"])
sys.exit(answer["code"])
"""
"""The command in shell blocks."""


@dataclass(frozen=True)
class Block:
    """One fenced block of a document."""

    document: str
    number: int
    language: str
    code: str
    mark: str | None
    """Reason why the block is not executed, from the comment before it."""

    def __str__(self) -> str:
        return f"{self.document}, block {self.number}"

    @property
    def commands(self) -> list[str]:
        """Lines of a shell or text block that start a command of Graftwork."""
        found = re.findall(r"^(?:\$ )?((?:accelerate launch|torchrun|graftwork)\b.*)$", self.code, re.M)
        return found if self.language in ("shell", "text") else []


def cards() -> dict[str, Path]:
    """Paths of the method cards by method."""
    return {name: Path(str(files(NAMES.get(name).__module__.rpartition(".")[0]) / "README.md")) for name in NAMES}


def documents() -> dict[str, Path]:
    """Every document by name, in reading order: README, pages in the order of the navigation, cards."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = re.findall(r"\b(index\.md|guides/\w+\.md|troubleshooting\.md)$", text, re.M)
    return {
        "README.md": ROOT / "README.md",
        **{Path(page).stem: ROOT / "docs" / page for page in pages},
        **cards(),
    }


def blocks_of(document: str, path: Path) -> list[Block]:
    """Fenced blocks of a document, numbered from 1."""
    found = BLOCK.finditer(path.read_text(encoding="utf-8"))
    return [Block(document, n, one["language"], one["code"], one["mark"]) for n, one in enumerate(found, start=1)]


@contextlib.contextmanager
def unchanged_process() -> Iterator[None]:
    """Restore the environment, the logging and the working folder of this process afterwards."""
    from transformers.utils import logging as transformers_logging

    from graftwork.surgery.families import REGISTRY

    families = dict(REGISTRY._entries)
    level, handlers, verbosity = logging.root.level, list(logging.root.handlers), transformers_logging.get_verbosity()
    environment, folder = dict(os.environ), Path.cwd()
    try:
        yield
    finally:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
        logging.root.setLevel(level)
        logging.root.handlers[:] = handlers
        REGISTRY._entries = families


def walk(blocks: list[Block], folder: Path, *, alone: bool = False) -> dict[Block, str]:
    """Execute blocks in one folder; return the output of each.

    Args:
        blocks: Python and shell blocks.
        folder: Folder that all of them run in; an empty one for a newcomer.
        alone: Start one process for each command and each Python block, as a reader does.

    Raises:
        AssertionError: If a block fails; the message contains its output.
    """
    python, shell = (_python_alone, _shell_alone) if alone else (_python, _shell)
    output = {}
    with unchanged_process():
        os.chdir(folder)
        for block in blocks:
            execute: Callable[[Block], tuple[int, str]] = python if block.language == "python" else shell
            code, output[block] = execute(block)
            assert code == 0, f"{block} ended with {code}:\n{block.code}\n{output[block]}"
            os.chdir(folder)
    return output


def _python(block: Block) -> tuple[int, str]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(block.code, str(block), "exec"), {"__name__": "__main__"})
    return 0, out.getvalue()


def _python_alone(block: Block) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", block.code],
        env=_environment(Path(sys.executable).parent),
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def _shell_alone(block: Block) -> tuple[int, str]:
    return _bash(block, Path(sys.executable).parent)


def _environment(commands: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{commands}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
    }


def _bash(block: Block, commands: Path) -> tuple[int, str]:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.code],
        env=_environment(commands),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def _shell(block: Block) -> tuple[int, str]:
    """Run a shell block while this thread executes its commands of Graftwork."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="walk") as place, socket.socket(socket.AF_UNIX) as server:
        address = f"{place}/socket"
        stub = Path(place) / "graftwork"
        stub.write_text(STUB.format(python=sys.executable, address=address), encoding="utf-8")
        stub.chmod(0o755)
        server.bind(address)
        server.listen()
        server.settimeout(0.05)
        done: list[tuple[int, str]] = []
        thread = threading.Thread(target=lambda: done.append(_bash(block, Path(place))))
        thread.start()
        while thread.is_alive():
            with contextlib.suppress(TimeoutError):
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(None)
                    _answer(connection)
        thread.join()
    return done[0]


def _answer(connection: socket.socket) -> None:
    request = json.loads(b"".join(iter(lambda: connection.recv(65536), b"")))
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.dict(os.environ, request["environment"]),
        patch.object(sys, "stdin", io.StringIO(request["stdin"])),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.chdir(request["folder"]),
    ):
        code = run(request["words"])
    connection.sendall(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}).encode())
