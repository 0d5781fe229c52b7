"""The attention seam: an attention function and a mask function, registered with transformers under one name.

Every attention module of a converted model gets a child module, `graftwork_attention`, that computes its attention: the
method's graft in the chosen layers, dense attention in all others. Learned parameters of a method belong to that child,
so they are saved, moved and counted with the model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, TypedDict, Unpack, cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import (
    sdpa_attention_forward,  # pyright: ignore[reportUnknownVariableType]
)
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
from transformers.utils import output_capturing

from graftwork.errors import UnsupportedModelError
from graftwork.surgery.masks import LazyMask, MaskPredicate, PositionBias
from graftwork.surgery.modules import GRAFT, SEAM, UndoStep, add_module, children_of, override, undo_steps
from graftwork.surgery.sites import AttentionSite, attention_sites, family_of, named_modules, pretrained

NAME = "graftwork"
"""Value of `config._attn_implementation` in a converted model."""

_UNSUPPORTED = {
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "cache": "a paged cache",
    "cu_seq_lens_q": "rows packed by cumulative lengths",
}


class AttentionOptions(TypedDict):
    """Keyword arguments of every call of an `AttentionGraft`."""

    scaling: float
    """Factor of the scores q·k; 1 for T5, usually width^-0.5."""
    dropout: float
    """Probability of dropping an attention weight; 0 outside training."""
    position_bias: PositionBias | Tensor | None
    """T5's additive bias, lazy or as a tensor [batch or 1, heads, queries, keys]; None for other families."""


class AttentionGraft(Protocol):
    """Computation of one attention module of a converted model, registered by `graft_attention`.

    Every graft is an `nn.Module` with this forward; the attention function calls it between the projections of the
    attention module, which stay outside.
    """

    def forward(
        self,
        owner: nn.Module,
        query: Float[Tensor, "batch heads queries width"],
        key: Float[Tensor, "batch groups keys width"],
        value: Float[Tensor, "batch groups keys value_width"],
        mask: LazyMask | Shaped[Tensor, "batch 1 queries keys"] | None,
        /,
        **options: Unpack[AttentionOptions],
    ) -> Float[Tensor, "batch heads queries value_width"]:
        """Attend from projected queries to projected keys.

        Args:
            owner: Attention module whose child this graft is.
            query: Projected queries [batch heads queries width].
            key: Projected keys [batch groups keys width]; keys of grouped queries are not repeated, and heads is a
                multiple of groups.
            value: Projected values [batch groups keys value_width].
            mask: Lazy mask of a model call; a tensor only if the caller built one, boolean or additive,
                [batch 1 queries keys]; None if every query attends to every key.
            options: See `AttentionOptions`.

        Returns:
            Attention output [batch heads queries value_width].
        """
        ...


def graft_attention(model: nn.Module, method: str, grafts: Mapping[str, AttentionGraft]) -> None:
    """Replace the attention computation of the attention modules at the given paths.

    All other attention modules of the model compute the same attention as before. Padding, causality, caches and other
    mask patterns of transformers reach a graft as a `LazyMask`, never as a tensor of queries × keys, and a T5 position
    bias as a `PositionBias`.

    Args:
        model: The model, changed in place.
        method: Name of the method; `undo` reverts the change by this name.
        grafts: Path of an attention module → module that computes its attention, an `nn.Module`.

    Raises:
        UnsupportedModelError: If the model ignores registered attention functions; it is left unchanged.
    """
    if not seam_modules(model):
        _open_seam(model, method)
    for path, graft in grafts.items():
        add_module(model, method, model.get_submodule(path), GRAFT, cast(nn.Module, graft))


