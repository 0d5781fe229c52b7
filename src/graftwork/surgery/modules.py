"""Reversible replacement of modules and attributes; parameters stay shared and keep their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import nn

from graftwork.surgery.sites import pretrained

SEAM = "attention seam"
"""Method name of the changes that all attention grafts of a model share."""
GRAFT = "graftwork_attention"
"""Name of the child of an attention module that computes its attention."""
_UNDO = "_graftwork_undo"
_MISSING = "missing"


@dataclass(slots=True)
class UndoStep:
    """Record that reverts one change. Plain data, so that it is copied and pickled with the model."""

    method: str
    """Name of the method that made the change."""
    kind: Literal["module", "attribute", "hook"]
    """Type of the change: a child module, an entry of `__dict__`, or a forward pre-hook."""
    parent: Any
    """Changed module or configuration."""
    name: str
    """Name of the changed child or attribute."""
    before: Any
    """Previous child or value; a marker if there was none; the handle of a hook."""
    after: Any = None
    """New child or value; None for a hook."""


def undo_steps(model: nn.Module) -> list[UndoStep]:
    """Changes made to a model so far, oldest first; the model's own list.

    The list is stored on the transformers model, so that it is the same with and without a wrapper such as PEFT's.
    """
    return pretrained(model).__dict__.setdefault(_UNDO, [])


def children_of(module: nn.Module) -> MutableMapping[str, nn.Module | None]:
    """Children of a module by name, as stored: unlike `named_children`, with repeated and missing (None) ones."""
    children: Any = module._modules  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType]
    return cast("MutableMapping[str, nn.Module | None]", children)


def replace_module(model: nn.Module, method: str, path: str, new: nn.Module) -> None:
    """Replace the module at `path` by `new`, which must hold the old children and parameters under the same names."""
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    old = parent.get_submodule(name)
    new.train(old.training)
    setattr(parent, name, new)
    # stored in a list of dataclasses, the old module is kept alive without being a submodule
    undo_steps(model).append(UndoStep(method, "module", parent, name, old, new))


def add_module(model: nn.Module, method: str, parent: nn.Module, name: str, new: nn.Module) -> None:
    """Add a child to a module, replacing a child of the same name.

    Args:
        model: Model that records the change.
        method: Name of the method, for `undo`.
        parent: Module that gets the child.
        name: Name of the child.
        new: The child; it takes over the training mode of the parent.
    """
    before = children_of(parent).get(name, _MISSING)
    new.train(parent.training)
    parent.add_module(name, new)
    undo_steps(model).append(UndoStep(method, "module", parent, name, before, new))


def exchange_module(model: nn.Module, parent: nn.Module, name: str, new: nn.Module) -> None:
    """Replace a child that `add_module` has added, without a further change to revert.

    Args:
        model: Model that records the changes.
        parent: Module with the child.
        name: Name of the child.
        new: The child; it takes over the training mode of the parent.
    """
    parent.add_module(name, new.train(parent.training))
    for step in undo_steps(model):
        if step.parent is parent and step.name == name:
            step.after = new


def override(model: nn.Module, method: str, module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute of one module instance that shadows the attribute of its class.

    Args:
        model: Model that records the change.
        method: Name of the method, for `undo`.
        module: Module to change.
        name: Name of the attribute.
        value: Its value, such as a replacement for a method.
    """
    before = module.__dict__.get(name, _MISSING)
    module.__dict__[name] = value
    undo_steps(model).append(UndoStep(method, "attribute", module, name, before, value))


def add_pre_hook(model: nn.Module, method: str, module: nn.Module, hook: Callable[..., Any]) -> None:
    """Register a forward pre-hook with keyword arguments, a function at module level so that the model can be pickled.

    Args:
        model: Model that records the change.
        method: Name of the method, for `undo`.
        module: Module whose calls are changed.
        hook: Called with the module, its positional and its keyword arguments.
    """
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    # a copied or pickled handle refers to the hooks of the copied module
    undo_steps(model).append(UndoStep(method, "hook", module, hook.__name__, handle))


def inactive_steps(model: nn.Module) -> list[UndoStep]:
    """Changes that are no longer in place, because other code has changed the same child or attribute since."""
    newest: dict[tuple[int, str], UndoStep] = {}
    for step in undo_steps(model):
        if step.kind != "hook":
            newest[id(step.parent), step.name] = step
    return [step for step in newest.values() if not _in_place(step)]


def _in_place(step: UndoStep) -> bool:
    holder: Any = children_of(step.parent) if step.kind == "module" else step.parent.__dict__
    current = holder.get(step.name)
    if step.name == "forward" and holder.get("_old_forward") is step.after:
        # accelerate wraps the forward of a module and stores the previous one
        return True
    return current is step.after or (isinstance(current, str) and current == step.after)


def undo(model: nn.Module, methods: Iterable[str] | None = None) -> int:
    """Revert the changes of the given methods, or of all, newest first.

    Returns:
        Number of reverted changes.
    """
    steps = undo_steps(model)
    chosen = {step.method for step in steps} if methods is None else set(methods)
    # the seam is closed with the last graft
    if not any(step.name == GRAFT and step.method not in chosen | {SEAM} for step in steps):
        chosen.add(SEAM)
    reverted = [step for step in steps if step.method in chosen]
    for step in reversed(reverted):
        replaced = _revert(step)
        for other in steps:
            # later changes of the removed module now belong to the restored one
            if other.parent is replaced and replaced is not None:
                other.parent = step.before
    remaining = [step for step in steps if step.method not in chosen]
    if remaining:
        pretrained(model).__dict__[_UNDO] = remaining
    else:
        pretrained(model).__dict__.pop(_UNDO)
    return len(reverted)


def _is_missing(value: Any) -> bool:
    return isinstance(value, str) and value == _MISSING


def _revert(step: UndoStep) -> nn.Module | None:
    """Restore the previous child or value; return the module that it replaces, if any."""
    absent = _is_missing(step.before)
    if step.kind == "hook":
        step.before.remove()
        return None
    if step.kind == "attribute":
        if absent:
            del step.parent.__dict__[step.name]
        else:
            step.parent.__dict__[step.name] = step.before
        return None
    current = step.parent._modules[step.name]
    if absent:
        del step.parent._modules[step.name]
        return None
    if current is not None:
        step.before.train(current.training)
        # children replaced since then, as PEFT does with LoRA, belong to the model and not to the change
        for name, child in current._modules.items():
            if name in step.before._modules:
                step.before._modules[name] = child
    step.parent._modules[step.name] = step.before
    return current
