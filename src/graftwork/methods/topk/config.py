"""Settings of top-k layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from graftwork.errors import ConfigError
from graftwork.methods.topk.schedule import by_layer, kept_share, of_layer

Selection = Literal["score", "gate", "abs_act", "product"]


@dataclass(frozen=True)
class TopKConfig:
    """Number of scores kept, and the layers in which they are kept."""

    feed_forward_k: int | float | str | tuple[int | float | None, ...] | None = None
    """Hidden units kept per token in feed-forward layers: a number, or a share of the width above 0 and up to 1.0. A
    small share suits trained ReLU layers (published: 256 of 3,072 for T5-base); gated layers need a larger one. A list
    sets one per layer, and so do ranges such as "0-3:256,4-11:64"; layers with null or without a range stay dense.
    auto:0.95 chooses per layer from the first training examples: the smallest number that keeps 95 % of the activation
    mass. null keeps all units."""
    attention_k: int | str | tuple[int | None, ...] | None = None
    """Keys kept per query in attention. Suits long inputs on a CPU and studies of sparsity; SDPA needs no more memory.
    Lists, ranges and auto:0.95 (share of the attention weights) as in feed_forward_k. null keeps all keys."""
    attention_sinks: int | None = None
    """First tokens that every query keeps beside the k best. Set it to a few if quality drops on long inputs: decoders
    often put much weight there. Causal self-attention only; null keeps none."""
    attention_window: int | None = None
    """Most recent tokens, the query's own included, that every query keeps beside the k best. Set it if local context
    matters more than its scores show. Causal self-attention only; null keeps none."""
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
        for name in ("feed_forward_k", "attention_k"):
            value = getattr(self, name)
            kept_share(value, name)
            numbers = by_layer(value, name)
            if numbers is not None and all(number is None for number in numbers.values()):
                raise ConfigError(
                    f"{name} is {value!r}, which changes no layer. Set a number for one, or set it to null."
                )
            for number in (value,) if numbers is None else numbers.values():
                if not isinstance(number, str):
                    _check_number(name, number)
        for name in ("feed_forward_chunk_size", "attention_chunk_size", "attention_sinks", "attention_window"):
            _check_number(name, getattr(self, name))
            if name in ("attention_sinks", "attention_window") and getattr(self, name) and self.attention_k is None:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, but attention keeps all keys. Set attention_k too."
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

    @property
    def is_automatic(self) -> bool:
        """True if a k is `auto:…`, which examples decide."""
        return any(kept_share(getattr(self, name), name) for name in ("feed_forward_k", "attention_k"))

    def units(self, width: int, layer: int = 0) -> int | None:
        """Number of hidden units kept in a layer of the given width and number; None for all."""
        k = of_layer(self.feed_forward_k, layer, "feed_forward_k")
        if k is None:
            return None
        return min(width, max(1, round(k * width)) if isinstance(k, float) else k)

    def keys(self, layer: int) -> int | None:
        """Number of keys kept in the attention of a layer; None for all."""
        k = of_layer(self.attention_k, layer, "attention_k")
        return None if k is None else int(k)

    def changes_layer(self, field: str, layer: int) -> bool:
        """True if a list or a range of `feed_forward_k` or `attention_k` does not leave the layer out."""
        numbers = by_layer(getattr(self, field), field)
        chunk_size = getattr(self, field.removesuffix("_k") + "_chunk_size")
        return numbers is None or chunk_size is not None or numbers.get(layer) is not None


def _check_number(name: str, value: object) -> None:
    """Check one number of a setting.

    Raises:
        ConfigError: If it is out of range.
    """
    if isinstance(value, float):
        if name != "feed_forward_k" or not 0.0 < value <= 1.0:
            raise ConfigError(
                f"{name} is {value}. Expected a whole number from 1"
                f"{', a share above 0 and up to 1.0' if name == 'feed_forward_k' else ''}, or null for off."
            )
    elif isinstance(value, bool) or (isinstance(value, int) and value < 1):
        raise ConfigError(
            f"{name} is {value}. Expected a whole number from 1; to switch it off, leave it out or set it to null."
        )
