"""Layouts of feed-forward layers and attention modules, found by structure.

A match is a candidate only; `proof` compares it with the module's own computation before anything is changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from itertools import permutations
from typing import Any

from torch import nn

from graftwork.surgery.families import FeedForwardLayout

_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""Name of transformers' registry of attention functions in the modules that call it."""
_GATES = ("gate_proj", "wi_0", "w1", "gate", "linear_v", "fc1_g", "fc1")
_UPS = ("up_proj", "wi_1", "w3", "up", "linear_1", "fc1_x", "fc2")
_OUTPUTS = ("down_proj", "wo", "w2", "down", "output", "fc3")


@cache
def calls_interface(module_class: type) -> bool:
    """True if a class calls the attention function that `config._attn_implementation` names."""
    for cls in module_class.__mro__:
        for value in vars(cls).values():
            code = getattr(inspect.unwrap(value), "__code__", None) if callable(value) else None
            if code is not None and _INTERFACE in code.co_names:
                return True
    return False


def widths(module: Any) -> tuple[int, int] | None:
    """Input and output width of a projection, possibly wrapped or quantised; None for other modules."""
    for first, second in (("in_features", "out_features"), ("nx", "nf")):
        inputs, outputs = getattr(module, first, None), getattr(module, second, None)
        if isinstance(inputs, int) and isinstance(outputs, int):
            return inputs, outputs
    return None


def layer_candidates(module: nn.Module) -> Iterator[FeedForwardLayout]:
    """Layouts in which `module` may be a whole feed-forward layer: plain, gated, or with a fused gate."""
    if hasattr(module, "feed_forward_chunk"):
        yield from _chunk_candidates(module)
        return
    found = _projections(module)
    activations = _activations(module)
    if len(activations) != 1 or len(found) not in (2, 3) or not _is_leaf(module, set(found) | set(activations)):
        return
    name = type(module).__name__

    def layout(first: str, output: str, **more: Any) -> FeedForwardLayout:
        return FeedForwardLayout(name, first, output, activation=activations[0], entry="forward", **more)

    if len(found) == 3:
        for gate, up, output in sorted(permutations(found), key=_unlikely):
            hidden, units = found[gate]
            if found[up] == (hidden, units) and found[output] == (units, hidden):
                yield layout(gate, output, up=up)
        return
    for first, output in permutations(found):
        hidden, units = found[first]
        if found[output] == (units, hidden):
            yield layout(first, output)
        elif units % 2 == 0 and found[output] == (units // 2, hidden):
            yield layout(first, output, fused=True)


def activation_candidate(module: nn.Module) -> FeedForwardLayout | None:
    """Layout in which `module` applies one activation to the output of one of its projections; None if it cannot."""
    activations = _activations(module)
    if len(activations) != 1 or calls_interface(type(module)):
        return None
    found = _projections(module)
    return FeedForwardLayout(
        type(module).__name__,
        input=next(iter(found), ""),
        output="",
        activation=activations[0],
        form="activation",
    )


def experts_candidate(module: nn.Module) -> FeedForwardLayout | None:
    """Layout of experts with 3-D parameters, as transformers' experts interface defines them; None for others."""
    owner: Any = module
    if not hasattr(owner, "has_gate") or not hasattr(owner, "_apply_gate"):
        return None
    first = "gate_up_proj" if owner.has_gate else "up_proj"
    parameters = [getattr(owner, name, None) for name in (first, "down_proj")]
    if not all(isinstance(each, nn.Parameter) and each.ndim == 3 for each in parameters):
        return None
    return FeedForwardLayout(
        type(module).__name__, first, "down_proj", activation="act_fn", fused=bool(owner.has_gate), form="experts"
    )


def _chunk_candidates(module: Any) -> Iterator[FeedForwardLayout]:
    """Layout of BERT's layers, whose method `feed_forward_chunk` computes the feed-forward layer with its residual."""
    try:
        parts = module.intermediate.dense, module.intermediate.intermediate_act_fn, module.output.dense
        dropout = isinstance(module.output.dropout, nn.Dropout)
        norm = isinstance(module.output.LayerNorm, nn.Module)
    except AttributeError:
        return
    if all(widths(part) for part in (parts[0], parts[2])) and dropout and norm:
        yield FeedForwardLayout(
            type(module).__name__,
            input="intermediate.dense",
            output="output.dense",
            activation="intermediate.intermediate_act_fn",
            output_dropout="output.dropout",
            entry="feed_forward_chunk",
            exit="output.LayerNorm",
        )


def _projections(module: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: found for name, child in module.named_children() if (found := widths(child)) is not None}


def _activations(module: nn.Module) -> list[str]:
    """Names of activation functions and of children that may be one: without parameters, no dropout, no container."""
    children = [
        name
        for name, child in module.named_children()
        if not isinstance(child, (nn.Dropout, nn.Identity, nn.ModuleList, nn.Sequential))
        and widths(child) is None
        and "norm" not in name.lower()
        and next(child.children(), None) is None
        and next(child.parameters(recurse=False), None) is None
    ]
    functions = [
        name
        for name, value in module.__dict__.items()
        if "act" in name and callable(value) and not isinstance(value, type)
    ]
    return [*children, *functions]


def _is_leaf(module: nn.Module, parts: set[str]) -> bool:
    """True if a module has no children but its parts and dropout."""
    return all(name in parts or isinstance(child, (nn.Dropout, nn.Identity)) for name, child in module.named_children())


def _unlikely(names: tuple[str, ...]) -> int:
    """Number of projections (gate, up, output) whose name belongs to another role; 0 for the usual names."""
    return sum(name not in usual for name, usual in zip(names, (_GATES, _UPS, _OUTPUTS), strict=True))
