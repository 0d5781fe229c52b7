"""Forward and backward passes of top-k attention, on plain tensors and without autograd."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from graftwork.methods.topk import kernels
from graftwork.methods.topk.activations import find
from graftwork.methods.topk.attention_scores import Rules, Scores, Tile, box, tiles
from graftwork.methods.topk.dropout import keep_mask
from graftwork.methods.topk.selection import ENTRY_BUDGET, index_dtype, select_beside, select_topk
from graftwork.surgery.precision import compute_dtype


class Settings(NamedTuple):
    """Settings of one call, shared by its forward and backward pass."""

    k: int | None
    scale: float
    activation: str
    dropout: float
    seed: int
    chunk_size: int | None
    softcap: float | None = None
    first: int = 0
    recent: int = 0

    def entries(self, keys: int) -> int | None:
        """Number of saved entries per query; None if all keys are kept."""
        return None if self.k is None else min(keys, self.k + self.first + self.recent)


class Kept(NamedTuple):
    """Tensors saved for the backward pass besides the inputs."""

    numbers: Float[Tensor, "batch heads queries kept"]
    """Weights if the activation is softmax, whose derivative depends on them alone; otherwise scores."""
    positions: Int[Tensor, "batch heads queries kept"] | None
    """Selected keys; None for all keys."""
    keep: Bool[Tensor, "batch heads queries kept"] | None
    """Dropout mask, True for kept weights; None without dropout."""
    sink: Float[Tensor, "batch heads queries"] | None = None
    """Weight of the sink; None without sinks."""


class Needs(NamedTuple):
    """Flags of the inputs that require a gradient."""

    query: bool
    key: bool
    value: bool
    bias: bool
    relative: bool
    sinks: bool


class Shapes(NamedTuple):
    """Shapes of the biases; the backward pass needs nothing else of them."""

    bias: torch.Size | None
    relative: torch.Size | None

    @classmethod
    def of(cls, rules: Rules) -> Shapes:
        """Return the shapes of the biases of `rules`."""
        return cls(*(None if part is None else part.shape for part in (rules.bias, rules.relative)))


def forward(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch groups keys width"],
    value: Float[Tensor, "batch groups keys value_width"],
    rules: Rules,
    settings: Settings,
    *,
    saves: bool,
) -> tuple[Float[Tensor, "batch heads queries value_width"], Kept | None]:
    """Compute o_i = Σ_{j∈T_i} w_ij v_j with w_i = φ(z_i) over the selected keys T_i, tile by tile.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        rules: Masks and biases.
        settings: Settings of the call.
        saves: Return the tensors that `Backward` needs.

    Returns:
        The output; and the saved tensors, or None if `saves` is false or the backward pass recomputes (k is None).
    """
    scores_of = Scores(query, key, rules, settings.scale, settings.softcap)
    sizes = scores_of.sizes
    output = value.new_zeros((*query.shape[:-1], value.shape[-1]))
    kept = reserve(query, sizes.keys, settings, sinks=rules.sinks is not None) if saves else None
    if value.shape[0] * value.shape[1] > 1:
        value = value.contiguous()
    softmax = settings.activation == "softmax"
    forbid = rules.empty if softmax else rules.forbid or settings.first + settings.recent > 0
    for tile in scores_of.tiles(settings.chunk_size):
        width = scores_of.visible(tile)
        scores = scores_of.of(tile, width)  # [batch, heads, rows, width]
        selected, index = select(scores_of, scores, tile, settings)  # [batch, heads, rows, kept]
        weights, sink = activated_with_sinks(selected, settings.activation, forbid, rules.sinks, tile)
        keep = keep_mask(weights.shape, settings.dropout, settings.seed, tile.number, query.device)
        if kept is not None:
            _store(kept, tile, weights if softmax else selected, index, keep, 0.0 if softmax else -torch.inf)
            if kept.sink is not None and sink is not None:
                tile.of_queries(kept.sink).copy_(sink)
        if width == 0:
            continue
        weights = tile.by_group(_dropped(weights, keep, settings.dropout))  # [pairs, repeats·rows, kept]
        index = None if index is None else tile.by_group(index)  # [pairs, repeats·rows, kept]
        dense = kernels.prefers_dense(None if index is None else index.shape[-1], width, query.device)
        # [batch, groups, keys, value width] → [pairs, keys, value width]
        table = tile.of_keys(value)[:, :, : width if dense else sizes.keys].to(weights.dtype).flatten(0, 1)
        entries = kernels.entries_of(index, table.shape[1], tile.by_group(scores) if dense else None)
        found = tile.of_queries(output)  # [batch, heads, rows, value width]
        found.copy_(entries.weighted(weights, table).view_as(found))  # from [pairs, repeats·rows, value width]
    return output, kept


def activated(scores: Float[Tensor, "*rows kept"], activation: str, forbid: bool) -> Float[Tensor, "*rows kept"]:
    """Compute w = φ(z), and exactly 0 where z is minus infinity, including rows without any allowed key.

    Args:
        scores: Scores of the kept keys.
        activation: "softmax", or a name in `ACTIVATIONS`.
        forbid: Mask entries of minus infinity. Softmax needs it only if a row can consist of them alone.
    """
    weights = torch.softmax(scores, dim=-1) if activation == "softmax" else find(activation).value(scores)
    return weights.masked_fill_(scores == -torch.inf, 0.0) if forbid else weights


def select(
    scores_of: Scores, scores: Float[Tensor, "batch heads rows keys"], tile: Tile, settings: Settings
) -> tuple[Float[Tensor, "batch heads rows kept"], Int[Tensor, "batch heads rows kept"] | None]:
    """Select the kept scores of a tile, with their positions; all scores and None without k."""
    if settings.k is None:
        return scores, None
    most = settings.first + settings.recent
    if most == 0:
        return select_topk(scores, settings.k)
    always = scores_of.always(tile, scores.shape[-1], settings.first, settings.recent)
    return select_beside(scores, always, settings.k, most)


def activated_with_sinks(
    scores: Float[Tensor, "batch heads rows kept"],
    activation: str,
    forbid: bool,
    sinks: Float[Tensor, " heads"] | None,
    tile: Tile,
) -> tuple[Float[Tensor, "batch heads rows kept"], Float[Tensor, "batch heads rows"] | None]:
    """Compute the weights of the kept keys and of the sink, w_j = exp(z_j) / (Σ_l exp(z_l) + exp(s)).

    Args:
        scores: Scores of the kept keys.
        activation: "softmax", or a name in `ACTIVATIONS`, which allows no sinks.
        forbid: See `activated`.
        sinks: Score s of the sink of every head of the model; None without sinks.
        tile: Tile of the scores.

    Returns:
        Weights of the keys; weight of the sink, or None without sinks.
    """
    if sinks is None:
        return activated(scores, activation, forbid), None
    sink = sinks[tile.heads].to(scores.dtype)[None, :, None, None]  # [1 heads 1 1]
    joined = torch.cat([scores, sink.expand(*scores.shape[:-1], 1)], dim=-1)  # [batch, heads, rows, kept + 1]
    weights = torch.softmax(joined, dim=-1)
    return weights[..., :-1], weights[..., -1]


class Backward:
    """Backward pass of one call, tile by tile.

    With w = φ(z), z = scale·q·kᵀ + b, o = w·v and the upstream gradient g = ∂L/∂o, over the selected entries:

        ∂L/∂v = wᵀ g
        ∂L/∂w = g vᵀ
        ∂L/∂z = w ⊙ (∂L/∂w − Σ_j w_j ∂L/∂w_j)    (softmax; otherwise ∂L/∂w ⊙ φ′(z))
        ∂L/∂q = scale · ∂L/∂z · k
        ∂L/∂k = scale · (∂L/∂z)ᵀ q
        ∂L/∂b = ∂L/∂z, summed over the broadcast axes of b
        ∂L/∂s = −Σ w_s Σ_j w_j ∂L/∂w_j           (score s and weight w_s of a sink)

    With a soft cap c, z = c·tanh(x/c) + b and x = scale·q·kᵀ, the gradients of q and k get the factor
    1 − tanh²(x/c), for which x is recomputed at the selected entries.

    Each tile writes its rows of the query gradient and adds to all other gradients.

    Args:
        query: Queries [batch heads queries width].
        key: Keys [batch groups keys width].
        value: Values [batch groups keys value_width].
        shapes: Shapes of the biases.
        settings: Settings of the call.
        needs: Gradients to compute.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, shapes: Shapes, settings: Settings, needs: Needs
    ) -> None:
        self.query, self.key, self.value, self.shapes = query, key, value, shapes
        self.settings, self.needs = settings, needs
        dtype = self.dtype = compute_dtype(query.dtype)
        self.query_gradient = torch.zeros_like(query) if needs.query else None
        self.key_gradient = key.new_zeros(key.shape, dtype=dtype) if needs.key else None
        self.value_gradient = value.new_zeros(value.shape, dtype=dtype) if needs.value else None
        self.bias_gradient = query.new_zeros(shapes.bias, dtype=dtype) if needs.bias and shapes.bias else None
        self.relative_gradient = (
            query.new_zeros(shapes.relative, dtype=dtype) if needs.relative and shapes.relative else None
        )
        self.sinks_gradient = query.new_zeros(query.shape[1], dtype=dtype) if needs.sinks else None

    def run(
        self, gradient: Float[Tensor, "batch heads queries value_width"], rules: Rules, kept: Kept | None
    ) -> tuple[Tensor | None, ...]:
        """Compute the gradients.

        Args:
            gradient: Upstream gradient ∂L/∂o.
            rules: Masks and biases; used only if scores are recomputed.
            kept: Tensors saved by `forward`; None recomputes the scores.

        Returns:
            One gradient per field of `Needs`, in that order; None for those not needed.
        """
        scores_of = Scores(self.query, self.key, rules, self.settings.scale, self.settings.softcap)
        sizes = scores_of.sizes
        saved = self.settings.entries(sizes.keys)
        sparse = not kernels.prefers_dense(saved, sizes.keys, self.query.device)
        parts = tiles(sizes, saved or 1, None, ENTRY_BUDGET) if sparse else scores_of.tiles(self.settings.chunk_size)
        for tile in parts:
            if kept is None:
                width = scores_of.visible(tile)
                scores = scores_of.of(tile, width)
                keep = keep_mask(
                    scores.shape, self.settings.dropout, self.settings.seed, tile.number, self.query.device
                )
                numbers, sink = scores, None
                if self.settings.activation == "softmax":
                    numbers, sink = activated_with_sinks(scores, "softmax", rules.empty, rules.sinks, tile)
                block = Kept(numbers, None, keep, sink)
            else:
                width = sizes.keys
                numbers, *others = (None if part is None else tile.of_queries(part) for part in kept)
                block = Kept(cast("Tensor", numbers), *others)
            self._tile(tile, tile.of_queries(gradient), block, scores_of.scaled_queries(tile), width)
        return (
            self.query_gradient,
            _narrow(self.key_gradient, self.key.dtype),
            _narrow(self.value_gradient, self.value.dtype),
            self.bias_gradient,
            self.relative_gradient,
            self.sinks_gradient,
        )

    def _tile(self, tile: Tile, gradient: Tensor, block: Kept, queries: Tensor, width: int) -> None:
        """Add the gradients of one tile; `width` is its number of keys."""
        needs, settings = self.needs, self.settings
        index = None if block.positions is None else tile.by_group(block.positions)  # [pairs, repeats·rows, kept]
        entries = kernels.entries_of(index, width)
        gradient = tile.by_group(gradient).to(self.dtype)  # [pairs, repeats·rows, value width]
        numbers = block.numbers.to(self.dtype)  # [batch, heads, rows, kept]
        softmax = settings.activation == "softmax"
        if self.value_gradient is not None:
            weights = numbers if softmax else activated(numbers, settings.activation, forbid=True)
            weights = _dropped(weights, block.keep, settings.dropout)
            self._add(self.value_gradient, tile, width, entries.collect(tile.by_group(weights), gradient))
        if not any(needs._replace(value=False)):
            return
        table = tile.of_keys(self.value)[:, :, :width].to(self.dtype).flatten(0, 1)  # [pairs, keys, value width]
        # ∂L/∂w, [pairs, repeats·rows, kept] → [batch, heads, rows, kept]
        part = _dropped(entries.products(gradient, table).view(numbers.shape), block.keep, settings.dropout)
        if softmax:
            part = numbers * part
            total = part.sum(-1, keepdim=True)  # [batch, heads, rows, 1]
            part = part.addcmul_(numbers, total, value=-1)
            if self.sinks_gradient is not None and block.sink is not None:
                self.sinks_gradient[tile.heads] -= (block.sink.to(self.dtype) * total.squeeze(-1)).sum((0, 2))
        else:
            part = find(settings.activation).backward(part, numbers).masked_fill_(numbers == -torch.inf, 0.0)
        self._add_biases(tile, part, block.positions)
        part = tile.by_group(part)  # ∂L/∂z, [pairs, repeats·rows, kept]
        table = tile.of_keys(self.key)[:, :, :width].to(self.dtype).flatten(0, 1)  # [pairs, keys, width]
        if settings.softcap is not None:
            slope = entries.products(queries, table).div_(settings.softcap).tanh_()  # [pairs, repeats·rows, kept]
            part = part - part * slope.square_()
        if self.query_gradient is not None:
            found = tile.of_queries(self.query_gradient)  # [batch, heads, rows, width]
            found.copy_((entries.weighted(part, table) * settings.scale).view_as(found))
        if self.key_gradient is not None:
            self._add(self.key_gradient, tile, width, entries.collect(part, queries))

    @staticmethod
    def _add(whole: Tensor, tile: Tile, width: int, part: Tensor) -> None:
        target = tile.of_keys(whole)[:, :, :width]  # [batch, groups, keys, width]
        target += part.view(target.shape)  # from [pairs, keys, width]

    def _add_biases(self, tile: Tile, part: Tensor, index: Tensor | None) -> None:
        """Add ∂L/∂z [batch heads rows kept] of a tile to the gradients of the biases."""
        device = part.device
        axes = [torch.arange(span.start, span.stop, device=device) for span in (tile.batch, tile.heads, tile.rows)]
        # coordinates [batch, 1, 1, 1], [heads, 1, 1] and [rows, 1], broadcast to [batch, heads, rows, kept]
        batch, heads, rows = axes[0][:, None, None, None], axes[1][:, None, None], axes[2][:, None]
        keys = torch.arange(part.shape[-1], device=device) if index is None else index
        if self.relative_gradient is not None:
            # all positions are the same for every batch element, so sum first: [1, heads, rows, keys]
            shared = part.sum(0, keepdim=True) if index is None else part
            _scatter_add(self.relative_gradient, (heads, keys - rows + self.query.shape[2] - 1), shared)
        if self.bias_gradient is not None and index is None:
            target = box(self.bias_gradient, tile, part.shape[-1])
            target += part.sum_to_size(target.shape)
        elif self.bias_gradient is not None:
            _scatter_add(self.bias_gradient, (batch, heads, rows, keys), part)


