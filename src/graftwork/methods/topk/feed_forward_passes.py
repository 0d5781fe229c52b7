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
from graftwork.methods.topk.selection import ENTRY_BUDGET, compute_dtype, index_dtype, row_blocks, select_topk


class Layer(NamedTuple):
    """Weights of a feed-forward layer, biases of the hidden units included; a plain one has no `up`."""

    gate: Float[Tensor, "units hidden"]
    up: Float[Tensor, "units hidden"] | None
    out: Float[Tensor, "out units"]
    gate_bias: Float[Tensor, " units"] | None
    up_bias: Float[Tensor, " units"] | None


class Needs(NamedTuple):
    """Which gradients are wanted: of the input, then of each part of the layer."""

    x: bool
    gate: bool
    up: bool
    out: bool
    gate_bias: bool
    up_bias: bool


class Settings(NamedTuple):
    """What both passes of one call must agree on."""

    k: int | None
    activation: str
    selection: str
    dropout: float
    seed: int
    chunk_size: int | None


class Kept(NamedTuple):
    """Pre-activations and positions of the kept units of some tokens; without positions, of all units."""

    gate: Float[Tensor, "tokens kept"]
    up: Float[Tensor, "tokens kept"] | None
    positions: Int[Tensor, "tokens kept"] | None
    keep: Bool[Tensor, "tokens kept"] | None
    """What dropout leaves."""

    def part(self, start: int, stop: int) -> Kept:
        """What is kept of some of the tokens."""
        gate, *others = (None if part is None else part[start:stop] for part in self)
        return Kept(cast("Tensor", gate), *others)


def forward(
    x: Float[Tensor, "tokens hidden"], layer: Layer, settings: Settings, *, saves: bool
) -> tuple[Float[Tensor, "tokens out"], Kept | None]:
    """Compute the layer without its output bias and, if `saves`, what `backward` needs beside the input."""
    units = layer.gate.shape[0]
    output = x.new_empty((x.shape[0], layer.out.shape[0]), dtype=layer.out.dtype)
    kept = reserve(x, layer, settings) if saves else None
    table = _table(layer.out.t(), settings.k)
    for number, start, stop in _blocks(x, layer, settings):
        block = select_units(x[start:stop], layer, settings)
        hidden = hidden_units(block.gate, block.up, settings.activation)
        keep = keep_mask(hidden.shape, settings.dropout, settings.seed, number, x.device)
        hidden = _dropped(hidden, keep, settings.dropout)
        # T5 keeps the output weights in single precision in half-precision models, hence their dtype
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
    """Compute the gradients that are wanted, in the order of `Needs`."""
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
        hidden_gradient = _dropped(_wide(entries.products(g, table)), block.keep, settings.dropout)
        parts = _unit_gradients(hidden_gradient, block, activation)
        if x_gradient is not None:
            x_gradient[start:stop] = sum(entries.weighted(parts[name], tables[name]) for name in parts)
        for name, part in parts.items():
            if getattr(needs, name):
                _add(sums, name, entries.collect(part, rows))
            if getattr(needs, f"{name}_bias"):
                _add(sums, f"{name}_bias", entries.collect(part, part.new_ones((part.shape[0], 1))).squeeze(-1))
    if "out" in sums:
        sums["out"] = sums["out"].t()
    return (x_gradient, *_results(sums, layer, needs))


def select_units(x: Float[Tensor, "rows hidden"], layer: Layer, settings: Settings) -> Kept:
    """Project a block of tokens and pick the k best units of each; all units, without positions, if k is None."""
    selection = settings.selection
    gate = F.linear(x, layer.gate, layer.gate_bias)
    up = None
    if layer.up is not None and (settings.k is None or selection == "product"):
        up = F.linear(x, layer.up, layer.up_bias)
    if settings.k is None:
        return Kept(gate, up, None, None)
    rank = gate
    if selection not in ("score", "gate"):
        rank = find(settings.activation).value(gate)
        rank = (rank if up is None else rank.mul_(up)).abs_()
    _, index = select_topk(rank, settings.k)
    if up is not None:
        up = up.gather(1, index)
    elif layer.up is not None:
        up = _up_at(x, layer.up, layer.up_bias, index)
    return Kept(gate.gather(1, index), up, index, None)


def hidden_units(gate: Tensor, up: Tensor | None, activation: str) -> Float[Tensor, "rows kept"]:
    """Compute φ(γ), times u in a gated layer, in at least single precision."""
    hidden = find(activation).value(_wide(gate))
    return hidden if up is None else hidden.mul_(_wide(up))


def _unit_gradients(gradient: Tensor, block: Kept, activation: Activation) -> dict[str, Tensor]:
    gate = _wide(block.gate)
    if block.up is None:
        return {"gate": activation.backward(gradient, gate)}
    return {
        "gate": activation.backward(gradient * _wide(block.up), gate),
        "up": activation.value(gate).mul_(gradient),
    }


def _up_at(x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor) -> Tensor:
    up = kernels.entries_of(index, weight.shape[0]).products(_wide(x), _table(weight, index.shape[1]))
    return up if bias is None else up + bias[index]


def _blocks(
    x: Tensor, layer: Layer, settings: Settings, entry_budget: int | None = None
) -> Iterator[tuple[int, int, int]]:
    """Number, first row and end of each block; blocks of kept entries only if there is a budget for them."""
    if entry_budget is not None:
        blocks = row_blocks(x.shape[0], settings.k or 1, None, entry_budget)
    else:
        blocks = row_blocks(x.shape[0], layer.gate.shape[0], settings.chunk_size)
    return ((number, start, stop) for number, (start, stop) in enumerate(blocks))


def reserve(x: Tensor, layer: Layer, settings: Settings) -> Kept | None:
    """Make buffers for what is kept of all tokens; None if the backward pass recomputes."""
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
    """The weight with a row per unit, in one piece and at least single precision where its rows are read one by one."""
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
            # without a token there was nothing to add
            yield sums.pop(name).to(weight.dtype) if name in sums else torch.zeros_like(weight)
