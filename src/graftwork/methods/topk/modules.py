"""Top-k layers as modules: they hold no parameters of their own and call `functional` on those of the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from graftwork.errors import UnsupportedModelError
from graftwork.methods.topk import functional
from graftwork.surgery.families import FeedForwardLayout
from graftwork.surgery.masks import LazyMask, PositionBias

COMPOSED_CHUNK_SIZE = 1024
"""Tokens at once where projections must be called as modules and no chunk size was set."""


class TopKAttention(nn.Module):
    """Attention over the k best keys of every query; the child behind the attention seam.

    Args:
        k: Keys kept per query; None keeps all and recomputes in the backward pass.
        chunk_size: Queries scored at once; None chooses by length.
    """

    def __init__(self, k: int | None, chunk_size: int | None = None) -> None:
        super().__init__()
        self.k = k
        self.chunk_size = chunk_size

    def forward(
        self,
        owner: nn.Module,
        query: Float[Tensor, "batch heads queries width"],
        key: Float[Tensor, "batch groups keys width"],
        value: Float[Tensor, "batch groups keys value_width"],
        mask: LazyMask | Tensor | None,
        *,
        scaling: float,
        dropout: float,
        position_bias: PositionBias | Tensor | None,
    ) -> Float[Tensor, "batch heads queries value_width"]:
        """Attend; called by `surgery.attention.attention_function`."""
        return functional.topk_attention(
            query,
            key,
            value,
            k=self.k,
            scale=scaling,
            mask=mask,
            bias=position_bias,
            dropout=dropout,
            chunk_size=self.chunk_size,
        )

    def extra_repr(self) -> str:
        """k, for `print(model)`."""
        return f"k={self.k}, chunk_size={self.chunk_size}"


class TopKFeedForward(nn.Module):
    """A feed-forward layer, plain or gated, that keeps the k best hidden units of every token.

    It stands where the dense layer stood and takes over that layer's children under their names, so checkpoints stay
    interchangeable. In families whose feed-forward part is a method of a larger layer (BERT), `owner` is that layer,
    and this module holds nothing at all.

    Projections are fused where they are plain parameters on the device of the input. Where they are anything else
    (LoRA, off-loaded, quantised) they are called as modules, chunk by chunk, and recomputed in the backward pass.
    """

    def __init__(
        self,
        original: nn.Module,
        layout: FeedForwardLayout,
        *,
        k: int | None,
        selection: str | None,
        chunk_size: int | None,
        dropout: bool = True,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.k = k
        self.chunk_size = chunk_size
        self.dropout_active = dropout
        self.activation_name = activation_name(attrgetter(layout.activation)(original), layout.class_name)
        self.selection = selection or ("score" if layout.up is None else "product")
        if layout.entry is None:
            self.original_class = layout.class_name
            for name, child in original.named_children():
                self.add_module(name, child)
            # functions such as distilbert's activation are attributes, not children
            if "." not in layout.activation and layout.activation not in self._modules:
                self.__dict__[layout.activation] = getattr(original, layout.activation)
        else:
            # no child: the layer that owns the projections is this module's parent
            self.__dict__["owner"] = original

    def forward(self, hidden_states: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens hidden"]:
        """The feed-forward layer, up to and with its output dropout."""
        hidden = self._fused(hidden_states) if self._plain(hidden_states) else self._composed(hidden_states)
        layout = self.layout
        if layout.output_dropout is not None and layout.entry is None:
            hidden = self.part(layout.output_dropout)(hidden)
        return hidden

    def part(self, path: str) -> Any:
        """A projection or dropout of the layer, as it is now; it may have been exchanged since conversion."""
        return attrgetter(path)(self.__dict__.get("owner", self))

    def projections(self) -> list[nn.Module]:
        """Input (or gate), up if there is one, output."""
        layout = self.layout
        return [self.part(path) for path in layout.projections]

    @property
    def hidden_dropout(self) -> float:
        """Rate at which hidden activations are dropped now."""
        path = self.layout.hidden_dropout
        return self.part(path).p if path is not None and self.training and self.dropout_active else 0.0

    def arguments(self) -> dict[str, Any]:
        """Weights and biases of plain projections, as `functional` names them; weights [out in]."""
        names = ("in", "out") if self.layout.up is None else ("gate", "up", "out")
        values: dict[str, Any] = {}
        for name, projection in zip(names, self.projections(), strict=True):
            weight: Any = projection.weight
            values[f"w_{name}"] = weight.t() if isinstance(projection, Conv1D) else weight
            values[f"b_{name}"] = projection.bias
        return values

    def extra_repr(self) -> str:
        """K and the selection rule, for `print(model)`."""
        return f"k={self.k}, selection={self.selection}, chunk_size={self.chunk_size}"

    def _plain(self, hidden_states: Tensor) -> bool:
        """Whether reading `.weight` gives the effective weight, here and now."""
        return all(
            type(projection) in (nn.Linear, Conv1D)
            and not hasattr(projection, "_hf_hook")
            and "forward" not in projection.__dict__
            and not projection._forward_hooks
            and not projection._forward_pre_hooks
            and projection.weight.device == hidden_states.device
            and torch.is_floating_point(cast(Tensor, projection.weight))
            for projection in self.projections()
        )

    def _fused(self, hidden_states: Tensor) -> Tensor:
        values = self.arguments()
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden_states = hidden_states.to(dtype)
            values = {name: None if value is None else value.to(dtype) for name, value in values.items()}
        compute: Callable[..., Tensor] = (
            functional.topk_feed_forward if self.layout.up is None else functional.topk_gated_feed_forward
        )
        return compute(
            hidden_states,
            **values,
            k=self.k,
            activation=self.activation_name,
            selection=self.selection,
            dropout=self.hidden_dropout,
            chunk_size=self.chunk_size,
        )

    def _composed(self, hidden_states: Tensor) -> Tensor:
        # rows of a batch stay apart: a projection may have something of its own for each
        rows = hidden_states if hidden_states.ndim > 1 else hidden_states.unsqueeze(0)
        others = max(1, math.prod(rows.shape[:-2]))
        chunks = rows.split(max(1, (self.chunk_size or COMPOSED_CHUNK_SIZE) // others), dim=-2)
        if torch.is_grad_enabled():
            # determinism is the business of the random state, which checkpoint restores
            outputs = [checkpoint(self._composed_chunk, chunk, use_reentrant=False) for chunk in chunks]
        else:
            outputs = [self._composed_chunk(chunk) for chunk in chunks]
        return torch.cat(outputs, dim=-2).reshape(*hidden_states.shape[:-1], -1)

    def _composed_chunk(self, rows: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens hidden"]:
        projections = self.projections()
        score = projections[0](rows)
        activated = functional.activate(score, self.activation_name)
        if len(projections) == 3:
            activated = activated * projections[1](rows)
        if self.k is not None and self.k < score.shape[-1]:
            ranked = {"score": score, "gate": score}.get(self.selection, activated.abs())
            if self.selection == "abs_act" and len(projections) == 3:
                ranked = functional.activate(score, self.activation_name).abs()
            _, kept = functional.select_topk(ranked.detach(), self.k)
            activated = torch.zeros_like(activated).scatter(-1, kept.long(), activated.gather(-1, kept.long()))
        activated = nn.functional.dropout(activated, self.hidden_dropout, self.hidden_dropout > 0)
        output = projections[-1]
        weight = getattr(output, "weight", None)
        # T5 keeps wo in fp32 when the rest of the model is in half precision
        if (
            isinstance(weight, Tensor)
            and weight.is_floating_point()
            and not torch.is_autocast_enabled(rows.device.type)
        ):
            activated = activated.to(weight.dtype)
        return output(activated)


class LayerEntry:
    """Stands for the method of a layer (BERT's `feed_forward_chunk`) that computes its feed-forward part."""

    def __init__(self, layer: nn.Module, feed_forward: TopKFeedForward) -> None:
        self.layer = layer
        self.feed_forward = feed_forward

    def __call__(self, hidden_states: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens hidden"]:
        """Feed-forward, dropout, residual, norm."""
        layout = self.feed_forward.layout
        hidden = self.feed_forward(hidden_states)
        if layout.output_dropout is not None:
            hidden = attrgetter(layout.output_dropout)(self.layer)(hidden)
        return attrgetter(str(layout.exit))(self.layer)(hidden + hidden_states)


_ACTIVATION_NAMES = {
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_new",
    "GELUTanh": "gelu_pytorch_tanh",
    "PytorchGELUTanh": "gelu_pytorch_tanh",
    "FastGELUActivation": "gelu_new",
    "QuickGELUActivation": "quick_gelu",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
}


def activation_name(activation: Any, class_name: str) -> str:
    """The name under which `functional` knows an activation module or function.

    Read from the layer and not from the config, because the layer is what runs.

    Raises:
        UnsupportedModelError: If it is not known.
    """
    if isinstance(activation, nn.GELU):
        return "gelu" if activation.approximate == "none" else "gelu_pytorch_tanh"
    name = getattr(activation, "__name__", type(activation).__name__)
    if name not in _ACTIVATION_NAMES:
        raise UnsupportedModelError(
            f"topk cannot change the feed-forward layers of class {class_name}: found the activation {name}. "
            f"Expected one of: {', '.join(sorted(set(_ACTIVATION_NAMES.values())))}. Nothing was changed."
        )
    return _ACTIVATION_NAMES[name]
