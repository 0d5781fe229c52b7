"""Every error that Graftwork raises on purpose: what was found, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class GraftworkError(Exception):
    """Root of all errors that a user can cause and mend."""


class ConfigError(GraftworkError, ValueError):
    """A setting has a value that it cannot have, or a key that does not exist."""


class DataError(GraftworkError, ValueError):
    """A data file cannot be read as what it claims to be; the message names the file and the line."""


class UnknownNameError(GraftworkError, LookupError):
    """A method, task, mixture, family or recipe that is not registered was asked for by name."""

    def __init__(self, kind: str, name: str, available: Iterable[str]) -> None:
        names = sorted(available)
        close = get_close_matches(name, names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        # a list of hundreds of names hides the suggestion, so long lists point at the command that prints them
        shown = ", ".join(names) if len(names) <= 20 else f"{len(names)} names, see `graftwork list`"
        super().__init__(f"Unknown {kind} {name!r}.{hint} Available: {shown or 'none'}.")
        self.kind, self.name = kind, name

    def __reduce__(self) -> tuple[object, ...]:
        # the default of Exception would call __init__ with the finished message alone
        return (_rebuild, (type(self), str(self)))


class UnsupportedModelError(GraftworkError, TypeError):
    """A method cannot change this model; the model is left as it was."""


class NothingConvertedError(GraftworkError, ValueError):
    """A conversion would change nothing, which is never what was asked for."""


class OverlappingMethodsError(GraftworkError, ValueError):
    """Two methods want to change the same module."""


class IncompleteRunError(GraftworkError, FileNotFoundError):
    """A run folder lacks a file that the asked stage needs."""


class CheckpointMismatchError(GraftworkError, RuntimeError):
    """A checkpoint does not hold what its manifest says, or computes something else than it did."""


class MissingExtraError(GraftworkError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed, and this needs it. Run: pip install 'graftwork[{extra}]'.")


def _rebuild(cls: type[GraftworkError], message: str) -> GraftworkError:
    error = cls.__new__(cls)
    error.args = (message,)
    return error
