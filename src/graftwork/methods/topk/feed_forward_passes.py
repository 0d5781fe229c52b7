"""Forward and backward passes of top-k feed-forward layers, on plain tensors and without autograd."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from graftwork.methods.topk import kernels
from graftwork.methods.topk.activations import Activation, find
from graftwork.methods.topk.dropout import keep_mask
from graftwork.methods.topk.selection import ENTRY_BUDGET, index_dtype, row_blocks, select_topk
from graftwork.surgery.precision import compute_dtype


class Layer(NamedTuple):
    """Weights of a feed-forward layer and biases of its hidden units; `up` is None for a plain layer."""

    gate: Float[Tensor, "units hidden"]
    up: Float[Tensor, "units hidden"] | None
    out: Float[Tensor, "out units"]
    gate_bias: Float[Tensor, " units"] | None
    up_bias: Float[Tensor, " units"] | None


class Needs(NamedTuple):
    """Flags of the tensors that require a gradient: the input, then each field of `Layer`."""

    x: bool
    gate: bool
    up: bool
    out: bool
    gate_bias: bool
    up_bias: bool


class Settings(NamedTuple):
    """Settings of one call, shared by its forward and backward pass."""

    k: int | None
    activation: str
    selection: str
    dropout: float
    seed: int
    chunk_size: int | None


class Kept(NamedTuple):
    """Pre-activations and positions of the kept units, saved for the backward pass."""

    gate: Float[Tensor, "tokens kept"]
    """Pre-activations γ of the gate, or of the only projection of a plain layer."""
    up: Float[Tensor, "tokens kept"] | None
    """Factors u of a gated layer."""
    positions: Int[Tensor, "tokens kept"] | None
    """Selected units; None for all units."""
    keep: Bool[Tensor, "tokens kept"] | None
    """Dropout mask, True for kept activations; None without dropout."""

    def part(self, start: int, stop: int) -> Kept:
        """Return the part of tokens `start` to `stop`."""
        gate, *others = (None if part is None else part[start:stop] for part in self)
        return Kept(cast("Tensor", gate), *others)


def forward(
    x: Float[Tensor, "tokens hidden"], layer: Layer, settings: Settings, *, saves: bool
) -> tuple[Float[Tensor, "tokens out"], Kept | None]:
    """Compute y = W_out a with a = φ(γ) ⊙ u over the k selected units of each token, block by block.

    γ = W_gate x + b_gate and u = W_up x + b_up; u = 1 in a plain layer. The output bias is not added.

    Args:
        x: Token vectors.
        layer: Weights.
        settings: Settings of the call.
        saves: Return the tensors that `backward` needs.

    Returns:
        The output; and the saved tensors, or None if `saves` is false or the backward pass recomputes (k is None).
    """
    units = layer.gate.shape[0]
    output = x.new_empty((x.shape[0], layer.out.shape[0]), dtype=layer.out.dtype)
    kept = reserve(x, layer, settings) if saves else None
    table = _table(layer.out.t(), settings.k)  # [units, out]
    for number, start, stop in _blocks(x, layer, settings):
        block = select_units(x[start:stop], layer, settings)
        hidden = hidden_units(block.gate, block.up, settings.activation)  # [rows, kept]
        keep = keep_mask(hidden.shape, settings.dropout, settings.seed, number, x.device)
        hidden = _dropped(hidden, keep, settings.dropout)
        # T5 keeps its output weights in float32 in half-precision models, so the output has their dtype
        output[start:stop] = kernels.entries_of(block.positions, units).weighted(hidden, table)
        for whole, part in zip(kept or (), block._replace(keep=keep), strict=kept is not None):
            if whole is not None and part is not None:
                whole[start:stop] = part
    return output, kept


def backward(
    gradient: Float[Tensor, "tokens out"],
    x: Float[Tensor, "tokens hidden"],
    layer: Layer,
    kept: Kept | None,
    settings: Settings,
    needs: Needs,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of one call, block by block.

    With a = φ(γ) ⊙ u, y = W_out a and the upstream gradient g = ∂L/∂y, over the selected units:

        ∂L/∂W_out = gᵀ a
        ∂L/∂a = g W_out
        ∂L/∂γ = ∂L/∂a ⊙ u ⊙ φ′(γ),  ∂L/∂u = ∂L/∂a ⊙ φ(γ)
        ∂L/∂W_gate = (∂L/∂γ)ᵀ x,  ∂L/∂b_gate = Σ_tokens ∂L/∂γ; W_up and b_up likewise from ∂L/∂u
        ∂L/∂x = ∂L/∂γ W_gate + ∂L/∂u W_up

    Args:
        gradient: Upstream gradient g.
        x: Token vectors.
        layer: Weights.
        kept: Tensors saved by `forward`; None recomputes the pre-activations.
        settings: Settings of the call.
        needs: Gradients to compute.

    Returns:
        One gradient per field of `Needs`, in that order; None for those not needed.
    """
    units, activation, k = layer.gate.shape[0], find(settings.activation), settings.k
    sums: dict[str, Tensor] = {}
    x_gradient = torch.empty_like(x) if needs.x else None
    table = _table(layer.out.t(), k) if any(needs._replace(out=False)) else None
    inner = {"gate": layer.gate, "up": layer.up} if needs.x else {}
    tables = {name: _table(weight, k) for name, weight in inner.items() if weight is not None}
    sparse = not kernels.prefers_dense(k, units, x.device)
    for number, start, stop in _blocks(x, layer, settings, ENTRY_BUDGET if sparse else None):
        rows, g = x[start:stop], gradient[start:stop]
        if sparse:
            rows, g = _wide(rows), _wide(g)
        if kept is None:
            keep = keep_mask((stop - start, units), settings.dropout, settings.seed, number, x.device)
            block = select_units(rows, layer, settings)._replace(keep=keep)
        else:
            block = kept.part(start, stop)
        entries = kernels.entries_of(block.positions, units)
        if needs.out:
            hidden = _dropped(hidden_units(block.gate, block.up, settings.activation), block.keep, settings.dropout)
            _add(sums, "out", entries.collect(hidden, g))
        if table is None:
            continue
        hidden_gradient = _dropped(_wide(entries.products(g, table)), block.keep, settings.dropout)  # [rows, kept]
        parts = _unit_gradients(hidden_gradient, block, activation)
        if x_gradient is not None:
            x_gradient[start:stop] = sum(entries.weighted(parts[name], tables[name]) for name in parts)
        for name, part in parts.items():
            if getattr(needs, name):
                _add(sums, name, entries.collect(part, rows))
            if getattr(needs, f"{name}_bias"):
                ones = part.new_ones((part.shape[0], 1))  # [rows, 1]
                _add(sums, f"{name}_bias", entries.collect(part, ones).squeeze(-1))  # [units, 1] → [units]
    if "out" in sums:
        sums["out"] = sums["out"].t()  # [units, out] → [out, units]
    return (x_gradient, *_results(sums, layer, needs))


