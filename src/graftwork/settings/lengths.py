"""Maximum lengths of inputs and targets in tokens, and the number of sequences that fit into a token budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field
from typing import Any, ClassVar, NamedTuple, Protocol

from graftwork.errors import ConfigError, UnknownNameError


class Lengths(NamedTuple):
    """Maximum length of input and target, in tokens."""

    input: int
    target: int


GENERAL = Lengths(512, 100)
"""Lengths of tasks that declare none."""

NEW_TOKENS = 19
"""Number of generated tokens of tasks that declare none; reproduces the published tables of UnifiedQA."""

PROFILES: Mapping[str, Lengths] = {
    "cos_e": Lengths(128, 96),
    "esnli": Lengths(512, 256),
    "movie_rationales": Lengths(2048, 512),
    "eraser_multi_rc": Lengths(1024, 512),
}
"""Length profiles of Narang et al. 2020; use esnli for MNLI, and movie_rationales for IMDb and Amazon."""


class HasLengths(Protocol):
    """A configuration dataclass with a length profile."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def lengths(self) -> str | None:
        """Name of the length profile."""
        ...


def apply_profile(settings: HasLengths, input_field: str, target_field: str) -> None:
    """Set the length fields of a frozen configuration from its profile, where they are null.

    Raises:
        UnknownNameError: If the profile does not exist.
    """
    if settings.lengths is None:
        return
    if settings.lengths not in PROFILES:
        raise UnknownNameError("length profile", settings.lengths, PROFILES)
    for name, value in zip((input_field, target_field), PROFILES[settings.lengths], strict=True):
        if getattr(settings, name) is None:
            object.__setattr__(settings, name, value)


def sequences_per_step(tokens: int, input: int, target: int, *, exact: bool = False) -> int:
    """Number of sequences in a token budget, max(1, ⌊tokens / max(input, target)⌋).

    Source: `tokens_per_batch` of `tensorflow/mesh`, which raises on a remainder.

    Args:
        tokens: Token budget of one optimiser step.
        input: Maximum input length.
        target: Maximum target length.
        exact: Raise on a remainder.

    Raises:
        ConfigError: If there is a remainder and `exact` is True.
    """
    longest = max(input, target)
    if exact and tokens % longest:
        raise ConfigError(
            f"tokens_per_batch is {tokens}, which is no multiple of the longest side, {longest}. Expected a multiple; "
            "choose other lengths, or mode fixed, which rounds down."
        )
    return max(1, tokens // longest)
