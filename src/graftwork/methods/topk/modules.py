"""Top-k layers as modules, without parameters: they call `functional` with the parameters of the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any, Unpack, cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]
from transformers.pytorch_utils import Conv1D

from graftwork.methods.topk import functional
from graftwork.surgery.attention import AttentionOptions
from graftwork.surgery.families import FeedForwardLayout
from graftwork.surgery.masks import LazyMask
from graftwork.surgery.tracing import refuse_trace

COMPOSED_CHUNK_SIZE = 1024
"""Tokens per chunk if projections are called as modules and `chunk_size` is None."""


class TopKAttention(nn.Module):
    """Attention over the k highest-scoring keys of every query; an `AttentionGraft`.

    Args:
        k: Keys kept per query; None keeps all and recomputes scores in the backward pass.
        chunk_size: Queries scored at once; None chooses it from the length.
        first: Keys from the first real one on that are kept beside the k best.
        recent: Keys up to the query's own position that are kept beside the k best.
    """

    supports = frozenset({"softcap", "sinks"})

    def __init__(self, k: int | None, chunk_size: int | None = None, *, first: int = 0, recent: int = 0) -> None:
        super().__init__()
        self.k = k
        self.chunk_size = chunk_size
        self.first = first
        self.recent = recent

    def forward(
        self,
        owner: nn.Module,
        query: Float[Tensor, "batch heads queries width"],
        key: Float[Tensor, "batch groups keys width"],
        value: Float[Tensor, "batch groups keys value_width"],
        mask: LazyMask | Shaped[Tensor, ...] | None,
        **options: Unpack[AttentionOptions],
    ) -> Float[Tensor, "batch heads queries value_width"]:
        """Attend to the k highest-scoring keys. See `AttentionGraft`."""
        return functional.topk_attention(
            query,
            key,
            value,
            k=self.k,
            scale=options["scaling"],
            mask=mask,
            bias=options["position_bias"],
            dropout=options["dropout"],
            chunk_size=self.chunk_size,
            softcap=options.get("softcap"),
            sinks=options.get("sinks"),
            first=self.first,
            recent=self.recent,
        )

    def extra_repr(self) -> str:
        """Settings shown by `print(model)`."""
        beside = f", first={self.first}, recent={self.recent}" if self.first or self.recent else ""
        return f"k={self.k}, chunk_size={self.chunk_size}{beside}"


class TopKFeedForward(nn.Module):
    """Feed-forward layer, plain or gated, that keeps the k highest-ranked hidden units of every token.

    The module replaces the dense layer and registers that layer's children under the same names, so checkpoints stay
    interchangeable. In families whose feed-forward part is a method of a larger layer (BERT), `owner` is that layer,
    and this module has no children.

    If all projections are plain parameters on the device of the input, the fused functions of `functional` read their
    weights. Otherwise (LoRA, off-loading, quantisation) projections are called as modules, chunk by chunk, and
    recomputed in the backward pass.

    Args:
        original: The layer to replace, or the larger layer that contains it.
        layout: Names of its parts.
        k: Hidden units kept per token; None keeps all.
        selection: Ranking of the units; None chooses "score" for plain and "product" for gated layers.
        chunk_size: Tokens scored at once; None chooses it from the width.
        dropout: Apply the layer's hidden dropout in training.
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
        self.activation_name = activation_name(attrgetter(layout.activation)(original))
        self.selection = selection or ("product" if layout.gated else "score")
        if layout.entry is None:
            self.original_class = layout.class_name
            for name, child in original.named_children():
                self.add_module(name, child)
            # an activation that is a function (distilbert) is an attribute, not a child
            if "." not in layout.activation and layout.activation not in self._modules:
                self.__dict__[layout.activation] = getattr(original, layout.activation)
        else:
            # not registered as a child: the owner of the projections is this module's parent
            self.__dict__["owner"] = original

    def forward(self, hidden_states: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens hidden"]:
        """Compute the feed-forward layer, including its output dropout."""
        refuse_trace("top-k feed-forward layers")
        hidden = self._fused(hidden_states) if self.is_fusible(hidden_states) else self._composed(hidden_states)
        layout = self.layout
        if layout.output_dropout is not None and layout.entry is None:
            hidden = self.part(layout.output_dropout)(hidden)
        return hidden

    def part(self, path: str) -> Any:
        """Return the current projection, activation or dropout at `path`, which may be replaced after conversion."""
        return attrgetter(path)(self.__dict__.get("owner", self))

    def projections(self) -> list[nn.Module]:
        """Return the projections: input, output; or gate, up, output."""
        return [self.part(path) for path in self.layout.projections]

    @property
    def hidden_dropout(self) -> float:
        """Current dropout rate of hidden activations; 0 outside training."""
        path = self.layout.hidden_dropout
        return self.part(path).p if path is not None and self.training and self.dropout_active else 0.0

    def arguments(self) -> dict[str, Any]:
        """Return weights [out in] and biases [out] of fusible projections, by the parameter names of `functional`."""
        names = ("in", "out") if self.layout.up is None else ("gate", "up", "out")
        values: dict[str, Any] = {}
        for name, projection in zip(names, self.projections(), strict=True):
            weight = cast(Tensor, projection.weight)
            values[f"w_{name}"] = weight.t() if isinstance(projection, Conv1D) else weight  # Conv1D stores [in, out]
            values[f"b_{name}"] = cast(Tensor | None, projection.bias)
        if self.layout.fused:
            weight, bias = values.pop("w_in"), values.pop("b_in")
            values["w_gate"], values["w_up"] = weight.chunk(2)  # [2·units hidden] → 2 × [units hidden]
            values["b_gate"], values["b_up"] = (None, None) if bias is None else bias.chunk(2)
        return values

    def extra_repr(self) -> str:
        """Settings shown by `print(model)`."""
        return f"k={self.k}, selection={self.selection}, chunk_size={self.chunk_size}"

    def is_fusible(self, hidden_states: Float[Tensor, "*tokens hidden"]) -> bool:
        """Return True if `.weight` of every projection is its effective weight, on the device of the input."""
        return self.activation_name is not None and all(
            type(projection) in (nn.Linear, Conv1D)
            and type(projection.weight) in (Tensor, nn.Parameter)
            and not hasattr(projection, "_hf_hook")
            and "forward" not in projection.__dict__
            and not projection._forward_hooks  # pyright: ignore[reportUnknownMemberType]
            and not projection._forward_pre_hooks  # pyright: ignore[reportUnknownMemberType]
            and projection.weight.device == hidden_states.device
            and torch.is_floating_point(cast(Tensor, projection.weight))
            for projection in self.projections()
        )

    def _fused(self, hidden_states: Tensor) -> Tensor:
        """Compute the layer from the weights of its projections."""
        values = self.arguments()
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            hidden_states = hidden_states.to(dtype)
            values = {name: None if value is None else value.to(dtype) for name, value in values.items()}
        compute: Callable[..., Tensor] = (
            functional.topk_gated_feed_forward if self.layout.gated else functional.topk_feed_forward
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
        """Compute the layer by calling its projections as modules, in checkpointed chunks of tokens."""
        # split along tokens only: the batch axis is kept, because projections may differ per batch element
        rows = hidden_states if hidden_states.ndim > 1 else hidden_states.unsqueeze(0)  # [*batch, tokens, hidden]
        others = max(1, math.prod(rows.shape[:-2]))
        size = max(1, (self.chunk_size or COMPOSED_CHUNK_SIZE) // others)
        chunks = torch.split(rows, size, dim=-2)  # [*batch, size, hidden] each
        if torch.is_grad_enabled():
            # checkpoint restores the random state, so dropout masks of the recomputation are the same
            outputs = [cast(Tensor, checkpoint(self._composed_chunk, chunk, use_reentrant=False)) for chunk in chunks]
        else:
            outputs = [self._composed_chunk(chunk) for chunk in chunks]
        return torch.cat(outputs, dim=-2).reshape(*hidden_states.shape[:-1], -1)  # [*tokens, hidden]

    def _composed_chunk(self, rows: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens hidden"]:
        """Compute the layer on one chunk, with ordinary autograd."""
        projections = self.projections()
        activation = self.part(self.layout.activation)
        score = projections[0](rows)  # [*tokens, units], or [*tokens, 2·units] if fused
        up: Tensor | None = None
        if self.layout.fused:
            score, up = score.chunk(2, dim=-1)
        elif self.layout.up is not None:
            up = projections[1](rows)
        unscaled = activation(score)  # [*tokens, units]
        activated = unscaled if up is None else unscaled * up
        if self.k is not None and self.k < score.shape[-1]:
            ranked = {"score": score, "gate": score, "abs_act": unscaled.abs()}.get(self.selection, activated.abs())
            activated = keep_topk(activated, ranked, self.k)
        activated = nn.functional.dropout(activated, self.hidden_dropout, self.hidden_dropout > 0)
        output = projections[-1]
        weight = getattr(output, "weight", None)
        # T5 keeps wo in float32 if the rest of the model is in half precision
        if (
            isinstance(weight, Tensor)
            and weight.is_floating_point()
            and not torch.is_autocast_enabled(rows.device.type)
        ):
            activated = activated.to(weight.dtype)
        return output(activated)


def keep_topk(
    activated: Float[Tensor, "*tokens units"], ranked: Float[Tensor, "*tokens units"], k: int
) -> Float[Tensor, "*tokens units"]:
    """Set all but the k highest-ranked activations of each token to zero, with ordinary autograd.

    Args:
        activated: Activations.
        ranked: Their ranking scores, which need no gradient.
        k: Number kept per token.
    """
    _, kept = functional.select_topk(ranked.detach(), k)  # [*tokens, k]
    return torch.zeros_like(activated).scatter(-1, kept.long(), activated.gather(-1, kept.long()))


class LayerEntry:
    """Replacement of the method of a layer that computes its feed-forward part (BERT's `feed_forward_chunk`), or of the
    forward of a feed-forward layer.

    Args:
        layer: Owner of the method.
        feed_forward: Feed-forward layer to call.
    """

    def __init__(self, layer: nn.Module, feed_forward: TopKFeedForward) -> None:
        self.layer = layer
        self.feed_forward = feed_forward
        self.proven_layout = feed_forward.layout

    def __call__(self, hidden_states: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens hidden"]:
        """Apply feed-forward layer and output dropout, and residual connection and norm if the method includes them."""
        layout = self.feed_forward.layout
        hidden = self.feed_forward(hidden_states)
        if layout.output_dropout is not None:
            hidden = attrgetter(layout.output_dropout)(self.layer)(hidden)
        return hidden if layout.exit is None else attrgetter(layout.exit)(self.layer)(hidden + hidden_states)


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


def activation_name(activation: Any) -> str | None:
    """Return the key of `functional.ACTIVATIONS` for an activation module or function of a layer.

    Determined from the layer, not the config, because the config may not match the module that runs.

    Returns:
        The name; None for an activation without a fused implementation, which is called as a module.
    """
    if isinstance(activation, nn.GELU):
        return "gelu" if activation.approximate == "none" else "gelu_pytorch_tanh"
    return _ACTIVATION_NAMES.get(getattr(activation, "__name__", type(activation).__name__))