def seam_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Grafts and dense attention modules behind the seam, by the path of their attention module."""
    return {
        path: child for path, module in named_modules(model) if (child := children_of(module).get(GRAFT)) is not None
    }


class DenseAttention(nn.Module):
    """Eager or SDPA attention, for the attention modules that no method changes.

    Args:
        implementation: Attention implementation of the loaded model; all but "eager" are computed by SDPA.
    """

    def __init__(self, implementation: str) -> None:
        super().__init__()
        self.implementation = implementation

    def forward(
        self,
        owner: nn.Module,
        query: Float[Tensor, "batch heads queries width"],
        key: Float[Tensor, "batch groups keys width"],
        value: Float[Tensor, "batch groups keys value_width"],
        mask: LazyMask | Shaped[Tensor, "batch 1 queries keys"] | None,
        **options: Unpack[AttentionOptions],
    ) -> Float[Tensor, "batch heads queries value_width"]:
        """Dense attention, with mask and position bias materialised. See `AttentionGraft`."""
        scaling, dropout, position_bias = options["scaling"], options["dropout"], options["position_bias"]
        if isinstance(mask, LazyMask):
            whole = mask.block(0, mask.queries, device=query.device)
            # [batch or 1, heads or 1, queries or 1, keys] → [… queries keys]
            mask = None if whole is None else whole.expand(-1, -1, query.shape[2], key.shape[2])
        if isinstance(position_bias, PositionBias):
            position_bias = position_bias.block(0, query.shape[2], key.shape[2])
        extra: dict[str, Any] = {} if position_bias is None else {"position_bias": position_bias}
        if self.implementation == "eager":
            module: Any = sys.modules[type(owner).__module__]
            eager = module.eager_attention_forward
            if mask is not None and mask.dtype == torch.bool:
                zero = torch.zeros((), dtype=query.dtype, device=query.device)
                mask = torch.where(mask, zero, torch.finfo(query.dtype).min)
            output, _ = eager(owner, query, key, value, mask, scaling=scaling, dropout=dropout, **extra)
        else:
            output, _ = sdpa_attention_forward(
                owner, query, key, value, mask, dropout, scaling, is_causal=False, **extra
            )
        return output.transpose(1, 2)  # [batch queries heads width] → [batch heads queries width]


def attention_function(
    module: nn.Module,
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch groups keys width"],
    value: Float[Tensor, "batch groups keys value_width"],
    attention_mask: LazyMask | Shaped[Tensor, "batch 1 queries keys"] | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: PositionBias | Float[Tensor, "batch_or_1 heads queries keys"] | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch queries heads value_width"], None]:
    """Attention function that transformers calls for every attention module of a converted model.

    Args:
        module: Attention module.
        query: Projected queries.
        key: Projected keys, not repeated for grouped queries.
        value: Projected values.
        attention_mask: Mask of `mask_function`, or a tensor from the caller, boolean or additive; None for no mask.
        scaling: Factor of the scores; None for width^-0.5.
        dropout: Probability of dropping an attention weight.
        position_bias: T5's additive bias.
        is_causal: Causality without a mask; None reads it from the module.
        kwargs: Further arguments of the model; checked by `refuse_unsupported`.

    Returns:
        Attention output, and None in place of the attention weights.

    Raises:
        UnsupportedModelError: If the model passes an argument that the seam does not implement.
    """
    refuse_unsupported(module, kwargs)
    if attention_mask is None and query.shape[2] > 1:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", False)
        if causal:
            queries, keys = query.shape[2], key.shape[2]
            attention_mask = LazyMask(query.shape[0], queries, keys, causal=True, query_offset=keys - queries)
    if isinstance(attention_mask, LazyMask) and attention_mask.keys != key.shape[2]:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends to {key.shape[2]} keys under a mask for {attention_mask.keys}. "
            "Learned prefixes and other keys from outside the sequence cannot be combined with converted attention."
        )
    graft: nn.Module = getattr(module, GRAFT)
    output: Tensor = graft(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
        position_bias=position_bias,
    )
    # [batch heads queries value_width] → [batch queries heads value_width]
    return output.transpose(1, 2).contiguous(), None


def refuse_unsupported(module: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Raise if the arguments of an attention call include a feature that converted attention does not implement.

    Raises:
        UnsupportedModelError: If they do; the message names the argument.
    """
    for name, feature in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} uses {feature} ({name}), which converted attention does not support. "
                "Run this model or this call unconverted (graftwork.restore)."
            )
    if _weights_requested(module, kwargs):
        raise UnsupportedModelError(
            f"Attention weights of {type(module).__name__} were requested (output_attentions), which converted "
            "attention never computes as a whole. Leave output_attentions off, or run this call unconverted "
            "(graftwork.restore)."
        )


