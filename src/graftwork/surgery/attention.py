"""The attention seam: an attention function and a mask function, registered with transformers under one name.

Every attention module that a method changes gets a child module, `graftwork_attention`, that computes its attention.
Learned parameters of a method belong to that child, so they are saved, moved and counted with the model. All other
attention modules keep the attention function and the mask that they had; see `graftwork.surgery.untouched`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, Protocol, TypedDict, Unpack, cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from graftwork.errors import UnsupportedModelError
from graftwork.surgery import proof
from graftwork.surgery.arguments import OPTIONS, check_interface, refuse_unsupported
from graftwork.surgery.attention_proof import MaterialisedAttention
from graftwork.surgery.families import REGISTRY
from graftwork.surgery.masks import LazyMask, MaskPredicate, MaskRequest, PositionBias
from graftwork.surgery.modules import (
    GRAFT,
    SEAM,
    UndoStep,
    add_module,
    add_pre_hook,
    children_of,
    exchange_module,
    override,
    undo_steps,
)
from graftwork.surgery.position_bias import share_position_bias
from graftwork.surgery.sites import AttentionSite, attention_sites, family_of, named_modules, pretrained
from graftwork.surgery.tracing import refuse_trace, tracing
from graftwork.surgery.untouched import config_view, pass_original_masks

NAME = "graftwork"
"""Value of `config._attn_implementation` in a converted model."""


class AttentionOptions(TypedDict):
    """Keyword arguments of every call of an `AttentionGraft`."""

    scaling: float
    """Factor of the scores q·k; 1 for T5, usually width^-0.5."""
    dropout: float
    """Probability of dropping an attention weight; 0 outside training."""
    position_bias: PositionBias | Tensor | None
    """T5's additive bias, by distance or as a tensor [batch or 1, heads, queries, keys]; None for other families."""
    softcap: NotRequired[float]
    """Scores z become softcap·tanh(z/softcap) before biases and masks (Gemma 2); only for grafts that support it."""
    sinks: NotRequired[Float[Tensor, " heads"]]
    """Learned score per head of a key without a value (gpt-oss); only for grafts that support it."""


class AttentionGraft(Protocol):
    """Computation of one attention module of a converted model, registered by `graft_attention`.

    Every graft is an `nn.Module` with this forward; the attention function calls it between the projections of the
    attention module, which stay outside. A graft that accepts `softcap` or `sinks` names them in its attribute
    `supports`, a frozenset; a model that uses an option without support is refused at conversion. A graft with the
    attribute `keeps_state` receives the keys of new tokens only, under a mask for all of them.
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

    All other attention modules of the model keep their attention function and their masks. Padding, causality, caches
    and other mask patterns of transformers reach a graft as a `LazyMask`, never as a tensor of queries × keys. A T5
    position bias reaches it as a `PositionBias` if all modules that share the bias are grafted, otherwise as the dense
    tensor that the other modules need anyway.

    Args:
        model: The model, changed in place.
        method: Name of the method; `undo` reverts the change by this name.
        grafts: Path of an attention module → module that computes its attention, an `nn.Module`.

    Raises:
        UnsupportedModelError: If a module ignores registered attention functions, or passes an argument to them that
            its graft does not support; the model is left unchanged.
    """
    inner = pretrained(model)
    sites = attention_sites(model)
    chosen = [site for site in sites if site.path in grafts]
    for site in chosen:
        check_interface(site.path, site.module, method, supported_options(grafts[site.path]))
    holders = [module for module in inner.modules() if isinstance(module, PreTrainedModel)]
    supports: list[bool] = [cast(Any, holder)._can_set_attn_implementation() for holder in holders]
    if not chosen or not all(supports):
        raise UnsupportedModelError(
            f"{method} cannot change the attention of {type(inner).__name__}: the model ignores registered attention "
            "functions. Leave its attention dense, or choose a model whose attention can be replaced. "
            "Nothing was changed."
        )
    proving = str(inner.config.model_type) not in REGISTRY and proof.is_computable(inner)
    left = family_of(model).default_stack == "decoder"
    try:
        expected = proof.outputs(inner, left=left) if proving else None
        _open_seam(model, sites, chosen)
        for site in chosen:
            graft = MaterialisedAttention() if proving else cast(nn.Module, grafts[site.path])
            add_module(model, method, site.module, GRAFT, graft)
            override(model, method, site.module, "config", _config(site.module))
        share_position_bias(model, method, sites, chosen)
        if expected is not None:
            proof.compare(proof.outputs(inner, left=left), expected, "dense attention through the interface differs")
            for site in chosen:
                exchange_module(model, site.module, GRAFT, cast(nn.Module, grafts[site.path]))
    except proof.MismatchError as error:
        raise UnsupportedModelError(
            f"{method} cannot change the attention of {type(inner).__name__}: a comparison with the dense model failed "
            f"({error}). Leave its attention dense, or choose another model. Nothing was changed."
        ) from None


