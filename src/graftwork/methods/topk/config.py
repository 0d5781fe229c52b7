"""The settings of top-k layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from graftwork.errors import ConfigError

Selection = Literal["score", "gate", "abs_act", "product"]


@dataclass(frozen=True)
class TopKConfig:
    """Which layers keep how many scores."""

    feed_forward_k: int | float | None = None
    """Hidden units kept per token in feed-forward layers: a number, or a share of the width above 0 and up to 1.0; null
    leaves all units."""
    attention_k: int | None = None
    """Keys kept per query in attention; null leaves all keys."""
    selection: Selection | None = None
    """What hidden units are ranked by: score (the default of plain layers), gate, abs_act (the activation without its
    sign), product (the default of gated layers: activation × up, without sign)."""
    feed_forward_chunk_size: int | None = None
    """Tokens scored at once in feed-forward layers; changes memory, never the result. null chooses by width. With
    feed_forward_k null it makes layers recompute instead of store."""
    attention_chunk_size: int | None = None
    """Queries scored at once in attention; changes memory, never the result. null chooses by length. With attention_k
    null it makes attention recompute instead of store."""
    stacks: tuple[Literal["encoder", "decoder"], ...] = ("encoder", "decoder")
    """Stacks to change."""
    layers: str | None = None
    """Layer numbers to change in each stack, from 0, such as "0-3,7"; null changes every layer."""
    attention_kinds: tuple[Literal["self", "cross"], ...] = ("self", "cross")
    """Kinds of attention to change."""
    feed_forward_dropout: bool = True
    """Drop hidden activations of feed-forward layers in training, as the dense layer does."""

    def __post_init__(self) -> None:
        """Refuse impossible values.

        Raises:
            ConfigError: If a value is out of range, or if nothing would be changed.
        """
        k = self.feed_forward_k
        if isinstance(k, float) and not 0.0 < k <= 1.0:
            raise ConfigError(
                f"feed_forward_k is {k}. Expected a whole number from 1, a share above 0 and up to 1.0, or null for "
                "off."
            )
        for name in ("feed_forward_k", "attention_k", "feed_forward_chunk_size", "attention_chunk_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or (value is not None and not isinstance(value, float) and value < 1):
                raise ConfigError(
                    f"{name} is {value}. Expected a whole number from 1; to switch it off, leave it out or set it to "
                    "null."
                )
        if not self.stacks or not self.attention_kinds:
            raise ConfigError(
                "stacks or attention_kinds is empty, so nothing would change. Name at least one, or leave it out."
            )
        from graftwork.surgery.layers import parse_layers

        parse_layers(self.layers, "layers")

    @property
    def changes_feed_forward(self) -> bool:
        """Whether feed-forward layers are to be changed."""
        return self.feed_forward_k is not None or self.feed_forward_chunk_size is not None

    @property
    def changes_attention(self) -> bool:
        """Whether attention is to be changed."""
        return self.attention_k is not None or self.attention_chunk_size is not None

    def units(self, width: int) -> int | None:
        """Hidden units to keep in a layer of the given width; None for all."""
        k = self.feed_forward_k
        if k is None:
            return None
        return min(width, max(1, round(k * width)) if isinstance(k, float) else k)
