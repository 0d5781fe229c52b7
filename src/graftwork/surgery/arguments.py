"""Keyword arguments of attention functions: those that may be ignored, those that a graft supports, and the rest."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Collection, Mapping
from functools import cache
from operator import attrgetter
from types import FunctionType
from typing import Any, cast

from torch import nn
from transformers.utils import output_capturing

from graftwork.errors import UnsupportedModelError
from graftwork.surgery.tracing import tracing

OPTIONS: Mapping[str, str] = {"softcap": "softcap", "s_aux": "sinks"}
"""Arguments of attention functions that grafts may support, and their names in `AttentionOptions`."""

IGNORED = frozenset(
    {
        # arguments of every graft
        "module",
        "query",
        "key",
        "value",
        "attention_mask",
        "scaling",
        "dropout",
        "position_bias",
        "is_causal",
        # contained in the mask
        "sliding_window",
        "position_ids",
        "cache_position",
        "seq_idx",
        # of other attention implementations
        "deterministic",
        "max_length_q",
        "max_length_k",
        # of other parts of the model
        "use_cache",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "num_items_in_batch",
        "logits_to_keep",
        # refused by its value, see `refuse_unsupported`
        "output_attentions",
    }
)
"""Arguments that do not change the result of attention, or that reach a graft in another way."""

_FEATURES = {
    "softcap": "soft-capped scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "cache": "a paged cache",
    "cu_seq_lens_q": "rows packed by cumulative lengths",
    "cu_seq_lens_k": "rows packed by cumulative lengths",
    "indices": "keys selected by an indexer",
    "block_indices": "key blocks selected by an indexer",
}
_UNKNOWN = object()


def check_interface(path: str, module: nn.Module, method: str, supported: Collection[str]) -> None:
    """Check before a conversion that an attention module calls the attention interface with supported arguments only.

    Args:
        path: Path of the module, for the message.
        module: Attention module.
        method: Name of the method, for the message.
        supported: Names in `AttentionOptions` that the graft supports.

    Raises:
        UnsupportedModelError: If the module does not call the interface, or passes an argument that changes the result
            and is not supported.
    """
    passed = interface_arguments(type(module))
    if passed is None:
        raise UnsupportedModelError(
            f"{method} cannot change the attention of {path}: {type(module).__name__} ignores registered attention "
            "functions. Leave its attention dense, or choose a model whose attention can be replaced. "
            "Nothing was changed."
        )
    for name, expression in passed.items():
        if name in IGNORED or OPTIONS.get(name, name) in supported or _value(module, expression) is None:
            continue
        raise UnsupportedModelError(
            f"{method} cannot change the attention of {path}: {type(module).__name__} uses "
            f"{_FEATURES.get(name, 'an unknown argument of its attention function')} ({name}={expression}). "
            "Leave this layer dense (setting layers), or choose another model. Nothing was changed."
        )


@cache
def interface_arguments(cls: type[nn.Module]) -> Mapping[str, str] | None:
    """Keyword arguments that a class passes to the attention function of transformers' attention interface.

    Returns:
        Expression of each argument; None if no method of the class calls the interface.
    """
    passed: dict[str, str] | None = None
    for function in _functions(cls):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):
            continue
        nodes = list(ast.walk(tree))
        names = {
            target.id
            for node in nodes
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and "ALL_ATTENTION_FUNCTIONS" in ast.unparse(node)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }
        for node in nodes:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
                passed = passed or {}
                passed |= {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg is not None}
    return passed


def _functions(cls: type[nn.Module]) -> list[FunctionType]:
    """Methods of a class and of its bases below `nn.Module`; overridden ones are omitted."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base is not nn.Module and issubclass(base, nn.Module):
            found |= vars(base)
    return [inspect.unwrap(value) for value in found.values() if isinstance(value, FunctionType)]


def _value(module: nn.Module, expression: str) -> Any:
    """Value of an expression such as `self.sinks`; a marker if it is not known before the call."""
    if expression == "None":
        return None
    owner, _, path = expression.partition(".")
    if owner == "self" and all(part.isidentifier() for part in path.split(".")):
        try:
            return attrgetter(path)(module)
        except AttributeError:
            return _UNKNOWN
    return _UNKNOWN


def refuse_unsupported(module: nn.Module, arguments: Mapping[str, Any], supported: Collection[str] = ()) -> None:
    """Raise if an attention call has an argument that changes the result and is not supported.

    Args:
        module: Attention module.
        arguments: Keyword arguments of the call.
        supported: Names in `AttentionOptions` that the graft supports.

    Raises:
        UnsupportedModelError: If there is one; the message names it.
    """
    for name, value in arguments.items():
        if value is not None and name not in IGNORED and OPTIONS.get(name, name) not in supported:
            raise UnsupportedModelError(
                f"{type(module).__name__} uses {_FEATURES.get(name, 'an unknown argument')} ({name}), which converted "
                "attention does not support. Run this model or this call unconverted (graftwork.restore)."
            )
    if _weights_requested(module, arguments):
        raise UnsupportedModelError(
            f"Attention weights of {type(module).__name__} were requested (output_attentions), which converted "
            "attention never computes as a whole. Leave output_attentions off, or run this call unconverted "
            "(graftwork.restore)."
        )


def _weights_requested(module: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """True if attention weights were requested, for which transformers would silently return an empty tuple."""
    config = cast(Any, module).config
    if arguments.get("output_attentions") or getattr(config, "output_attentions", False):
        return True
    # some models (gpt2) do not pass the argument down; the active output collector is checked instead
    collector = getattr(output_capturing, "_active_collector", None)
    if collector is None or tracing():
        return False
    return any(key.endswith("attentions") for key in collector.get() or ())
