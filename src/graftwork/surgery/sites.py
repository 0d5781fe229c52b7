"""Discovery of the attention and feed-forward layers of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import nn
from transformers import PreTrainedModel

from graftwork.errors import UnsupportedModelError
from graftwork.surgery.families import FAMILIES, Family, FeedForwardLayout, Stack

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
        return self.stack == "decoder" and self.kind == "self"


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
    """Return the family of a model.

    Raises:
        UnsupportedModelError: If its `config.model_type` is not in `FAMILIES`.
    """
    inner = pretrained(model)
    model_type = inner.config.model_type
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"Found a {type(inner).__name__} of model type {model_type!r}, which Graftwork does not support. "
            f"Expected one of: {', '.join(sorted(FAMILIES))}. Nothing was changed."
        )
    return FAMILIES[model_type]


def attention_sites(model: nn.Module) -> tuple[AttentionSite, ...]:
    """Attention modules of a model, in the order of `named_modules`."""
    family = family_of(model)
    found: list[AttentionSite] = []
    for path, module in named_modules(model):
        if type(module).__name__ in family.attention:
            stack, layer = _position(path, family)
            parts = path.split(".")
            kind: AttentionKind = "cross" if any(mark in parts for mark in family.cross_attention) else "self"
            found.append(AttentionSite(path, module, stack, layer, kind))
    return tuple(found)


def feed_forward_sites(model: nn.Module) -> tuple[FeedForwardSite, ...]:
    """Feed-forward layers of a model, in the order of `named_modules`.

    Layers that a method has replaced are matched by `original_class`, the name of the class that they replace.
    """
    family = family_of(model)
    layouts = {layout.class_name: layout for layout in family.feed_forward}
    found: list[FeedForwardSite] = []
    for path, module in named_modules(model):
        layout = layouts.get(getattr(module, "original_class", type(module).__name__))
        if layout is not None:
            found.append(FeedForwardSite(path, module, *_position(path, family), layout))
    return tuple(found)


def head_shape(module: nn.Module) -> tuple[int, int]:
    """Number of query heads of an attention module, and width of one head.

    Raises:
        UnsupportedModelError: If neither the module nor its config has them as attributes.
    """
    config: Any = getattr(module, "config", None)
    heads = _first_number((module, config), ("num_attention_heads", "num_heads", "n_heads", "n_head"))
    width = _first_number((module,), ("attention_head_size", "head_dim", "key_value_proj_dim"))
    if heads is not None and width is None:
        hidden = _first_number((module, config), ("dim", "embed_dim", "hidden_size"))
        width = None if hidden is None else hidden // heads
    if heads is None or width is None:
        raise UnsupportedModelError(
            f"Found no number of heads or head width in {type(module).__name__}. Expected attributes such as "
            "num_heads and head_dim. Nothing was changed."
        )
    return heads, width


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
