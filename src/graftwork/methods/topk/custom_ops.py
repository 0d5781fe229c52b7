"""Forward and backward passes as custom operators, which `torch.compile` keeps in one graph without tracing them.

Custom operators accept and return only tensors and numbers, so a lazy mask is split into its fields, and an absent
tensor is passed as an empty one. The operator schema is inferred from the annotations, hence plain `Tensor`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from graftwork.errors import ConfigError
from graftwork.methods.topk import attention_passes as attending
from graftwork.methods.topk import feed_forward_passes as feeding
from graftwork.methods.topk.attention_scores import Rules
from graftwork.methods.topk.dropout import draw_seed, precise
from graftwork.surgery.masks import LazyMask
from graftwork.surgery.precision import compute_dtype


def feed_forward(
    tokens: Float[Tensor, "tokens hidden"], layer: feeding.Layer, settings: feeding.Settings
) -> Float[Tensor, "tokens out"]:
    """Call the feed-forward operator under `torch.compile`."""
    k, activation, selection, dropout, _, chunk_size = settings
    seed = draw_seed(dropout)
    return feed_forward_operator(tokens, *layer, seed, k, activation, selection, dropout, chunk_size)[0]


def attention(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch groups keys width"],
    value: Float[Tensor, "batch groups keys value_width"],
    rules: Rules,
    settings: attending.Settings,
) -> Float[Tensor, "batch heads queries value_width"]:
    """Call the attention operator under `torch.compile`.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        rules: Masks and biases.
        settings: Settings of the call; its seed is ignored and drawn inside the graph.

    Raises:
        ConfigError: If the mask has a predicate of scalars, a Python function that cannot be part of a graph.
    """
    mask, place, padding, allowed = rules.mask, None, None, rules.allowed
    if mask is not None and mask.predicate is not None:
        if mask.vectorised:
            raise ConfigError(
                "The lazy mask has a predicate of scalars, a Python function that cannot enter a compiled graph. "
                "Expected padding, causality or a sliding window. Call topk_attention outside torch.compile, or pass "
                "`mask.dense()`."
            )
        # a sliding window as a mask [batch or 1, 1, queries, keys]; operators accept no functions
        allowed, mask = mask.block(0, mask.queries, device=query.device), None
    if mask is not None:
        place, padding = [int(mask.causal), mask.query_offset, mask.key_offset], mask.padding
    k, scale, activation, dropout, _, chunk_size, softcap, first, recent = settings
    biases = (rules.bias, rules.relative, rules.sinks)
    tensors = (query, key, value, *biases, allowed, padding, rules.starts, draw_seed(dropout))
    numbers = (place, k, scale, activation, dropout, chunk_size, softcap, first, recent, rules.shift)
    return attention_operator(*tensors, *numbers)[0]


@torch.library.custom_op("graftwork::topk_feed_forward", mutates_args=())
def feed_forward_operator(
    x: Tensor,
    gate: Tensor,
    up: Tensor | None,
    out: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    seed: Tensor | None,
    k: int | None,
    activation: str,
    selection: str,
    dropout: float,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run `feed_forward_passes.forward`.

    Args:
        x: Token vectors [tokens hidden].
        gate: Weights of the gate [units hidden].
        up: Up-projection [units hidden]; None in plain layers.
        out: Output weights [out units].
        gate_bias: Biases of the gate [units].
        up_bias: Biases of the up-projection [units].
        seed: Seed of the dropout mask, scalar; None without dropout.
        k: Units kept per token; None for all.
        activation: Name in `ACTIVATIONS`.
        selection: Ranking of the units.
        dropout: Rate at which kept activations are dropped.
        chunk_size: Tokens scored at once.

    Returns:
        Output [tokens out], and the saved gate, up, positions and keep, [tokens kept] each or empty.
    """
    settings = feeding.Settings(k, activation, selection, dropout, _number(seed), chunk_size)
    with precise(x.device):
        output, kept = feeding.forward(x, feeding.Layer(gate, up, out, gate_bias, up_bias), settings, saves=True)
    numbers, factors, positions, keep = _present(kept or (None,) * 4, x)
    return output, numbers, factors, positions, keep


@feed_forward_operator.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    layer = feeding.Layer(*arguments[:5])
    k, activation, selection, dropout, chunk_size = arguments[6:]
    settings = feeding.Settings(k, activation, selection, dropout, 0, chunk_size)
    output = x.new_empty((x.shape[0], layer.out.shape[0]), dtype=layer.out.dtype)
    return output, *_present(feeding.reserve(x, layer, settings) or (None,) * 4, x)


