"""Self-attention from hidden states, for methods that compress tokens before the key and value projections."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from graftwork.errors import UnsupportedModelError
from graftwork.surgery.arguments import refuse_unsupported
from graftwork.surgery.families import AttentionLayout
from graftwork.surgery.masks import LazyMask
from graftwork.surgery.modules import GRAFT, override
from graftwork.surgery.sites import family_of, pretrained
from graftwork.surgery.tracing import refuse_trace


@dataclass(frozen=True, slots=True)
class Projections:
    """Query, key and value projections of one attention module; called as modules, never read."""

    query: Callable[[Tensor], Tensor]
    key: Callable[[Tensor], Tensor]
    value: Callable[[Tensor], Tensor]
    head_width: int
    """Width of one head."""


class HiddenStatesGraft(Protocol):
    """Optional interface of an `AttentionGraft` that can also attend from hidden states."""

    def uses_hidden_states(self, tokens: int) -> bool:
        """True if sequences of this length are to be processed by `attend`, from hidden states."""
        ...

    def attend(
        self,
        hidden_states: Float[Tensor, "batch tokens hidden"],
        projections: Projections,
        mask: LazyMask | Shaped[Tensor, "batch 1 queries keys"] | None,
        *,
        scaling: float,
        dropout: float,
    ) -> Float[Tensor, "batch tokens hidden"]:
        """Compute self-attention, without the output projection.

        Args:
            hidden_states: Input of the attention module.
            projections: Its projections.
            mask: Its attention mask; None if all tokens are real.
            scaling: Factor of the scores.
            dropout: Probability of dropping an attention weight.
        """
        ...


def open_hidden_states(model: nn.Module, method: str, paths: list[str]) -> None:
    """Route the attention modules at `paths` through `HiddenStatesForward`, for grafts with the hidden-states
    interface.

    Args:
        model: Model whose attention modules are grafted already.
        method: Name of the method, for `undo`.
        paths: Paths of the attention modules.

    Raises:
        UnsupportedModelError: If the projections of the family's self-attention are not listed.
    """
    layout = family_of(model).self_attention
    if layout is None:
        raise UnsupportedModelError(
            f"{method} cannot compress hidden states in {type(pretrained(model)).__name__}: the projections of its "
            "self-attention are not registered. Nothing was changed."
        )
    for path in paths:
        owner = model.get_submodule(path)
        override(model, method, owner, "forward", HiddenStatesForward(owner, layout))


class HiddenStatesForward:
    """Replacement for the forward of one self-attention module.

    Args:
        owner: Self-attention module.
        layout: Names of its projections.
    """

    def __init__(self, owner: nn.Module, layout: AttentionLayout) -> None:
        self.owner: Any = owner
        self.layout = layout

    def __call__(
        self, hidden_states: Tensor, attention_mask: LazyMask | Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Run the graft's `attend` [batch tokens hidden] if it uses hidden states, else the module's own forward."""
        owner = self.owner
        graft: HiddenStatesGraft = owner._modules[GRAFT]
        if kwargs.get("past_key_values") is not None or not graft.uses_hidden_states(hidden_states.shape[1]):
            owner_class = cast(Any, type(owner))
            return owner_class.forward(owner, hidden_states, attention_mask, **kwargs)
        refuse_trace(f"the attention of {type(owner).__name__}")
        refuse_unsupported(owner, kwargs)
        layout = self.layout
        output = graft.attend(
            hidden_states,
            Projections(
                getattr(owner, layout.query),
                getattr(owner, layout.key),
                getattr(owner, layout.value),
                int(owner.attention_head_size),
            ),
            attention_mask,
            scaling=owner.scaling,
            dropout=owner.dropout.p if owner.training else 0.0,
        )
        return output if layout.output is None else getattr(owner, layout.output)(output), None


def affine_parts(
    projection: Callable[[Tensor], Tensor], rows: Float[Tensor, "*batch inputs"]
) -> tuple[Float[Tensor, "*batch outputs"], Float[Tensor, " outputs"]]:
    """Split the output of an affine module y = W·x + b into W·x and b.

    The module is called with the rows and a zero row, b = module(0), and its weight is never read, so that LoRA,
    off-loading and quantisation are respected.

    Args:
        projection: Affine module.
        rows: Inputs x.

    Returns:
        W·x, and b (zero for a module without bias).
    """
    flat = rows.reshape(-1, rows.shape[-1])  # [rows inputs]
    # [rows + 1, outputs]; the last row is the bias
    both = projection(torch.cat([flat, flat.new_zeros(1, flat.shape[1])]))
    bias = both[-1]
    return (both[:-1] - bias).reshape(*rows.shape[:-1], -1), bias