def _weights_requested(module: nn.Module, kwargs: Mapping[str, Any]) -> bool:
    """True if attention weights were requested, for which transformers would silently return an empty tuple."""
    if kwargs.get("output_attentions") or getattr(_config(module), "output_attentions", False):
        return True
    # some models (gpt2) do not pass the argument down; the active output collector is checked instead
    collector = getattr(output_capturing, "_active_collector", None)
    if collector is None or torch.compiler.is_compiling():
        return False
    return any(key.endswith("attentions") for key in collector.get() or ())


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskPredicate = causal_mask_function,
    attention_mask: Shaped[Tensor, "batch keys"] | LazyMask | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> LazyMask:
    """Mask function that transformers calls for a converted model; returns a description instead of a tensor.

    Without a mask function under the same name, transformers passes no mask to the attention function, and padding is
    ignored.

    Args:
        batch_size: Number of rows.
        q_length: Number of queries.
        kv_length: Number of keys.
        q_offset: Absolute position of the first query (int or scalar tensor).
        kv_offset: Absolute position of the first key.
        mask_function: Predicate over (batch, head, query, key) positions.
        attention_mask: Padding mask, 1 or True for real tokens; a `LazyMask` is returned unchanged.
        use_vmap: True if the predicate must be vectorised by vmap.
        kwargs: Ignored.
    """
    if isinstance(attention_mask, LazyMask):
        return attention_mask
    padding, first = attention_mask, None
    if padding is not None:
        if kv_offset > 0:
            first = padding.int().argmax(1)
        padding = padding.bool()
        if (missing := kv_length + kv_offset - padding.shape[-1]) > 0:
            padding = torch.nn.functional.pad(padding, (0, missing))
        padding = padding[:, kv_offset : kv_offset + kv_length]
        # under tracing the values are unknown, so the padding mask is kept
        if not torch.compiler.is_compiling() and bool(padding.all()):
            padding = None
    plain = mask_function in (causal_mask_function, bidirectional_mask_function)
    return LazyMask(
        batch=batch_size,
        queries=q_length,
        keys=kv_length,
        causal=mask_function is causal_mask_function,
        query_offset=int(q_offset),
        key_offset=int(kv_offset),
        padding=padding,
        first=first,
        predicate=None if plain else mask_function,
        vectorised=use_vmap,
    )


class LazyPositionBias:
    """Replacement for `T5Attention.compute_bias` that returns a lazy `PositionBias` instead of a tensor."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner: Any = owner

    def __call__(
        self,
        query_length: int,
        key_length: int,
        device: torch.device | None = None,
        past_seen_tokens: int | Tensor = 0,
    ) -> PositionBias:
        """Describe the bias of new queries against all keys.

        Args:
            query_length: Number of new queries.
            key_length: Number of keys, which the description does not depend on.
            device: Device of the table.
            past_seen_tokens: Absolute position of the first query (int or scalar tensor).
        """
        owner = self.owner
        embedding = getattr(owner, "relative_attention_bias", None)
        if embedding is None:
            return PositionBias(None)
        buckets = owner.relative_attention_num_buckets
        # called as a module: under off-loading its weight is a placeholder
        table = embedding(torch.arange(buckets, device=device))  # [buckets heads]
        owner_class = cast(Any, type(owner))
        bucket_of: Callable[[Tensor], Tensor] = partial(
            owner_class._relative_position_bucket,
            bidirectional=not owner.is_decoder,
            num_buckets=buckets,
            max_distance=owner.relative_attention_max_distance,
        )
        return PositionBias(table, bucket_of, int(past_seen_tokens))


def _open_seam(model: nn.Module, method: str) -> None:
    """Route every attention module of the model through the seam, with its previous dense attention behind it."""
    inner = pretrained(model)
    sites = attention_sites(model)
    holders: list[Any] = [module for module in inner.modules() if isinstance(module, PreTrainedModel)]
    configs: dict[int, Any] = {id(config := _config(each)): config for each in (*holders, *(s.module for s in sites))}
    before: dict[int, str] = {key: config._attn_implementation for key, config in configs.items()}
    dense = {site.path: DenseAttention(before[id(_config(site.module))]) for site in sites}
    if all(holder._can_set_attn_implementation() for holder in holders):
        inner.set_attn_implementation(NAME)  # pyright: ignore[reportUnknownMemberType]
    # a model that ignores the setting only logs a message, so the configuration is checked
    if not sites or any(_config(site.module)._attn_implementation != NAME for site in sites):
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
        raise UnsupportedModelError(
            f"{method} cannot change the attention of {type(inner).__name__}: the model ignores registered attention "
            "functions. Leave its attention dense, or choose a model whose attention can be replaced. "
            "Nothing was changed."
        )
    for key, config in configs.items():
        undo_steps(model).append(UndoStep(SEAM, "attribute", config, "_attn_implementation_internal", before[key]))
    for site in sites:
        add_module(model, SEAM, site.module, GRAFT, dense[site.path])
    if family_of(model).position_bias:
        _make_position_bias_lazy(model, sites)


def _config(module: Any) -> Any:
    return module.config


def _make_position_bias_lazy(model: nn.Module, sites: tuple[AttentionSite, ...]) -> None:
    for site in sites:
        override(model, SEAM, site.module, "compute_bias", LazyPositionBias(site.module))
        if site.kind == "cross":
            # cross-attention has no bias; without this attribute transformers would build zeros [1 heads queries keys]
            override(model, SEAM, site.module, "has_relative_attention_bias", True)


# registered at import, not at conversion, so that a pickled model finds the functions in a new process
AttentionInterface.register(NAME, attention_function)  # pyright: ignore[reportUnknownMemberType]
AttentionMaskInterface.register(NAME, mask_function)  # pyright: ignore[reportUnknownMemberType]
