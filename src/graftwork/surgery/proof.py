"""Proof of feed-forward layouts that were matched by structure: each is compared with the module's own computation."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, cast

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from graftwork.surgery.experts import run_experts
from graftwork.surgery.families import FeedForwardLayout
from graftwork.surgery.structure import widths

_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest relative difference between a module and its rebuilt computation, by type of the numbers."""
_TOKENS = 6
_SCALE = 4.0
"""Standard deviation of random inputs; large enough to reach clamps of activations."""


class MismatchError(Exception):
    """Reason for which a module does not compute what its layout describes."""


def prove_layer(module: nn.Module, layout: FeedForwardLayout) -> FeedForwardLayout:
    """Compare a feed-forward layer with y = W₂(φ(W₁x) ⊙ W₃x) of its parts, and find the places of its dropout.

    Args:
        module: The layer, on any device but meta.
        layout: Layout to prove.

    Returns:
        The layout with its dropout.

    Raises:
        MismatchError: If the module computes something else, or drops activations in a way that it does not show.
    """
    projection: Any = attrgetter(layout.input)(module)
    found = widths(projection)
    if found is None:
        raise MismatchError("the input projection has no widths")
    x = _random(projection, _TOKENS, found[0])
    units = found[1] // 2 if layout.fused else found[1]
    call: Callable[[Tensor], Any] = module if layout.entry == "forward" else getattr(module, str(layout.entry))
    with evaluated(module), torch.no_grad():
        with _seen(module, nn.Dropout) as inputs:
            own = called(call, x)
        compare(own, _rebuilt(module, layout, x))
        layout = replace(layout, **_dropout(inputs, layout, units, found[0]))
        for each in module.modules():
            each.training = not isinstance(each, nn.Dropout)
        compare(called(call, x), own, "in training mode it computes something else (dropout outside its modules?)")
    return layout


def prove_experts(module: nn.Module, layout: FeedForwardLayout) -> FeedForwardLayout:
    """Compare the experts of a mixture with `run_experts` of their parameters.

    Raises:
        MismatchError: If the module computes something else.
    """
    owner: Any = module
    weight: Tensor = getattr(module, layout.output)
    count, hidden = weight.shape[0], weight.shape[2 if owner.is_transposed else 1]
    x = _random(weight, _TOKENS, hidden)[0]  # [tokens hidden]
    chosen = min(2, count)
    indices = (torch.arange(_TOKENS)[:, None] + torch.arange(chosen)) % count  # [tokens 1] + [chosen]
    indices = indices.to(x.device)
    weights = torch.full(indices.shape, 1 / chosen, dtype=x.dtype, device=x.device)
    with evaluated(module), torch.no_grad():
        own = called(lambda rows: module(rows, indices, weights), x)
        compare(own, run_experts(module, layout, x, indices, weights, lambda hidden: hidden))
    return layout


@dataclass(frozen=True, slots=True)
class _Event:
    """One call of a projection or of an activation."""

    module: nn.Module
    is_activation: bool
    inputs: Tensor
    output: Tensor


def prove_activations(
    model: nn.Module, owners: Iterable[tuple[nn.Module, FeedForwardLayout]]
) -> list[FeedForwardLayout | None]:
    """Check on one forward pass that each activation receives a projection's output and returns a projection's input.

    Args:
        model: The transformers model, on any device but meta.
        owners: Modules that own the activations, with their layouts.

    Returns:
        For each owner, its layout with the name of the projection, or None if its activation does anything else or is
        never called.

    Raises:
        MismatchError: If the model cannot be run.
    """
    owners = list(owners)
    events: list[_Event] = []
    handles: list[Any] = []
    restored: list[tuple[dict[str, Any], str, Any]] = []

    def record(module: nn.Module, is_activation: bool) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                events.append(_Event(module, is_activation, args[0].clone(), output.clone()))

        return hook

    with evaluated(model), torch.no_grad():
        try:
            for owner, layout in owners:
                activation: Any = getattr(owner, layout.activation)
                if isinstance(activation, nn.Module):
                    handles.append(activation.register_forward_hook(record(owner, True)))
                else:
                    attributes = owner.__dict__
                    restored.append((attributes, layout.activation, activation))
                    attributes[layout.activation] = _recording(activation, record(owner, True))
            for module in cast("Iterable[nn.Module]", model.modules()):
                if widths(module) is not None:
                    handles.append(module.register_forward_hook(record(module, False)))
            try:
                cast(Any, model).base_model(**sample_inputs(model))
            # a model may require inputs of any other kind
            except Exception as error:
                raise MismatchError(
                    f"a forward pass on random tokens fails ({type(error).__name__}: {error})"
                ) from None
        finally:
            for handle in handles:
                handle.remove()
            for attributes, name, value in reversed(restored):
                attributes[name] = value
    return [_between(events, owner, layout) for owner, layout in owners]


def is_computable(module: nn.Module) -> bool:
    """True if a module has values to compare with; False on the meta device and under fake tensors."""
    parameter = next(iter(module.parameters()), None)
    return parameter is None or not (parameter.is_meta or type(parameter.data).__name__ == "FakeTensor")


def _between(events: list[_Event], owner: nn.Module, layout: FeedForwardLayout) -> FeedForwardLayout | None:
    """Layout of an activation between two projections with nothing but dropout around it, else None."""
    names = {child: name for name, child in owner.named_children()}
    found: FeedForwardLayout | None = None
    for number, event in enumerate(events):
        if event.is_activation and event.module is owner:
            before = next((each for each in reversed(events[:number]) if not each.is_activation), None)
            after = next((each for each in events[number + 1 :] if not each.is_activation), None)
            if before is None or after is None or before.module not in names:
                return None
            if not (_is_equal(before.output, event.inputs) and _is_equal(event.output, after.inputs)):
                return None
            found = replace(layout, input=names[before.module])
    return found


