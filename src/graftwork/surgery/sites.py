"""Find the layers of a model that a method may change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from graftwork.errors import UnsupportedModelError
from graftwork.surgery.families import FAMILIES, Family, FeedForwardLayout

Stack = Literal["encoder", "decoder"]
AttentionKind = Literal["self", "cross"]


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """One attention module of a model."""

    path: str
    module: nn.Module
    stack: Stack
    layer: int
    kind: AttentionKind

    @property
    def causal(self) -> bool:
        """Whether queries see earlier tokens only: self-attention of a decoder."""
        return self.stack == "decoder" and self.kind == "self"


@dataclass(frozen=True, slots=True)
class FeedForwardSite:
    """One feed-forward layer of a model."""

    path: str
    module: nn.Module
    stack: Stack
    layer: int
    layout: FeedForwardLayout


def pretrained(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside `model`, which may be wrapped by PEFT.

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
    """Whether a model has a head that tells whole sequences apart by class."""
    return type(pretrained(model)).__name__.endswith("ForSequenceClassification")


def family_of(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        UnsupportedModelError: If its `config.model_type` is not in the table.
    """
    inner = pretrained(model)
    model_type = inner.config.model_type
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"Found a {type(inner).__name__} of model type {model_type!r}, which Graftwork does not know. "
            f"Expected one of: {', '.join(sorted(FAMILIES))}. Nothing was changed."
        )
    return FAMILIES[model_type]


def attention_sites(model: nn.Module) -> tuple[AttentionSite, ...]:
    """Every attention module of a model, in the order of `named_modules`."""
    family = family_of(model)
    found = []
    for path, module in model.named_modules():
        if type(module).__name__ in family.attention:
            stack, layer = _position(path, family)
            parts = path.split(".")
            kind: AttentionKind = "cross" if any(mark in parts for mark in family.cross_attention) else "self"
            found.append(AttentionSite(path, module, stack, layer, kind))
    return tuple(found)


def feed_forward_sites(model: nn.Module) -> tuple[FeedForwardSite, ...]:
    """Every feed-forward layer of a model, in the order of `named_modules`.

    Layers that a method has already replaced are found by the class that they stand for.
    """
    family = family_of(model)
    layouts = {layout.class_name: layout for layout in family.feed_forward}
    found = []
    for path, module in model.named_modules():
        layout = layouts.get(getattr(module, "stands_for", type(module).__name__))
        if layout is not None:
            found.append(FeedForwardSite(path, module, *_position(path, family), layout))
    return tuple(found)


def head_shape(module: nn.Module) -> tuple[int, int]:
    """Number of query heads of an attention module, and the width of one.

    Raises:
        UnsupportedModelError: If neither the module nor its config tells.
    """
    config: Any = getattr(module, "config", None)
    heads = _first_number((module, config), ("num_attention_heads", "num_heads", "n_heads", "n_head"))
    width = _first_number((module,), ("attention_head_size", "head_dim", "key_value_proj_dim"))
    if heads is not None and width is None:
        hidden = _first_number((module, config), ("dim", "embed_dim", "hidden_size"))
        width = None if hidden is None else hidden // heads
    if heads is None or width is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not tell its number of heads or their width. Expected attributes such as "
            "num_heads and head_dim. Nothing was changed."
        )
    return heads, width


def _first_number(places: tuple[Any, ...], names: tuple[str, ...]) -> int | None:
    for place in places:
        for name in names:
            if isinstance(getattr(place, name, None), int):
                return getattr(place, name)
    return None


def _position(path: str, family: Family) -> tuple[Stack, int]:
    """Stack and layer number, read off a module path such as `decoder.block.3.layer.2.DenseReluDense`."""
    parts = path.split(".")
    stack: Stack = "encoder" if family.default_stack == "encoder" else "decoder"
    if "decoder" in parts:
        stack = "decoder"
    elif "encoder" in parts:
        stack = "encoder"
    numbers = [int(part) for part in parts if part.isdigit()]
    return stack, numbers[0] if numbers else 0
