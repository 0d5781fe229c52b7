"""Fault injection at named commit points, a development aid that is off by default.

The environment variable `GRAFTWORK_FAULT` is `POINT[@FILE]:ACTION[:N]`: at hit N (the first by default) of a point, for
paths whose last part matches the pattern FILE, the process is killed (`kill`), the disk is full (`full`) or read-only
(`read-only`), or values become NaN (`nan`). For example `file.written@results.json:kill`.
"""

from __future__ import annotations

import errno
import math
import os
import re
import signal
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from graftwork.errors import ConfigError

VARIABLE = "GRAFTWORK_FAULT"

POINTS: Mapping[str, str] = {
    # files: used by all writers of run.yaml, results.json, best.json, settings, records, reports and prepared rows
    "file.written": "the temporary file is complete; it has not been renamed",
    "file.replaced": "the temporary file has been renamed to its name",
    "line.append": "a JSON line has not been appended yet",
    "line.appended": "a JSON line has been appended",
    "folder.complete": "a new folder is complete; it has not been renamed",
    "folder.moved": "the old folder has been moved away; there is no folder of this name",
    "folder.swapped": "the new folder has its name; the old one has not been removed",
    # commits: model/, conversion.json and run.yaml
    "commit.staged": "all entries are staged; nothing is committed",
    "commit.made": "the commit has been made; no entry is in its place",
    "commit.removed": "a name that the commit removes is gone",
    "commit.moved": "an entry of the commit is in its place; others may not be",
    # models
    "model.weights": "values of the weights before the model is saved",
    "model.saved": "weights and tokenizer are staged; there is no manifest",
    # training
    "claim.removed": "another training has been removed; the folder has its claim, and not that of this one",
    "training.loss": "value of the loss of a step",
    "training.gradients": "values of the gradients of an update",
    "checkpoint.weights": "a checkpoint has weights, but no optimizer",
    "checkpoint.optimizer": "a checkpoint has an optimizer, but no state of the phase",
    "checkpoint.complete": "a checkpoint is complete",
    "training.ended": "a phase is trained; its results are not written",
    "training.trained": "all phases are trained; the model is not written",
    "training.committed": "the trained model is written; the closing numbers beside the checkpoints are not",
    # predictions
    "prediction.weights": "values of the weights before a prediction",
    "prediction.cleared": "outdated predictions are removed; the cache key is not written",
    # collected values of sparsefinder
    "shard.written": "queries and keys are in a temporary file",
    "shard.replaced": "queries and keys are in place, but not listed",
    "centroids.written": "centroids are in a temporary file",
    "centroids.replaced": "centroids are in place; their description is not",
    # gradient bank
    "bank.gradients": "values of a gradient before it is encoded",
    "bank.datasets": "a new bank has empty datasets, but no commit record",
    "bank.recorded": "a new bank has a commit record, but no manifest",
    "bank.records": "records are inserted; no id refers to them",
    "bank.ids": "ids are inserted; the commit record does not count them",
    "bank.synced": "all files are durable; the commit record is not written",
    "bank.committed": "the commit record is written",
    "bank.compacted": "data files are merged; the commit record lists the old ones",
    "bank.cleaned": "files of old versions are removed",
    # embedded index
    "index.marked": "a part of a build is committed; its mark is not written",
    "index.built": "all passages are committed; the commit record says that the build is going on",
    "index.pending": "a change is recorded as pending; it is not committed",
    "index.changed": "a change is committed; the commit record has it as pending",
    # a change of bank and index
    "change.recorded": "a change of bank and index is recorded; neither has been changed",
    "change.first": "the first of bank and index has been changed; the other has not",
    "change.both": "bank and index have been changed; the record of the change remains",
}
"""Description of the state at each point, by name."""

ACTIONS = ("kill", "full", "read-only", "nan")

Handler = Callable[[str, Path, Iterable[Any]], None]
"""Receives the name of a point, the path that is written, and values that can become NaN."""


@dataclass
class Fault:
    """One fault: where, what, and at which hit."""

    point: str
    action: str
    file: str = "*"
    """Pattern for the last part of the path."""
    hit: int = 1
    _hits: int = 0

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Parse `POINT[@FILE]:ACTION[:N]`.

        Raises:
            ConfigError: If the form, the point or the action is unknown.
        """
        found = re.fullmatch(r"([^:@]+)(?:@([^:]+))?:([^:]+)(?::([1-9]\d*))?", text.strip())
        if found is None:
            raise ConfigError(
                f"Found {VARIABLE}={text!r}. Expected POINT[@FILE]:ACTION[:N], such as file.written@run.yaml:kill:2. "
                "Unset the variable to inject no fault."
            )
        point, file, action, hit = found.groups()
        for kind, name, names in (("point", point, list(POINTS)), ("action", action, list(ACTIONS))):
            if name not in names:
                close = get_close_matches(name, names, n=1)
                hint = f"Did you mean {close[0]!r}?" if close else f"Expected one of: {', '.join(names)}."
                raise ConfigError(f"Found {VARIABLE}={text!r} with the unknown {kind} {name!r}. {hint}")
        return cls(point, action, file or "*", int(hit or 1))

    def __call__(self, name: str, path: Path, values: Iterable[Any]) -> None:
        """Count a hit, and cause the fault at the chosen one."""
        if name != self.point or not fnmatchcase(path.name, self.file):
            return
        self._hits += 1
        if self._hits != self.hit:
            return
        if self.action == "kill":
            # Windows has no SIGKILL, and ends a process at once for SIGTERM
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
        elif self.action == "nan":
            _fill(values, name)
        else:
            code = errno.ENOSPC if self.action == "full" else errno.EROFS
            raise OSError(code, os.strerror(code), str(path))


def point(name: str, path: str | Path, values: Iterable[Any] = ()) -> None:
    """Mark a commit point; does nothing unless a fault is configured.

    Args:
        name: Name in `POINTS`.
        path: File or folder that is written.
        values: Tensors or arrays that are about to be used; the action `nan` changes the first one in place.
    """
    if _handler is not None:
        _handler(name, Path(path), values)


def check_variable() -> None:
    """Parse the environment variable before the first point is reached.

    Raises:
        ConfigError: If it is malformed.
    """
    if os.environ.get(VARIABLE):
        Fault.parse(os.environ[VARIABLE])


@contextmanager
def handled_by(handler: Handler | None) -> Generator[None]:
    """Call a handler, such as a `Fault`, at every point inside the block."""
    global _handler
    before, _handler = _handler, handler
    try:
        yield
    finally:
        _handler = before


def _of_variable(name: str, path: Path, values: Iterable[Any]) -> None:
    """Handler until the first point: errors in the variable are raised where callers expect errors, not at import."""
    global _handler
    _handler = Fault.parse(os.environ[VARIABLE])
    _handler(name, path, values)


_handler: Handler | None = _of_variable if os.environ.get(VARIABLE) else None


def _fill(values: Iterable[Any], name: str) -> None:
    for value in values:
        tensor: Any = getattr(value, "data", value)
        if hasattr(tensor, "fill_"):
            if not tensor.is_floating_point():
                continue
            tensor.fill_(math.nan)
        else:
            value[...] = math.nan
        return
    raise ConfigError(f"Found the action nan for {name}, which passes no values. Choose another action.")
