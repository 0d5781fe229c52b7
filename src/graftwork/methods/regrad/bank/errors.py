"""Errors of gradient banks."""

from __future__ import annotations

from collections.abc import Sequence

from graftwork.errors import ConfigError, GraftworkError

_SHOWN = 5


class MissingGradientError(GraftworkError, LookupError):
    """A passage has no gradient in the bank."""

    def __init__(self, ids: Sequence[str]) -> None:
        super().__init__(f"Found no gradient for {listed(ids)}. Encode these passages, or skip missing ones.")
        self.ids = tuple(ids)


class BankCorruptionError(GraftworkError, RuntimeError):
    """Stored data fails a checksum, a digest or a count, or cannot be read."""

    def __init__(self, message: str, ids: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.ids = tuple(ids)


class FingerprintMismatchError(GraftworkError, ValueError):
    """The records are of another kind, or belong to another adapter state, model or corpus."""

    def __init__(self, field: str, found: str, expected: str) -> None:
        values = f"found {found}, expected {expected}"
        super().__init__(
            f"The bank contains records of another kind: {values}. A bank contains one kind; choose another bank."
            if field == "record"
            else f"The bank's records belong to another {field}: {values}. They are valid only where they were "
            "computed; build a bank for this model."
        )
        self.field = field


class BankLockedError(GraftworkError, RuntimeError):
    """Another writer holds the bank's lock."""


class BankUnreachableError(ConfigError):
    """The bank's object store does not respond, or denies access."""


class DuplicatePassageError(GraftworkError, ValueError):
    """The bank already contains this id with another text."""


def listed(ids: Sequence[str]) -> str:
    """Format ids for a message: the first few, and the number of others."""
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return ", ".join(map(repr, ids[:_SHOWN])) + more