def select_units(x: Float[Tensor, "rows hidden"], layer: Layer, settings: Settings) -> Kept:
    """Project a block of tokens and select the k highest-ranked units of each.

    Args:
        x: Token vectors of the block.
        layer: Weights.
        settings: Settings of the call; `selection` ranks by γ ("score", "gate"), |φ(γ)| ("abs_act") or |φ(γ)·u|
            ("product"). k None keeps all units.

    Returns:
        Pre-activations and positions [rows kept], without a dropout mask; positions is None if k is None.
    """
    selection = settings.selection
    gate = F.linear(x, layer.gate, layer.gate_bias)  # [rows, units]
    up = None
    if layer.up is not None and (settings.k is None or selection == "product"):
        up = F.linear(x, layer.up, layer.up_bias)
    if settings.k is None:
        return Kept(gate, up, None, None)
    rank = gate
    if selection not in ("score", "gate"):
        rank = find(settings.activation).value(gate)
        rank = (rank if up is None else rank.mul_(up)).abs_()
    _, index = select_topk(rank, settings.k)  # [rows, kept]
    if up is not None:
        up = up.gather(1, index)
    elif layer.up is not None:
        up = _up_at(x, layer.up, layer.up_bias, index)
    return Kept(gate.gather(1, index), up, index, None)


