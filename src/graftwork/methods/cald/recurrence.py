"""Causal linear attention as a module, and the cache layer with its recurrent state."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Unpack, cast

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, CacheLayerMixin

from graftwork.errors import UnsupportedModelError
from graftwork.methods.cald.causal import FeatureMaps, RecurrentState, causal_attention
from graftwork.methods.cald.config import CaldConfig
from graftwork.surgery.attention import AttentionOptions
from graftwork.surgery.masks import LazyMask, allowed_by
from graftwork.surgery.modules import GRAFT, children_of
from graftwork.surgery.precision import compute_dtype

FAR_WEIGHT = -5.5
"""Initial logarithm of the weight of a token before the window, if query and key are 0, relative to the best in it."""
GATE_BIAS = 6.0
"""Initial bias of the forget gate: a token keeps sigmoid(6) = 99.75 % of the state."""


class LinearAttention(nn.Module):
    """Causal attention with a recurrent state: softmax in a window, a feature map for all earlier tokens.

    An `AttentionGraft`. Generation uses a `RecurrentLayer` in place of the keys and values of all tokens.

    Args:
        config: Settings of the conversion.
        heads: Number of query heads of the layer.
        groups: Number of key-value heads.
        width: Width of a head's queries and keys.
        value_width: Width of its values; None for that of the keys.
        like: Parameter of the layer, of any shape, for device and dtype.
    """

    keeps_state: bool = True
    """The attention function accepts fewer keys than the mask has: the state contains the earlier ones."""

    replaced: bool = True
    """False for dense attention, before the turn of the layer in a stepwise replacement; caches are not used then."""

    def __init__(
        self, config: CaldConfig, heads: int, groups: int, width: int, value_width: int | None = None, *, like: Tensor
    ) -> None:
        super().__init__()
        self.feature_map, self.window = config.feature_map, config.window
        starts: dict[str, Tensor] = {}
        if config.feature_map != "elu":
            # identity: features of the scaled queries and keys themselves
            starts["query_map"] = torch.eye(width).repeat(heads, 1, 1)  # [heads width width]
            starts["key_map"] = torch.eye(width).repeat(groups, 1, 1)  # [groups width width]
        if config.feature_map == "gated":
            starts["gate"] = torch.zeros(groups, value_width or width)
            starts["gate_bias"] = torch.full((groups,), GATE_BIAS)
        if config.window is not None:
            # φ(0)·φ(0) is 2 / width for the softmax map and width for elu
            neutral = math.log(width if config.feature_map == "elu" else 2 / width)
            starts["balance"] = torch.full((heads,), FAR_WEIGHT - neutral)
        for name, start in starts.items():
            self.register_parameter(name, nn.Parameter(start.to(like)))
        # not registered: they belong to one call
        self.__dict__["layer"] = None
        self.__dict__["transfer"] = None

    @property
    def maps(self) -> FeatureMaps:
        """Parameters of the feature maps."""
        names = ("query_map", "key_map", "gate", "gate_bias", "balance")
        return FeatureMaps(*(getattr(self, name, None) for name in names))

    def forward(
        self,
        owner: nn.Module,
        query: Float[Tensor, "batch heads queries width"],
        key: Float[Tensor, "batch groups keys width"],
        value: Float[Tensor, "batch groups keys value_width"],
        mask: LazyMask | Shaped[Tensor, "batch 1 queries keys"] | None,
        **options: Unpack[AttentionOptions],
    ) -> Float[Tensor, "batch heads queries value_width"]:
        """Attend, and advance the state of the cache if there is one; `dropout` is ignored. See `AttentionGraft`.

        Raises:
            UnsupportedModelError: If the mask is neither causal nor that of packed sequences.
        """
        layer: RecurrentLayer | None = self.__dict__["layer"]
        self.__dict__["layer"] = None
        tokens = query.shape[2]
        padding = segments = None
        if isinstance(mask, LazyMask):
            if mask.predicate is not None:
                if layer is not None and layer.seen > tokens:
                    raise UnsupportedModelError(_OTHER_MASK)
                segments = mask.segments()
            if mask.padding is not None:
                # columns of the new tokens; a static cache has columns for later ones, too
                first = mask.query_offset - mask.key_offset
                padding = mask.padding[:, first : first + tokens]
        elif mask is not None:
            padding = _causal_padding(mask)
        errors: list[Tensor] | None = self.__dict__["transfer"]
        if not self.replaced:
            if layer is not None and layer.seen > tokens:
                raise UnsupportedModelError(
                    "Found generation with a cache during the stepwise replacement of layers. Expected whole texts. "
                    "Generate after the training, or set use_cache to false."
                )
            return dense_attention(query, key, value, options["scaling"], padding, segments)
        output, state = causal_attention(
            query,
            key,
            value,
            self.maps,
            scale=options["scaling"],
            window=self.window,
            padding=padding,
            segments=segments,
            state=None if layer is None or errors is not None else layer.state,
        )
        if errors is not None:
            dense = dense_attention(query, key, value, options["scaling"], padding, segments)
            errors.append(relative_error(output, dense, padding))
            return dense
        if layer is not None:
            layer.state = state
        return output

    def extra_repr(self) -> str:
        """Settings shown by `print(model)`."""
        return f"feature_map={self.feature_map}, window={self.window}"


@contextmanager
def transferring(model: nn.Module) -> Generator[list[Tensor]]:
    """Let all mixers pass dense attention outputs on, and collect their own relative errors.

    Args:
        model: Converted decoder.

    Returns:
        Context with a list, to which each forward pass appends the error of every converted layer, in order.
    """
    errors: list[Tensor] = []
    mixers = [each for each in model.modules() if isinstance(each, LinearAttention)]
    for mixer in mixers:
        mixer.__dict__["transfer"] = errors
    try:
        yield errors
    finally:
        for mixer in mixers:
            mixer.__dict__["transfer"] = None


def dense_attention(
    query: Float[Tensor, "batch heads tokens width"],
    key: Float[Tensor, "batch groups tokens width"],
    value: Float[Tensor, "batch groups tokens value_width"],
    scale: float,
    padding: Bool[Tensor, "batch tokens"] | None,
    segments: Int[Tensor, "batch tokens"] | None,
) -> Float[Tensor, "batch heads tokens value_width"]:
    """Compute the causal softmax attention that a mixer replaces.

    Args:
        query: Queries.
        key: Keys, not repeated for grouped queries.
        value: Values.
        scale: Factor on the scores.
        padding: True for real tokens; None if there is no padding.
        segments: Number of the packed sequence of each token; None for one per row.
    """
    mask = None
    if padding is not None or segments is not None:
        size = query.shape[2]
        mask = torch.ones(size, size, dtype=torch.bool, device=query.device).tril()[None, None]  # [1 1 tokens tokens]
        if padding is not None:
            mask = mask & padding[:, None, None]
        if segments is not None:
            mask = mask & (segments[:, None, :, None] == segments[:, None, None])
        # a row of padding may have nothing to attend to
        mask = mask | ~mask.any(-1, keepdim=True)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )


def relative_error(
    found: Float[Tensor, "batch heads tokens width"],
    expected: Float[Tensor, "batch heads tokens width"],
    padding: Bool[Tensor, "batch tokens"] | None,
) -> Float[Tensor, ""]:
    """Compute Σ ‖found − expected‖² / Σ ‖expected‖² over the real tokens, in at least float32."""
    dtype = compute_dtype(found.dtype)
    real = 1 if padding is None else padding[:, None, :, None].to(dtype)
    expected = expected.detach().to(dtype) * real
    return (found.to(dtype) * real - expected).square().sum() / expected.square().sum()


class RecurrentLayer(CacheLayerMixin):
    """Cache layer of one converted attention module: a `RecurrentState` in place of all keys and values.

    Source: `transformers.cache_utils`, the interface of cache layers.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.state: RecurrentState | None = None
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Mark the layer as used; the attention module creates the state.

        Args:
            key_states: New keys [batch groups new width].
            value_states: New values [batch groups new value_width].
        """
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Float[Tensor, "batch groups new width"], Float[Tensor, "batch groups new value_width"]]:
        """Count the new tokens, and return their keys and values only.

        Args:
            key_states: New keys [batch groups new width].
            value_states: New values [batch groups new value_width].
            args: Further arguments of other cache layers, ignored.
            kwargs: Likewise.
        """
        self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[2]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that a mask has, and 0: as for dense layers, which may share the mask."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of tokens so far."""
        return self.seen

    def get_max_length(self) -> int:
        """Return −1: there is no maximum."""
        return -1

    def reset(self) -> None:
        """Forget all tokens."""
        self.state, self.seen, self.is_initialized = None, 0, False

    def offload(self) -> None:
        """Keep the state on its device: it does not grow."""

    def prefetch(self) -> None:
        """Keep the state on its device."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows of the batch for beam search; `beam_idx` is [beams]."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select rows of the batch by their `indices` [rows]."""
        if self.state is not None:
            self.state = RecurrentState(
                *(each.index_select(0, indices.to(each.device)) for each in self.state.tensors())
            )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        if self.state is not None:
            self.state = RecurrentState(*(each.repeat_interleave(repeats, 0) for each in self.state.tensors()))

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to remove tokens.

        Raises:
            UnsupportedModelError: Always, because a sum cannot be undone.
        """
        raise UnsupportedModelError(
            "Found a generation strategy that removes tokens from the cache, as assisted generation does. A recurrent "
            "state cannot forget single tokens. Use greedy search, sampling or beam search."
        )

    def state_bytes(self) -> int:
        """Return the size of the state in bytes, which does not depend on the number of tokens."""
        return 0 if self.state is None else sum(each.nbytes for each in self.state.tensors())


def bind_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give the cache of a call a recurrent layer for this attention module; forward pre-hook of attention modules.

    Raises:
        UnsupportedModelError: If the cache contains keys that a dense layer has written.
    """
    graft = children_of(module).get(GRAFT)
    if not isinstance(graft, LinearAttention):
        return
    cache = next((each for each in (*args, *kwargs.values()) if isinstance(each, Cache)), None)
    graft.__dict__["layer"] = None if cache is None else recurrent_layer(cache, int(cast(Any, module).layer_idx))


