"""Attention modules that no method changes: the attention function and the mask function that they had.

A converted model creates its masks with a configuration whose attention implementation is `NAME`. Untouched attention
modules get a view of that configuration with the previous implementation, and a pre-hook that passes the mask of the
previous mask function, which is created once per forward pass.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

from torch import nn
from transformers import AttentionMaskInterface

from graftwork.surgery.masks import LazyMask
from graftwork.surgery.modules import GRAFT, children_of


def config_view(config: Any, implementation: str | None) -> Any:
    """Return a view of a configuration with another attention implementation.

    Every other attribute is shared: later changes of the configuration are visible through the view.

    Args:
        config: Configuration of a model.
        implementation: Value of `_attn_implementation` in the view.
    """
    view = object.__new__(_view_class(cast("type[Any]", type(config)), implementation))
    object.__setattr__(view, "__dict__", config.__dict__)
    object.__setattr__(view, "viewed", config)
    return view


@cache
def _view_class(cls: type[Any], implementation: str | None) -> type[Any]:
    def reduce(view: Any, protocol: object) -> tuple[Any, ...]:
        return config_view, (view.viewed, implementation)

    # a slot, because the dictionary is shared
    members = {
        "__slots__": ("viewed",),
        "__reduce_ex__": reduce,
        "_attn_implementation": property(lambda _: implementation),
    }
    return type(cls.__name__, (cls,), members)


def pass_original_masks(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Replace lazy masks by the masks of the previous mask function; forward pre-hook of attention modules.

    Modules with a graft keep the lazy mask.
    """
    if GRAFT in children_of(module) or not any(isinstance(value, LazyMask) for value in (*args, *kwargs.values())):
        return None
    config = cast(Any, module).config
    return (
        tuple(original_mask(value, config) for value in args),
        {name: original_mask(value, config) for name, value in kwargs.items()},
    )


def original_mask(mask: Any, config: Any) -> Any:
    """Mask that transformers would have created for a configuration; other values are returned unchanged.

    The result is stored on the lazy mask, so that all untouched layers of one forward pass share one mask.

    Args:
        mask: Value of an argument of an attention module.
        config: Configuration with the attention implementation of the module.
    """
    if not isinstance(mask, LazyMask) or mask.request is None:
        return mask
    implementation: str | None = config._attn_implementation
    masks = mask.request.masks
    if implementation not in masks:
        interface: Any = AttentionMaskInterface
        functions: dict[str, Any] = interface._global_mapping
        # transformers passes no mask to implementations without a mask function
        function = functions.get(implementation or "")
        arguments = {**mask.request.arguments, "config": config}
        masks[implementation] = None if function is None else function(**arguments)
    return masks[implementation]