@torch.library.custom_op("graftwork::topk_feed_forward_backward", mutates_args=())
def feed_forward_backward_operator(
    tensors: Sequence[Tensor],
    needs: Sequence[bool],
    seed: Tensor | None,
    k: int | None,
    activation: str,
    selection: str,
    dropout: float,
    chunk_size: int | None,
) -> list[Tensor]:
    """Run `feed_forward_passes.backward`.

    Args:
        tensors: Upstream gradient, x, the five fields of `Layer`, and the four fields of `Kept`.
        needs: Fields of `Needs`.
        seed: Seed of the dropout mask, scalar; None without dropout.
        k: As in `feed_forward_operator`, and so are the following.
        activation: Name in `ACTIVATIONS`.
        selection: Ranking of the units.
        dropout: Rate at which kept activations are dropped.
        chunk_size: Tokens scored at once.

    Returns:
        One gradient per field of `Needs`; empty for those not needed.
    """
    gradient, x, *rest = tensors
    parts = _absent(rest)
    layer, kept = feeding.Layer(*parts[:5]), None if parts[5] is None else feeding.Kept(*parts[5:])
    settings = feeding.Settings(k, activation, selection, dropout, _number(seed), chunk_size)
    with precise(x.device):
        found = feeding.backward(gradient, x, layer, kept, settings, feeding.Needs(*needs))
    return _present(found, x)


@feed_forward_backward_operator.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(tensors: Sequence[Tensor], needs: Sequence[bool], *arguments: Any) -> list[Tensor]:
    return [_like(part, need) for part, need in zip(tensors[1:7], needs, strict=True)]


def _feed_forward_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, *layer = inputs[:6]
    ctx.numbers = inputs[7:]
    ctx.save_for_backward(x, *_present(layer, x), *output[1:], inputs[6])
    ctx.set_materialize_grads(False)


def _feed_forward_gradient(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:6])
    found = feed_forward_backward_operator([gradient, *tensors], needs, seed, *ctx.numbers)
    return (*(part if need else None for part, need in zip(found, needs, strict=True)), *[None] * 6)


feed_forward_operator.register_autograd(  # pyright: ignore[reportUnknownMemberType]
    _feed_forward_gradient, setup_context=_feed_forward_context
)