def _is_equal(one: Tensor, other: Tensor) -> bool:
    return one.numel() == other.numel() and torch.equal(one.flatten(), other.flatten())


def _recording(function: Callable[..., Any], hook: Callable[..., None]) -> Callable[..., Any]:
    def recorded(*args: Any, **kwargs: Any) -> Any:
        output = function(*args, **kwargs)
        hook(None, args, output)
        return output

    return recorded


def outputs(model: nn.Module, *, left: bool) -> Tensor:
    """Run a transformers model on two rows of random tokens, one of them padded.

    Args:
        model: The model, on any device but meta.
        left: Pad on the left, as decoders are padded in generation.

    Returns:
        Last hidden states without a head, which may pool them, at the positions of real tokens [positions width].

    Raises:
        MismatchError: If the model cannot be run on tokens alone, or returns another kind of output.
    """
    body: Any = cast(Any, model).base_model
    inputs = sample_inputs(model)
    padded = slice(None, 2) if left else slice(_TOKENS - 2, None)
    inputs["attention_mask"][1, padded] = 0
    with evaluated(model), torch.no_grad():
        found = called(lambda _: body(**inputs), inputs["input_ids"])
    first = next((value for value in found.values() if isinstance(value, Tensor) and value.ndim == 3), None)
    if first is None or first.shape[:2] != inputs["input_ids"].shape:
        raise MismatchError("it returns no output per token")
    real = inputs["attention_mask"].bool()
    return first.flatten(0, 1) if "decoder_input_ids" in inputs else first[real]


def compare(found: Any, expected: Shaped[Tensor, "*shape"], reason: str = "it computes something else") -> None:
    """Raise if two results of the same computation differ by more than rounding.

    Raises:
        MismatchError: If they do, or if one of them is not finite.
    """
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        raise MismatchError(reason)
    scale = expected.abs().max().double()
    error = (found.double() - expected.double()).abs().max()
    # a comparison with NaN is false
    if not bool(error <= _TOLERANCES.get(expected.dtype, 1e-5) * scale):
        raise MismatchError(f"{reason}: values differ by {float(error):.2g} of {float(scale):.2g}")


def sample_inputs(model: nn.Module) -> dict[str, Any]:
    """Random tokens for one forward pass of a text model."""
    owner: Any = model
    embeddings: Any = owner.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, int(embeddings.weight.shape[0]), (2, _TOKENS), generator=generator)
    ids = ids.to(embeddings.weight.device)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if owner.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return inputs


def _rebuilt(module: nn.Module, layout: FeedForwardLayout, x: Tensor) -> Tensor:
    """Compute y = W₂(φ(W₁x) ⊙ W₃x), and the norm of y + x if the layout has one; parts are called as modules."""

    def part(path: str) -> Any:
        return attrgetter(path)(module)

    scores: Tensor = part(layout.input)(x)  # [1 tokens units], or [1 tokens 2·units] if fused
    if layout.fused:
        gate, up = scores.chunk(2, dim=-1)
        hidden = part(layout.activation)(gate) * up
    else:
        hidden = part(layout.activation)(scores)
        if layout.up is not None:
            hidden = hidden * part(layout.up)(x)
    output = part(layout.output)(hidden)
    return output if layout.exit is None else part(layout.exit)(output + x)


def _dropout(
    inputs: list[tuple[str, int]], layout: FeedForwardLayout, units: int, hidden: int
) -> dict[str, str | None]:
    """Paths of hidden and output dropout, from the widths of the inputs that dropout modules received."""
    if layout.exit is not None:
        return {}
    if units == hidden and inputs:
        raise MismatchError("the place of its dropout is unclear, because the layer is as wide as its input")
    found = {width: [path for path, each in inputs if each == width] for width in (units, hidden)}
    if any(len(paths) > 1 for paths in found.values()) or len(inputs) > sum(map(len, found.values())):
        raise MismatchError(f"it has dropout in {len(inputs)} places")
    return {"hidden_dropout": next(iter(found[units]), None), "output_dropout": next(iter(found[hidden]), None)}


def called(call: Callable[[Tensor], Any], x: Tensor) -> Any:
    """Call a function with `x` [...]; every failure is a `MismatchError`.

    Raises:
        MismatchError: If the call fails.
    """
    try:
        return call(x)
    # a module of another kind may raise anything
    except Exception as error:
        raise MismatchError(f"it fails on a random input ({type(error).__name__}: {error})") from None


def _random(like: Any, tokens: int, width: int) -> Tensor:
    """Random input [1 tokens width] on the device of a projection or parameter, in its type if it computes in one."""
    parameter: Any = like if isinstance(like, Tensor) else next(iter(like.parameters()))
    generator = torch.Generator().manual_seed(0)
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    return (_SCALE * torch.randn(1, tokens, width, generator=generator)).to(parameter.device, dtype)


@contextmanager
def _seen(module: nn.Module, kind: type[nn.Module]) -> Generator[list[tuple[str, int]]]:
    """Collect path and input width of every call of the children of one class."""
    seen: list[tuple[str, int]] = []
    handles: list[Any] = []
    for path, child in cast("Iterable[tuple[str, nn.Module]]", module.named_modules()):
        if isinstance(child, kind):

            def hook(_: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
                seen.append((path, int(args[0].shape[-1])))

            handles.append(child.register_forward_pre_hook(hook))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluated(module: nn.Module) -> Generator[None]:
    """Switch a module to evaluation, and restore the mode of each of its modules."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, training in modes:
            each.training = training
