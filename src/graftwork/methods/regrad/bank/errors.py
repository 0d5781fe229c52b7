"""What can be wrong with a bank, or with what is asked of it."""

from __future__ import annotations

from collections.abc import Sequence

from graftwork.errors import ConfigError, GraftworkError

_SHOWN = 5


class MissingGradientError(GraftworkError, LookupError):
    """A passage has no gradient in the bank."""

    def __init__(self, ids: Sequence[str]) -> None:
        super().__init__(f"Found no gradient for {listed(ids)}. Encode these passages, or skip what is missing.")
        self.ids = tuple(ids)


class BankCorruptionError(GraftworkError, RuntimeError):
    """What is read is not what was written."""

    def __init__(self, message: str, ids: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.ids = tuple(ids)


class FingerprintMismatchError(GraftworkError, ValueError):
    """The records are of another kind, or were computed at another point, of another model, or from other texts."""

    def __init__(self, field: str, found: str, expected: str) -> None:
        values = f"found {found}, expected {expected}"
        super().__init__(
            f"The bank holds another kind of {field}: {values}. Each kind has banks of its own; name another bank."
            if field == "record"
            else f"The bank's records belong to another {field}: {values}. They are valid only where they were "
            "computed; build a bank for this model."
        )
        self.field = field


class BankLockedError(GraftworkError, RuntimeError):
    """Somebody else is writing to the bank."""


class BankUnreachableError(ConfigError):
    """The store that a bank is kept in does not answer, or refuses to."""


class DuplicatePassageError(GraftworkError, ValueError):
    """An id stands for another text already."""


def listed(ids: Sequence[str]) -> str:
    """Ids in a message: the first few, and how many more."""
    more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    return ", ".join(map(repr, ids[:_SHOWN])) + more