def recurrent_layer(cache: Cache, number: int) -> RecurrentLayer:
    """Return the recurrent layer of a cache, which replaces an empty layer of another kind.

    Args:
        cache: Cache of a model.
        number: Number of the layer.

    Raises:
        UnsupportedModelError: If the cache contains keys that a dense layer has written.
    """
    layers: list[Any] = cache.layers
    created: Any = cache.layer_class_to_replicate
    while len(layers) <= number:
        layers.append(created())
    found = layers[number]
    if isinstance(found, RecurrentLayer):
        return found
    if found.is_initialized and int(found.get_seq_length()) > 0:
        raise UnsupportedModelError(
            f"Found a cache whose layer {number} contains keys of dense attention. Expected an empty cache, or one "
            "that the converted model has filled. Compute the prompt with the converted model."
        )
    layers[number] = RecurrentLayer()
    return layers[number]


_OTHER_MASK = (
    "Found a mask that is neither causal nor that of packed sequences. Expected a causal decoder: a recurrent state "
    "contains all earlier tokens and cannot exclude some of them for single queries."
)


def _causal_padding(mask: Tensor) -> Tensor:
    """Reduce a mask tensor [batch 1 queries keys] to the padding mask [batch keys]."""
    allowed = allowed_by(mask)[:, 0]  # [batch queries keys]
    queries, keys = allowed.shape[1:]
    padding = allowed[:, -1]
    triangle = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril(keys - queries)
    # padding may attend to anything
    expected, real = triangle & padding[:, None], padding[:, -queries:, None]
    if keys != queries or bool(((allowed != expected) & real).any()):
        raise UnsupportedModelError(_OTHER_MASK)
    return padding