def hidden_units(
    gate: Float[Tensor, "rows kept"], up: Float[Tensor, "rows kept"] | None, activation: str
) -> Float[Tensor, "rows kept"]:
    """Compute a = φ(γ) ⊙ u, or a = φ(γ) if `up` is None, in at least float32."""
    hidden = find(activation).value(_wide(gate))
    return hidden if up is None else hidden.mul_(_wide(up))


def _unit_gradients(gradient: Tensor, block: Kept, activation: Activation) -> dict[str, Tensor]:
    """∂L/∂γ as "gate" and ∂L/∂u as "up" from ∂L/∂a, all [rows kept]."""
    gate = _wide(block.gate)
    if block.up is None:
        return {"gate": activation.backward(gradient, gate)}
    return {
        "gate": activation.backward(gradient * _wide(block.up), gate),
        "up": activation.value(gate).mul_(gradient),
    }


def _up_at(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor) -> Tensor:
    """Up-projection u [rows kept] at the selected units only."""
    up = kernels.entries_of(index, weight.shape[0]).products(_wide(x), _table(weight, index.shape[1]))
    return up if bias is None else up + bias[index]


def _blocks(
    x: Tensor, layer: Layer, settings: Settings, entry_budget: int | None = None
) -> Iterator[tuple[int, int, int]]:
    """Number, start and exclusive end of each block; sized by kept entries if `entry_budget` is set, else by units."""
    if entry_budget is not None:
        blocks = row_blocks(x.shape[0], settings.k or 1, None, entry_budget)
    else:
        blocks = row_blocks(x.shape[0], layer.gate.shape[0], settings.chunk_size)
    return ((number, start, stop) for number, (start, stop) in enumerate(blocks))


def reserve(x: Float[Tensor, "tokens hidden"], layer: Layer, settings: Settings) -> Kept | None:
    """Allocate the tensors saved for the backward pass; None if it recomputes (k is None)."""
    if settings.k is None:
        return None
    shape = (x.shape[0], settings.k)
    return Kept(
        gate=x.new_empty(shape),
        up=None if layer.up is None else x.new_empty(shape),
        positions=x.new_empty(shape, dtype=index_dtype(layer.gate.shape[0])),
        keep=x.new_empty(shape, dtype=torch.bool) if settings.dropout > 0.0 else None,
    )


def _table(weight: Tensor, k: int | None) -> Tensor:
    """Weight with one row per unit; contiguous and at least float32 if single rows are gathered from it."""
    if kernels.prefers_dense(k, weight.shape[0], weight.device):
        return weight
    return _wide(weight).contiguous()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(compute_dtype(tensor.dtype))


def _dropped(hidden: Tensor, keep: Tensor | None, dropout: float) -> Tensor:
    return hidden if keep is None else hidden * keep.to(hidden.dtype).mul_(1.0 / (1.0 - dropout))


def _add(sums: dict[str, Tensor], name: str, part: Tensor) -> None:
    if name in sums:
        sums[name] += part
    else:
        sums[name] = _wide(part)


def _results(sums: dict[str, Tensor], layer: Layer, needs: Needs) -> Iterator[Tensor | None]:
    for name, weight in layer._asdict().items():
        if weight is None or not getattr(needs, name):
            yield None
        else:
            # without tokens there is no block, and the gradient is zero
            yield sums.pop(name).to(weight.dtype) if name in sums else torch.zeros_like(weight)
