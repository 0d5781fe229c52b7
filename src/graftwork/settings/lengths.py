"""Lengths of inputs and targets, in tokens, and how many sequences a budget of tokens holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from graftwork.errors import ConfigError, UnknownNameError


class Lengths(NamedTuple):
    """The longest input and target, in tokens."""

    input: int
    target: int


PROFILES: Mapping[str, Lengths] = {
    "cos_e": Lengths(128, 96),
    "esnli": Lengths(512, 256),
    "movie_rationales": Lengths(2048, 512),
    "eraser_multi_rc": Lengths(1024, 512),
}
"""Length profiles of Narang et al. 2020; MNLI goes with esnli, IMDb and Amazon with movie_rationales."""


def apply_profile(settings: Any, input_field: str, target_field: str) -> None:
    """Give the length fields of a frozen configuration the numbers of its profile, where they have their defaults.

    Raises:
        UnknownNameError: If there is no such profile.
    """
    if settings.lengths is None:
        return
    if settings.lengths not in PROFILES:
        raise UnknownNameError("length profile", settings.lengths, PROFILES)
    for name, value in zip((input_field, target_field), PROFILES[settings.lengths], strict=True):
        if getattr(settings, name) == type(settings).__dataclass_fields__[name].default:
            object.__setattr__(settings, name, value)


def sequences_per_step(tokens: int, input: int, target: int, *, exact: bool = False) -> int:
    """How many sequences a budget of tokens holds, counting each at its longest side; at least one.

    Source: `tokens_per_batch` of `tensorflow/mesh`, which refuses a remainder.

    Args:
        tokens: Budget of one optimiser step.
        input: Longest input.
        target: Longest target.
        exact: Refuse a remainder.

    Raises:
        ConfigError: If there is a remainder and `exact` is on.
    """
    longest = max(input, target)
    if exact and tokens % longest:
        raise ConfigError(
            f"tokens_per_batch is {tokens}, which is no multiple of the longest side, {longest}. Expected a multiple; "
            "choose other lengths, or mode fixed, which rounds down."
        )
    return max(1, tokens // longest)