def seam_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Grafts of a model, by the path of their attention module."""
    return {
        path: child for path, module in named_modules(model) if (child := children_of(module).get(GRAFT)) is not None
    }


def supported_options(graft: object) -> frozenset[str]:
    """Names of the optional entries of `AttentionOptions` that a graft supports: its attribute `supports`."""
    return getattr(graft, "supports", frozenset())


def attention_function(
    module: nn.Module,
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch groups keys width"],
    value: Float[Tensor, "batch groups keys value_width"],
    attention_mask: LazyMask | Shaped[Tensor, "batch 1 queries keys"] | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Float[Tensor, "batch_or_1 heads queries_or_1 columns"] | None = None,
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
        position_bias: T5's additive bias, dense or by distance; see `PositionBias.of`.
        is_causal: Causality without a mask; None reads it from the module.
        kwargs: Further arguments of the model; checked by `refuse_unsupported`.

    Returns:
        Attention output, and None in place of the attention weights.

    Raises:
        UnsupportedModelError: If the model passes an argument that the graft does not support.
    """
    graft = children_of(module).get(GRAFT)
    if graft is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} was reached by the attention function of graftwork, but holds no graft. Expected "
            "attention modules that graftwork.surgery.sites.attention_sites finds. Restore the model "
            "(graftwork.restore)."
        )
    refuse_trace(f"the attention of {type(module).__name__}")
    refuse_unsupported(module, kwargs, supported_options(graft))
    if attention_mask is None and query.shape[2] > 1:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", False)
        if causal:
            queries, keys = query.shape[2], key.shape[2]
            attention_mask = LazyMask(query.shape[0], queries, keys, causal=True, query_offset=keys - queries)
    stateful = bool(getattr(graft, "keeps_state", False))
    if isinstance(attention_mask, LazyMask) and attention_mask.keys != key.shape[2] and not stateful:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends to {key.shape[2]} keys under a mask for {attention_mask.keys}. "
            "Learned prefixes and other keys from outside the sequence cannot be combined with converted attention."
        )
    options: dict[str, Any] = {
        OPTIONS[name]: value for name, value in kwargs.items() if name in OPTIONS and value is not None
    }
    output: Tensor = graft(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
        position_bias=PositionBias.of(position_bias, query.shape[2], key.shape[2]),
        **options,
    )
    # [batch heads queries value_width] → [batch queries heads value_width]
    return output.transpose(1, 2).contiguous(), None


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
        kwargs: Arguments of other mask functions, stored for layers that keep theirs.
    """
    refuse_trace("a converted model")
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
        if not tracing(padding) and bool(padding.all()):
            padding = None
    arguments = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "use_vmap": use_vmap,
        **kwargs,
    }
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
        request=MaskRequest(arguments, {}),
    )


def _open_seam(model: nn.Module, sites: Sequence[AttentionSite], chosen: Sequence[AttentionSite]) -> None:
    """Create the masks of the chosen modules by `mask_function`, and give all other modules of their configurations
    the masks and the attention function that they had.
    """
    inner = pretrained(model)
    configs: dict[int, Any] = {id(config := _config(site.module)): config for site in chosen}
    if inner.config.is_encoder_decoder and any(site.stack == "decoder" for site in chosen):
        # `generate` prepares masks of static caches with the outermost configuration
        configs[id(inner.config)] = inner.config
    for config in configs.values():
        before: str | None = config._attn_implementation
        if before == NAME:
            continue
        for site in sites:
            if _config(site.module) is config:
                override(model, SEAM, site.module, "config", config_view(config, before))
                add_pre_hook(model, SEAM, site.module, pass_original_masks)
        undo_steps(model).append(UndoStep(SEAM, "attribute", config, "_attn_implementation_internal", before, NAME))
        config._attn_implementation_internal = NAME
    for holder in inner.modules():
        if isinstance(holder, PreTrainedModel) and "set_attn_implementation" not in holder.__dict__:
            override(model, SEAM, holder, "set_attn_implementation", _refuse_implementation)


def _refuse_implementation(*args: Any, **kwargs: Any) -> None:
    """Replacement for `set_attn_implementation` of a model with grafts.

    Raises:
        UnsupportedModelError: Always.
    """
    raise UnsupportedModelError(
        "Found set_attn_implementation on a model with converted attention, which it would switch off. Expected a "
        "dense model. Call graftwork.restore(model), set the implementation, and convert again: layers outside the "
        "selection keep it."
    )


def _config(module: Any) -> Any:
    """Configuration of a module, not its view."""
    return getattr(module.config, "viewed", module.config)


# registered at import, not at conversion, so that a pickled model finds the functions in a new process
AttentionInterface.register(NAME, attention_function)  # pyright: ignore[reportUnknownMemberType]
AttentionMaskInterface.register(NAME, mask_function)  # pyright: ignore[reportUnknownMemberType]
