"""Replace parts of a model so that parameters stay shared, names stay the same, and everything can be put back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from graftwork.surgery.sites import pretrained

SEAM = "attention seam"
"""What stands in the place of a method's name for changes that every attention graft of a model shares."""
GRAFT = "graftwork_attention"
"""The child of an attention module that computes its attention."""
_UNDO = "_graftwork_undo"
_MISSING = "missing"


@dataclass(slots=True)
class UndoStep:
    """How to take back one change. Plain data, so that a copied or pickled model carries its own."""

    method: str
    kind: Literal["module", "attribute"]
    parent: Any
    """The module, or its config, that was changed."""
    name: str
    """Its child or attribute."""
    before: Any
    """What stood there; a marker if nothing did."""


def undo_steps(model: nn.Module) -> list[UndoStep]:
    """The changes made to a model so far, oldest first; the model's own list.

    It lies on the transformers model itself, so that it is the same list with and without a wrapper such as PEFT's.
    """
    return pretrained(model).__dict__.setdefault(_UNDO, [])


def is_converted(model: nn.Module, method: str | None = None) -> bool:
    """Whether a method (or any, if None) has changed this model."""
    return any(method is None or step.method == method for step in pretrained(model).__dict__.get(_UNDO, ()))


def replace_module(model: nn.Module, method: str, path: str, new: nn.Module) -> None:
    """Put `new` where the module at `path` is.

    The new module is expected to hold the children and parameters of the old one under the same names.
    """
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    old = parent.get_submodule(name)
    new.train(old.training)
    setattr(parent, name, new)
    # a bare reference inside a dataclass inside a list: the old module is kept, but is no submodule any more
    undo_steps(model).append(UndoStep(method, "module", parent, name, old))


def add_module(model: nn.Module, method: str, parent: nn.Module, name: str, new: nn.Module) -> None:
    """Hang a new child on `parent`, in place of a child of that name if there is one."""
    before = parent._modules.get(name, _MISSING)
    new.train(parent.training)
    parent.add_module(name, new)
    undo_steps(model).append(UndoStep(method, "module", parent, name, before))


def override(model: nn.Module, method: str, module: nn.Module, name: str, value: Any) -> None:
    """Give one module instance an attribute that hides the one of its class."""
    before = module.__dict__.get(name, _MISSING)
    module.__dict__[name] = value
    undo_steps(model).append(UndoStep(method, "attribute", module, name, before))


def undo(model: nn.Module, methods: Iterable[str] | None = None) -> int:
    """Take back the changes of some methods, or of all; newest first.

    Returns:
        The number of changes taken back.
    """
    steps = undo_steps(model)
    chosen = {step.method for step in steps} if methods is None else set(methods)
    # the last graft that goes closes the seam behind it
    if not any(step.name == GRAFT and step.method not in chosen | {SEAM} for step in steps):
        chosen.add(SEAM)
    taken = [step for step in steps if step.method in chosen]
    for step in reversed(taken):
        replaced = _take_back(step)
        for other in steps:
            # what a later change hung on the module that goes now hangs on the one that comes back
            if other.parent is replaced and replaced is not None:
                other.parent = step.before
    remaining = [step for step in steps if step.method not in chosen]
    if remaining:
        pretrained(model).__dict__[_UNDO] = remaining
    else:
        pretrained(model).__dict__.pop(_UNDO)
    return len(taken)


def _is_missing(value: Any) -> bool:
    return isinstance(value, str) and value == _MISSING


def _take_back(step: UndoStep) -> nn.Module | None:
    """Put back what stood there; returns the module that it took the place of, if there is one."""
    absent = _is_missing(step.before)
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
        # a projection that was exchanged since, as PEFT does with LoRA, belongs to the model and not to the change
        for name, child in current._modules.items():
            if name in step.before._modules:
                step.before._modules[name] = child
    step.parent._modules[step.name] = step.before
    return current
