"""Exceptions of Graftwork. Each message names what was found, what was expected, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class GraftworkError(Exception):
    """Base class of all errors that a user can cause and fix."""


class ConfigError(GraftworkError, ValueError):
    """A setting has an invalid value, or a key does not exist."""


class DataError(GraftworkError, ValueError):
    """A data file is not in its declared format; the message names the file and the line."""


class UnknownNameError(GraftworkError, LookupError):
    """No method, task, mixture, family or recipe is registered under the requested name."""

    def __init__(self, kind: str, name: str, available: Iterable[str]) -> None:
        names = sorted(available)
        close = get_close_matches(name, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        # hundreds of names would hide the suggestion, so long lists are replaced by the command that prints them
        shown = ", ".join(names) if len(names) <= 20 else f"{len(names)} names, see `graftwork list`"
        super().__init__(f"Unknown {kind} {name!r}.{hint} Available: {shown or 'none'}.")
        self.kind, self.name = kind, name

    def __reduce__(self) -> tuple[object, ...]:
        # Exception.__reduce__ would call __init__ with the finished message alone
        return (_rebuild, (type(self), str(self)))


class UnsupportedModelError(GraftworkError, TypeError):
    """A method cannot convert this model; the model is left unchanged."""


class NothingConvertedError(GraftworkError, ValueError):
    """A conversion would change no module."""


class OverlappingMethodsError(GraftworkError, ValueError):
    """Two methods would change the same module."""


class IncompleteRunError(GraftworkError, FileNotFoundError):
    """A run folder lacks a file that the requested stage needs."""


class StorageError(GraftworkError, OSError):
    """A file or folder cannot be read or written; the message names the path."""


class DiskFullError(StorageError):
    """The disk or the quota is full, or a file exceeds the permitted size."""


class ReadOnlyError(StorageError):
    """A file system or folder is read-only, or permission is missing."""


class CheckpointMismatchError(GraftworkError, RuntimeError):
    """A checkpoint does not match its manifest, or its outputs differ from those recorded."""


class NonFiniteError(GraftworkError, ArithmeticError):
    """Weights, a loss or a gradient are NaN or infinite."""


class MissingExtraError(GraftworkError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed, and this needs it. Run: pip install 'graftwork[{extra}]'.")


def _rebuild(cls: type[GraftworkError], message: str) -> GraftworkError:
    error = cls.__new__(cls)
    error.args = (message,)
    return error
