"""Discovery of the attention and feed-forward layers of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from graftwork.errors import UnsupportedModelError
from graftwork.surgery import proof
from graftwork.surgery.families import REGISTRY, Family, FeedForwardLayout, Form, Stack
from graftwork.surgery.structure import activation_candidate, calls_interface, experts_candidate, layer_candidates

AttentionKind = Literal["self", "cross"]


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """One attention module of a model."""

    path: str
    """Path of the module, as in `named_modules`."""
    module: nn.Module
    stack: Stack
    layer: int
    """Layer number within its stack."""
    kind: AttentionKind

    @property
    def causal(self) -> bool:
        """True for causal attention, which is the self-attention of a decoder."""
        if self.kind == "cross":
            return False
        declared = getattr(self.module, "is_causal", None)
        return declared if isinstance(declared, bool) else self.stack == "decoder"


@dataclass(frozen=True, slots=True)
class FeedForwardSite:
    """One feed-forward layer of a model."""

    path: str
    """Path of the module, as in `named_modules`."""
    module: nn.Module
    stack: Stack
    layer: int
    """Layer number within its stack."""
    layout: FeedForwardLayout


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()`, with the types that torch does not declare."""
    return cast("Iterator[tuple[str, nn.Module]]", model.named_modules())


def pretrained(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside `model`, which may be wrapped by PEFT.

    Raises:
        UnsupportedModelError: If there is none.
    """
    if isinstance(model, PreTrainedModel):
        return model
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise UnsupportedModelError(
        f"Found {type(model).__name__}, which holds no transformers model. "
        "Pass a PreTrainedModel, bare or wrapped by PEFT."
    )


def is_classifier(model: nn.Module) -> bool:
    """True if a model has a sequence classification head."""
    return type(pretrained(model)).__name__.endswith("ForSequenceClassification")


def family_of(model: nn.Module) -> Family:
    """Return the family of a model: a registered one, or what the structure of the model shows."""
    inner = pretrained(model)
    model_type = str(inner.config.model_type)
    if model_type in REGISTRY:
        return REGISTRY.get(model_type)
    attentions = [module for _, module in named_modules(inner) if _is_attention(module)]
    causal = any(getattr(module, "is_causal", False) is True for module in attentions)
    # attention that does not call the interface declares nothing
    causal = causal or (not attentions and any(mark in type(inner).__name__ for mark in ("CausalLM", "LMHead")))
    return Family(
        model_type,
        "decoder" if causal and not inner.config.is_encoder_decoder else "encoder",
        attention=tuple(dict.fromkeys(type(module).__name__ for module in attentions)),
        cross_attention=_CROSS,
        position_bias=any(hasattr(module, "relative_attention_bias") for module in attentions),
    )


def attention_sites(model: nn.Module) -> tuple[AttentionSite, ...]:
    """Attention modules of a model that call transformers' attention interface, in the order of `named_modules`."""
    family = family_of(model)
    found: list[AttentionSite] = []
    for path, module in named_modules(model):
        if type(module).__name__ in family.attention and _is_attention(module):
            stack, layer = _position(path, family)
            kind: AttentionKind = "cross" if _is_cross(path, module, family) else "self"
            found.append(AttentionSite(path, module, stack, layer, kind))
    return tuple(found)


def check_interface_use(model: nn.Module, method: str) -> None:
    """Raise if no attention module of a model calls transformers' attention interface.

    Raises:
        UnsupportedModelError: If none does, as in Bloom, DeBERTa-v2, MPNet and Falcon.
    """
    if not attention_sites(model):
        raise UnsupportedModelError(
            f"{method} cannot change the attention of {type(pretrained(model)).__name__}: it does not call the "
            "attention interface of transformers. Expected a model whose attention can be chosen by "
            "attn_implementation. Nothing was changed."
        )


def feed_forward_sites(
    model: nn.Module, forms: tuple[Form, ...] = ("layer", "activation", "experts")
) -> tuple[FeedForwardSite, ...]:
    """Feed-forward layers of a model, in the order of `named_modules`.

    Layers of registered families are found by class name, all others by structure; those are proven on random input, at
    most once per module. Layers that a method has replaced are matched by `original_class`, the name of the class that
    they replace.

    Args:
        model: A model.
        forms: Forms of layouts to return.
    """
    return tuple(site for site in _feed_forwards(model, forms)[0] if site.layout.form in forms)


def unproven_feed_forwards(model: nn.Module) -> Mapping[str, str]:
    """Paths of modules that look like feed-forward layers but compute something else, with the reason."""
    return _feed_forwards(model, ("layer", "activation", "experts"))[1]


def _feed_forwards(model: nn.Module, forms: tuple[Form, ...]) -> tuple[list[FeedForwardSite], dict[str, str]]:
    family = family_of(model)
    layouts = {layout.class_name: layout for layout in family.feed_forward}
    found: dict[str, FeedForwardSite] = {}
    weak: dict[str, tuple[nn.Module, FeedForwardLayout]] = {}
    reasons: dict[str, str] = {}
    for path, module in named_modules(model):
        stack, layer = _position(path, family)
        layout = layouts.get(getattr(module, "original_class", type(module).__name__))
        # modules outside numbered layers, such as heads and poolers, are no feed-forward layers
        if layout is None and not layouts and any(part.isdigit() for part in path.split(".")):
            layout = _proven(module, path, reasons)
            if layout is None and "activation" in forms and (candidate := activation_candidate(module)) is not None:
                weak[path] = (module, candidate)
        if layout is not None:
            found[path] = FeedForwardSite(path, module, stack, layer, layout)
    inside = tuple(f"{path}." for path in found)
    weak = {path: each for path, each in weak.items() if not path.startswith(inside)}
    for path, proven in _proven_activations(model, weak).items():
        found[path] = FeedForwardSite(path, weak[path][0], *_position(path, family), proven)
        reasons.pop(path, None)
    order = [path for path, _ in named_modules(model) if path in found]
    return [found[path] for path in order], reasons


_LAYOUTS: WeakKeyDictionary[nn.Module, FeedForwardLayout | str] = WeakKeyDictionary()
"""Proven layout of a module, or the reason why it has none; an empty string if nothing resembles a layout."""


def _proven(module: nn.Module, path: str, reasons: dict[str, str]) -> FeedForwardLayout | None:
    """Proven layout of a layer or of experts, from the cache if the module has been compared before."""
    if module not in _LAYOUTS:
        _LAYOUTS[module] = _prove(module)
    found = _LAYOUTS[module]
    if isinstance(found, str):
        if found:
            reasons[path] = found
        return None
    return found


def _prove(module: nn.Module) -> FeedForwardLayout | str:
    for override in cast("Mapping[str, Any]", module.__dict__).values():
        # a copy of a converted model: the layout was proven before the conversion
        if isinstance(layout := getattr(override, "proven_layout", None), FeedForwardLayout):
            return layout
    reason = ""
    experts = experts_candidate(module)
    candidates = layer_candidates(module) if experts is None else (experts,)
    for candidate in candidates:
        if not proof.is_computable(module):
            return candidate
        try:
            return (proof.prove_layer if candidate.form == "layer" else proof.prove_experts)(module, candidate)
        except proof.MismatchError as error:
            reason = reason or str(error)
    return reason


def _proven_activations(
    model: nn.Module, weak: Mapping[str, tuple[nn.Module, FeedForwardLayout]]
) -> dict[str, FeedForwardLayout]:
    """Layouts of activations between two projections, from one forward pass over those not compared before."""
    unknown = [each for each in weak.values() if each[0] not in _ACTIVATIONS]
    if unknown:
        inner = pretrained(model)
        proven: list[FeedForwardLayout | None] = [layout for _, layout in unknown]
        if proof.is_computable(inner):
            try:
                proven = proof.prove_activations(inner, unknown)
            except proof.MismatchError:
                proven = [None] * len(unknown)
        _ACTIVATIONS.update(zip((module for module, _ in unknown), proven, strict=True))
    found = ((path, _ACTIVATIONS[module]) for path, (module, _) in weak.items())
    return {path: layout for path, layout in found if layout is not None}


_ACTIVATIONS: WeakKeyDictionary[nn.Module, FeedForwardLayout | None] = WeakKeyDictionary()
"""Proven layout of a module that applies an activation between two projections, or None."""
_CROSS = ("crossattention", "encoder_attn", "EncDecAttention", "cross_attn", "cross_attention", "encoder_attention")
"""Path components that mark cross-attention in families that are not registered."""


def _is_attention(module: nn.Module) -> bool:
    # models name the interface too, to choose an implementation
    return not isinstance(module, PreTrainedModel) and calls_interface(type(module)) and hasattr(module, "config")


def _is_cross(path: str, module: nn.Module, family: Family) -> bool:
    if getattr(module, "is_cross_attention", False) is True:
        return True
    parts = path.split(".")
    return any(mark in parts for mark in family.cross_attention)


def head_shape(module: nn.Module) -> tuple[int, int]:
    """Number of query heads of an attention module, and width of one head.

    Raises:
        UnsupportedModelError: If neither the module nor its config has them as attributes.
    """
    config: Any = getattr(module, "config", None)
    heads = _first_number((module, config), ("num_attention_heads", "num_heads", "n_heads", "n_head"))
    width = _first_number((module,), ("attention_head_size", "head_dim", "head_size", "key_value_proj_dim"))
    if heads is not None and width is None:
        hidden = _first_number((module, config), ("dim", "embed_dim", "hidden_size"))
        width = None if hidden is None else hidden // heads
    if heads is None or width is None:
        raise UnsupportedModelError(
            f"Found no number of heads or head width in {type(module).__name__}. Expected attributes such as "
            "num_heads and head_dim. Nothing was changed."
        )
    return heads, width


def group_count(module: nn.Module, heads: int) -> int:
    """Number of key-value heads of an attention module with `heads` query heads."""
    config: Any = getattr(module, "config", None)
    repeats = _first_number((module,), ("num_key_value_groups",))
    if repeats is not None:
        return heads // repeats
    return _first_number((module, config), ("num_key_value_heads", "num_kv_heads")) or heads


def _first_number(objects: tuple[Any, ...], names: tuple[str, ...]) -> int | None:
    """First attribute that is an integer, by object and then by name."""
    for each in objects:
        for name in names:
            if isinstance(value := getattr(each, name, None), int):
                return value
    return None


def _position(path: str, family: Family) -> tuple[Stack, int]:
    """Stack and layer number of a module path such as `decoder.block.3.layer.2.DenseReluDense`."""
    parts = path.split(".")
    stack = family.default_stack
    if "decoder" in parts:
        stack = "decoder"
    elif "encoder" in parts:
        stack = "encoder"
    numbers = [int(part) for part in parts if part.isdigit()]
    return stack, numbers[0] if numbers else 0