def _scatter_add(whole: Tensor, axes: tuple[Tensor, ...], part: Tensor) -> None:
    """Add `part` to `whole` at coordinates `axes`, broadcast to the shape of `part`; axes of size 1 are summed over."""
    positions = torch.zeros((), dtype=torch.long, device=part.device)
    for axis, size, stride in zip(axes, whole.shape, whole.stride(), strict=True):
        if size > 1:
            positions = positions + axis.long() * stride
    # flat positions into whole, one per element of part
    whole.view(-1).scatter_add_(0, positions.expand(part.shape).reshape(-1), part.reshape(-1))


def reserve(
    query: Float[Tensor, "batch heads queries width"], keys: int, settings: Settings, *, sinks: bool
) -> Kept | None:
    """Allocate the tensors saved for the backward pass; None if it recomputes (k is None)."""
    saved = settings.entries(keys)
    if saved is None:
        return None
    shape = (*query.shape[:-1], saved)
    return Kept(
        numbers=query.new_empty(shape),
        positions=query.new_empty(shape, dtype=index_dtype(keys)),
        keep=query.new_empty(shape, dtype=torch.bool) if settings.dropout > 0.0 else None,
        sink=query.new_empty(query.shape[:-1], dtype=compute_dtype(query.dtype)) if sinks else None,
    )


def _store(kept: Kept, tile: Tile, numbers: Tensor, index: Tensor | None, keep: Tensor | None, filler: float) -> None:
    """Copy the selection of a tile [batch heads rows width] into the saved tensors, padded to k with `filler`."""
    width = numbers.shape[-1]
    for whole, part in zip(kept[:3], (numbers, index, keep), strict=True):
        if whole is not None and part is not None:
            tile.of_queries(whole)[..., :width] = part
    # the first queries of a causal layer can see fewer than k keys; the padding positions must be distinct as well
    if kept.positions is not None and width < kept.positions.shape[-1]:
        rest = torch.arange(width, kept.positions.shape[-1], device=numbers.device)
        tile.of_queries(kept.numbers)[..., width:] = filler
        tile.of_queries(kept.positions)[..., width:] = rest


def _dropped(weights: Tensor, keep: Tensor | None, dropout: float) -> Tensor:
    return weights if keep is None else weights * keep.to(weights.dtype).mul_(1.0 / (1.0 - dropout))


def _narrow(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if gradient is None else gradient.to(dtype)
