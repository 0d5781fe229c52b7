"""Panics of Rust libraries as ordinary exceptions."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from graftwork.errors import GraftworkError


class NativePanicError(GraftworkError, RuntimeError):
    """A Rust library stopped with a panic."""


def is_panic(error: BaseException) -> bool:
    """Return True for a panic of a Rust extension; each extension has its own subclass of BaseException for it."""
    return type(error).__name__ == "PanicException"


def first_line(error: BaseException) -> str:
    """First line of an error's text, shortened for a one-line message."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


@contextmanager
def panics_as_errors(path: str | Path) -> Generator[None]:
    """Raise a panic of a Rust library as `NativePanicError`.

    Args:
        path: File or folder that the library works on, for the message.

    Raises:
        NativePanicError: If the library panics.
    """
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        if not is_panic(error):
            raise
        raise NativePanicError(
            f"{path}: a library stopped with an internal error ({first_line(error)}). The files may be damaged or "
            "written by another version; restore or rebuild them."
        ) from error
