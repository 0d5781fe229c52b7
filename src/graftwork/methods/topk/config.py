"""Settings of top-k layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from graftwork.errors import ConfigError

Selection = Literal["score", "gate", "abs_act", "product"]


@dataclass(frozen=True)
class TopKConfig:
    """Number of scores kept, and the layers in which they are kept."""

    feed_forward_k: int | float | None = None
    """Hidden units kept per token in feed-forward layers: a number, or a share of the width above 0 and up to 1.0. A
    small share suits trained ReLU layers (published: 256 of 3,072 for T5-base); gated layers need a larger one. null
    keeps all units."""
    attention_k: int | None = None
    """Keys kept per query in attention. Suits long inputs on a CPU and studies of sparsity; SDPA needs no more memory.
    null keeps all keys."""
    selection: Selection | None = None
    """Score by which hidden units are ranked: score (pre-activation; the default of plain layers), gate (cheapest in
    gated layers: up is computed for kept units only), abs_act (magnitude of the activation), product (|activation ×
    up|; the default of gated layers, and the most accurate there)."""
    feed_forward_chunk_size: int | None = None
    """Tokens scored at once in feed-forward layers; changes memory, never the result. Lower it if memory runs out; null
    chooses it from the width. With feed_forward_k null, layers stay dense and recompute activations in the backward
    pass."""
    attention_chunk_size: int | None = None
    """Queries scored at once in attention; changes memory, never the result. Lower it if memory runs out; null chooses
    it from the length. With attention_k null, attention stays dense and recomputes scores in the backward pass."""
    stacks: tuple[Literal["encoder", "decoder"], ...] = ("encoder", "decoder")
    """Stacks to change; name one to leave the other dense."""
    layers: str | None = None
    """Layer numbers to change in each stack, from 0, such as "0-3,7"; null changes every layer."""
    attention_kinds: tuple[Literal["self", "cross"], ...] = ("self", "cross")
    """Kinds of attention to change; for encoder–decoders."""
    feed_forward_dropout: bool = True
    """Drop hidden activations of feed-forward layers in training, as the dense layer does. Switch it off to reproduce
    runs of the authors' code with --no_ff_dropout."""

    def __post_init__(self) -> None:
        """Check the values.

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
        """True if feed-forward layers are changed."""
        return self.feed_forward_k is not None or self.feed_forward_chunk_size is not None

    @property
    def changes_attention(self) -> bool:
        """True if attention is changed."""
        return self.attention_k is not None or self.attention_chunk_size is not None

    def units(self, width: int) -> int | None:
        """Number of hidden units kept in a layer of the given width; None for all."""
        k = self.feed_forward_k
        if k is None:
            return None
        return min(width, max(1, round(k * width)) if isinstance(k, float) else k)