@torch.library.custom_op("graftwork::topk_attention", mutates_args=())
def attention_operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    relative: Tensor | None,
    sinks: Tensor | None,
    allowed: Tensor | None,
    padding: Tensor | None,
    starts: Tensor | None,
    seed: Tensor | None,
    place: Sequence[int] | None,
    k: int | None,
    scale: float,
    activation: str,
    dropout: float,
    chunk_size: int | None,
    softcap: float | None,
    first: int,
    recent: int,
    shift: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run `attention_passes.forward`.

    Args:
        query: Queries [batch heads queries width].
        key: Keys [batch groups keys width].
        value: Values [batch groups keys value_width].
        bias: Additive bias [batch_or_1 heads_or_1 queries_or_1 keys_or_1].
        relative: Relative bias [heads_or_1 distances].
        sinks: Score of the sink of each head [heads].
        allowed: Boolean mask [batch_or_1 heads_or_1 queries_or_1 keys_or_1].
        padding: Padding of the lazy mask [batch_or_1 keys].
        starts: First real key of each row [batch].
        seed: Seed of the dropout mask, scalar; None without dropout.
        place: `causal`, `query_offset` and `key_offset` of the lazy mask; None without a lazy mask.
        k: Keys kept per query; None for all.
        scale: Factor on q·k.
        activation: "softmax", or a name in `ACTIVATIONS`.
        dropout: Rate at which kept weights are dropped.
        chunk_size: Queries scored at once.
        softcap: Bound of the scores.
        first: First keys that are kept beside the k best.
        recent: Recent keys that are kept beside the k best.
        shift: Position of query 0 among the keys.

    Returns:
        Output [batch heads queries value_width]; the saved numbers, positions and keep, [batch heads queries kept] each
        or empty; the saved weight of the sink [batch heads queries] or empty.
    """
    rules = Rules(_mask(query, key, place, padding), allowed, bias, relative, sinks, starts, shift)
    settings = attending.Settings(k, scale, activation, dropout, _number(seed), chunk_size, softcap, first, recent)
    with precise(query.device):
        output, kept = attending.forward(query, key, value, rules, settings, saves=True)
    numbers, positions, keep, sink = _present(kept or (None,) * 4, query)
    return output, numbers, positions, keep, sink


@attention_operator.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    sinks = arguments[2]
    k, scale, activation, dropout, chunk_size, softcap, first, recent, _ = arguments[8:]
    settings = attending.Settings(k, scale, activation, dropout, 0, chunk_size, softcap, first, recent)
    output = value.new_empty((*query.shape[:-1], value.shape[-1]))
    kept = attending.reserve(query, key.shape[2], settings, sinks=sinks is not None)
    return output, *_present(kept or (None,) * 4, query)


@torch.library.custom_op("graftwork::topk_attention_backward", mutates_args=())
def attention_backward_operator(
    tensors: Sequence[Tensor],
    bias_shape: Sequence[int],
    relative_shape: Sequence[int],
    needs: Sequence[bool],
    seed: Tensor | None,
    place: Sequence[int] | None,
    k: int | None,
    scale: float,
    activation: str,
    dropout: float,
    chunk_size: int | None,
    softcap: float | None,
    first: int,
    recent: int,
    shift: int,
) -> list[Tensor]:
    """Run `attention_passes.Backward`.

    Args:
        tensors: Upstream gradient, query, key, value, bias, relative, sinks, allowed, padding, and the four fields of
            `Kept`.
        bias_shape: Shape of the additive bias; empty without one.
        relative_shape: Shape of the relative bias; empty without one.
        needs: Fields of `Needs`.
        seed: Seed of the dropout mask, scalar; None without dropout.
        place: As in `attention_operator`, and so are the following.
        k: Keys kept per query; None for all.
        scale: Factor on q·k.
        activation: "softmax", or a name in `ACTIVATIONS`.
        dropout: Rate at which kept weights are dropped.
        chunk_size: Queries scored at once.
        softcap: Bound of the scores.
        first: First keys that are kept beside the k best.
        recent: Recent keys that are kept beside the k best.
        shift: Position of query 0 among the keys.

    Returns:
        One gradient per field of `Needs`; empty for those not needed.
    """
    gradient, query, key, value, *rest = tensors
    bias, relative, sinks, allowed, padding, *kept = _absent(rest)
    settings = attending.Settings(k, scale, activation, dropout, _number(seed), chunk_size, softcap, first, recent)
    shapes = attending.Shapes(torch.Size(bias_shape) or None, torch.Size(relative_shape) or None)
    rules = Rules(_mask(query, key, place, padding), allowed, bias, relative, sinks, None, shift)
    with precise(query.device):
        passes = attending.Backward(query, key, value, shapes, settings, attending.Needs(*needs))
        found = passes.run(gradient, rules, None if kept[0] is None else attending.Kept(*kept))
    return _present(found, query)


@attention_backward_operator.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(
    tensors: Sequence[Tensor], bias_shape: Sequence[int], relative_shape: Sequence[int], needs: Sequence[bool], *_: Any
) -> list[Tensor]:
    query, dtype = tensors[1], compute_dtype(tensors[1].dtype)
    found = [_like(part, need) for part, need in zip(tensors[1:4], needs[:3], strict=True)]
    for shape, need in zip((bias_shape, relative_shape, query.shape[1:2]), needs[3:], strict=True):
        found.append(query.new_empty(shape, dtype=dtype) if need else query.new_empty(0))
    return found


def _attention_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, bias, relative, sinks, allowed, padding, _, seed = inputs[:10]
    ctx.numbers = inputs[10:]
    ctx.biases = [((), None) if part is None else (part.shape, part.dtype) for part in (bias, relative, sinks)]
    # masks and biases only decide which scores are kept; without k the backward pass recomputes the scores
    again = (bias, relative, sinks, allowed, padding) if inputs[11] is None else (None,) * 5
    ctx.save_for_backward(query, key, value, *_present(again, query), *output[1:], seed)
    ctx.set_materialize_grads(False)


def _attention_gradient(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:6])
    shapes = [list(shape) for shape, _ in ctx.biases[:2]]
    found = attention_backward_operator([gradient, *tensors], *shapes, needs, seed, *ctx.numbers)
    dtypes = [part.dtype for part in tensors[:3]] + [dtype for _, dtype in ctx.biases]
    wanted = [part.to(dtype) if need else None for part, need, dtype in zip(found, needs, dtypes, strict=True)]
    return (*wanted, *[None] * 14)


attention_operator.register_autograd(  # pyright: ignore[reportUnknownMemberType]
    _attention_gradient, setup_context=_attention_context
)


def _mask(query: Tensor, key: Tensor, place: Sequence[int] | None, padding: Tensor | None) -> LazyMask | None:
    if place is None:
        return None
    causal, query_offset, key_offset = place
    return LazyMask(query.shape[0], query.shape[2], key.shape[2], bool(causal), query_offset, key_offset, padding)


def _number(seed: Tensor | None) -> int:
    """Value of a seed; 0 without dropout."""
    return 0 if seed is None else int(seed)


def _like(part: Tensor, need: bool) -> Tensor:
    """Empty gradient of `part`, with its shape if it is needed."""
    return part.new_empty(part.shape if need else (0,))


def _present(parts: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """Replace None by an empty tensor."""
    return [like.new_empty(0) if part is None else part.contiguous() for part in parts]


def _absent(parts: Sequence[Tensor]) -> list[Any]:
    """Replace empty tensors by None."""
    return [None if part.numel() == 0 else part for part in parts]
