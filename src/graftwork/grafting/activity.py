"""Check that the changes of a conversion are still in place."""

from __future__ import annotations

from torch import nn

from graftwork.errors import UnsupportedModelError
from graftwork.surgery.modules import UndoStep, inactive_steps
from graftwork.surgery.sites import named_modules


def check_active(model: nn.Module, action: str) -> None:
    """Raise if a graft is no longer active, because other code has replaced it or what it depends on.

    Args:
        model: The model; one without grafts passes.
        action: Action that needs the grafts, for the message, such as "save the model".

    Raises:
        UnsupportedModelError: If one is not; the message names its module.
    """
    if not (steps := inactive_steps(model)):
        return
    paths = {id(module): path for path, module in named_modules(model)}
    names = [_name(step, paths) for step in steps]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise UnsupportedModelError(
        f"Cannot {action}: found {', '.join(names[:3])}{more} changed after the conversion, so that the graft there is "
        "not active. Expected what the conversion made. Call graftwork.restore(model) and convert it again, or load it "
        "again."
    )


def _name(step: UndoStep, paths: dict[int, str]) -> str:
    """Path of the changed module or configuration."""
    if not isinstance(step.parent, nn.Module):
        return "_attn_implementation of the configuration"
    return ".".join(part for part in (paths.get(id(step.parent), type(step.parent).__name__), step.name) if part)
