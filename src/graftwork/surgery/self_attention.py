"""Self-attention that starts from hidden states, for methods that combine tokens before keys and values exist."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graftwork.errors import UnsupportedModelError
from graftwork.surgery.attention import refuse_unsupported
from graftwork.surgery.families import AttentionLayout
from graftwork.surgery.masks import LazyMask
from graftwork.surgery.modules import GRAFT, override
from graftwork.surgery.sites import attention_sites, family_of, pretrained


@dataclass(frozen=True, slots=True)
class Projections:
    """The query, key and value projections of one attention module, called as the modules that they are."""

    query: Callable[[Tensor], Tensor]
    key: Callable[[Tensor], Tensor]
    value: Callable[[Tensor], Tensor]
    head_width: int


class HiddenStatesGraft(Protocol):
    """What a module behind the seam offers, besides attention on projected keys and values, to be used here."""

    def wants_hidden_states(self, tokens: int) -> bool:
        """Whether a sequence of this many tokens is better attended to from its hidden states."""
        ...

    def attend(
        self,
        hidden_states: Tensor,
        projections: Projections,
        mask: LazyMask | Tensor | None,
        *,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        """Attend [batch tokens hidden] → [batch tokens hidden], before any output projection."""
        ...


def open_hidden_states(model: nn.Module, method: str, paths: list[str]) -> None:
    """Let the grafts at `paths`, which must be behind the seam already, choose to start from hidden states.

    Raises:
        UnsupportedModelError: If the family's self-attention is not known well enough.
    """
    layout = family_of(model).self_attention
    if layout is None:
        raise UnsupportedModelError(
            f"{method} cannot change the attention of {type(pretrained(model)).__name__}: it is not known how its "
            "self-attention projects hidden states. Nothing was changed."
        )
    for path in paths:
        owner = model.get_submodule(path)
        override(model, method, owner, "forward", HiddenStatesEntry(owner, layout))


def self_attention_width(model: nn.Module) -> tuple[int, int]:
    """Number of heads and width of a head of an encoder's self-attention."""
    owner: Any = attention_sites(model)[0].module
    width = int(owner.attention_head_size)
    layout = family_of(model).self_attention
    features = getattr(owner, layout.query if layout else "query").out_features
    return int(features) // width, width


class HiddenStatesEntry:
    """Stands for the forward of one self-attention module."""

    def __init__(self, owner: nn.Module, layout: AttentionLayout) -> None:
        self.owner: Any = owner
        self.layout = layout

    def __call__(
        self, hidden_states: Tensor, attention_mask: LazyMask | Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """The module's own forward, or the graft's where that wants hidden states."""
        owner = self.owner
        graft: HiddenStatesGraft = owner._modules[GRAFT]
        if kwargs.get("past_key_values") is not None or not graft.wants_hidden_states(hidden_states.shape[1]):
            return type(owner).forward(owner, hidden_states, attention_mask, **kwargs)
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


def affine_parts(projection: Callable[[Tensor], Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """What an affine module does to rows, split into its linear part and its bias.

    The module is called and never read, so that LoRA, off-loading and quantisation go on working.

    Returns:
        (rows · weight, bias); the bias is zero where there is none.
    """
    flat = rows.reshape(-1, rows.shape[-1])
    both = projection(torch.cat([flat, flat.new_zeros(1, flat.shape[1])]))
    bias = both[-1]
    return (both[:-1] - bias).reshape(*rows.shape[:-1], -1), bias
