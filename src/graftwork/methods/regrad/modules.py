"""Low-rank adapters of projections, and per-row updates that apply to a batch without changing parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from graftwork.errors import ConfigError
from graftwork.methods.regrad import functional
from graftwork.methods.regrad.bank.layout import Layout
from graftwork.methods.regrad.config import ReGradConfig
from graftwork.surgery.sites import pretrained

ADAPTER = "graftwork_adapter"
"""Name of the child module of a projection that is its adapter."""


@dataclass(frozen=True, slots=True)
class RowPairs:
    """Per-row matrices A and B of one projection."""

    lora_a: Float[Tensor, "rows rank inputs"]
    lora_b: Float[Tensor, "rows outputs rank"]


States = Mapping[nn.Module, RowPairs | None]
"""Adapter to the matrices that replace its own; None if it is off."""

_STATES: ContextVar[States] = ContextVar("regrad_states", default={})  # noqa: B039 (never mutated)
Records = dict[nn.Module, list[tuple[Tensor, Tensor]]]
"""Inputs and outputs of every adapted projection, one entry per call: chunked layers call it repeatedly."""
_RECORDS: ContextVar[Records | None] = ContextVar("regrad_records", default=None)


class LowRankAdapter(nn.Module):
    """Low-rank pair (A, B) of one projection with its step sizes, in float32 or wider.

    Casting the model to a 16-bit type leaves the adapter in float32, because rounding would erase most of a small
    update.

    Args:
        config: Settings; rank, scale and step sizes are used.
        inputs: Width of the projection's input.
        outputs: Width of the projection's output.
        device: Device of the projection.
        generator: Random generator of the initial values.
        owner: Adapter that owns the shared step size with `step_size_mode="same"`; None if this one does.
    """

    def __init__(
        self,
        config: ReGradConfig,
        inputs: int,
        outputs: int,
        *,
        device: torch.device,
        generator: torch.Generator,
        owner: LowRankAdapter | None = None,
    ) -> None:
        super().__init__()
        self.scaling, self.mode = config.scaling, config.step_size_mode
        self.positive, self.initial = config.step_size_sign == "positive", config.initial_step_size
        self.shared_states: RowPairs | None = None
        """Matrices that all threads use, see `updated`."""
        # bypasses registration, because a registered child would be counted and saved with every projection
        self.__dict__["owner"] = owner
        bound = 1 / math.sqrt(inputs)
        first = torch.empty(config.rank, inputs).uniform_(-bound, bound, generator=generator)
        second = torch.zeros(outputs, config.rank)
        if config.b_std:
            second.normal_(std=config.b_std, generator=generator)
        self.lora_A = nn.Parameter(first.to(device))
        self.lora_B = nn.Parameter(second.to(device))
        start = math.log(math.expm1(self.initial)) if self.positive else self.initial
        for name, like in self._owned().items():
            self.register_parameter(name, nn.Parameter(torch.full_like(like, start)))

    def forward(
        self, x: Float[Tensor, "rows tokens inputs"], output: Float[Tensor, "rows tokens outputs"]
    ) -> Float[Tensor, "rows tokens outputs"]:
        """Return output + s · x Aᵀ Bᵀ, with the active per-row matrices if `updated` provides some.

        Args:
            x: Input of the projection.
            output: Output of the projection.
        """
        own = RowPairs(self.lora_A, self.lora_B)
        states = _STATES.get()
        pairs = states.get(self, self.shared_states or own)
        if pairs is None:
            return output
        if pairs is not own:
            pairs = _repeated(pairs, x)
        compute = torch.promote_types(x.dtype, pairs.lora_a.dtype)
        # automatic mixed precision would round the adapter to 16 bits; entering the context takes a third of the time
        kind = x.device.type
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            matrices = pairs.lora_a.to(compute), pairs.lora_b.to(compute)
            if output.dtype == compute:
                return functional.add_low_rank(output, x.to(compute), *matrices, self.scaling)
            return output + functional.low_rank(x.to(compute), *matrices, self.scaling).to(output.dtype)

    def step_sizes(self) -> tuple[Tensor, Tensor]:
        """Return the step sizes of A [rank inputs] and of B [outputs rank]."""
        return self._step_size("step_size_A", self.lora_A), self._step_size("step_size_B", self.lora_B)

    def extra_repr(self) -> str:
        """Return rank, scale and step-size mode for `print(model)`."""
        return f"rank={self.lora_A.shape[0]}, scaling={self.scaling:g}, step_sizes={self.mode}"

    def _step_size(self, name: str, tensor: Tensor) -> Tensor:
        if self.mode == "fix":
            return torch.full_like(tensor, self.initial)
        shared = self.mode == "same"
        owner = (self.__dict__["owner"] or self) if shared else self
        raw: Tensor = getattr(owner, "step_size" if shared else name)
        size = nn.functional.softplus(raw) if self.positive else raw
        return size.expand_as(tensor)  # scalar -> shape of the matrix

    def _owned(self) -> dict[str, Tensor]:
        """Return name and shape template of the step sizes that this module owns."""
        scalar = torch.zeros((), device=self.lora_A.device)
        if self.mode == "same":
            return {} if self.__dict__["owner"] is not None else {"step_size": scalar}
        if self.mode == "fix":
            return {}
        full = self.mode == "full"
        tensors = {"step_size_A": self.lora_A.detach(), "step_size_B": self.lora_B.detach()}
        return {name: tensor if full else scalar for name, tensor in tensors.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the adapter with the model, but ignore casts to types narrower than 32 bits."""

        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            lowered = moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device) if lowered else moved

        return super()._apply(keep, recurse)  # pyright: ignore[reportUnknownMemberType]


class AdaptedForward:
    """Forward function of an adapted projection: the original forward, followed by the adapter.

    Args:
        module: Projection.
        adapter: Adapter of the projection.
    """

    def __init__(self, module: nn.Module, adapter: LowRankAdapter) -> None:
        self.module, self.adapter = module, adapter
        # off-loading installs its own forward on the instance, which must still be called
        self.before = module.__dict__.get("forward")

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the adapted projection of `x` [rows tokens inputs]."""
        if self.before is None:
            output = type(self.module).forward(self.module, x, *args, **kwargs)
        else:
            output = self.before(x, *args, **kwargs)
        adapted = self.adapter(x, output)
        records = _RECORDS.get()
        if records is None:
            return adapted
        # the graph starts at the output of the lowest adapted projection; nothing below it is differentiated
        adapted = adapted if adapted.requires_grad else adapted.detach().requires_grad_()
        records.setdefault(self.adapter, []).append((x.detach(), adapted))
        return adapted


def adapters(model: nn.Module) -> dict[str, LowRankAdapter]:
    """Return all adapters by the path of their projection, in the order of the gradient layout.

    Raises:
        ConfigError: If the model has none.
    """
    modules = cast("Iterator[tuple[str, nn.Module]]", pretrained(model).named_modules())
    found = {path.removesuffix(f".{ADAPTER}"): module for path, module in modules if isinstance(module, LowRankAdapter)}
    if not found:
        raise ConfigError("Found a model without adapters; expected one converted with regrad. Convert it first.")
    return found


def layout(model: nn.Module) -> Layout:
    """Return the layout of one gradient: A and B of every adapted projection."""
    return Layout.of(
        (f"{path}.{name}", tuple(getattr(adapter, name).shape))
        for path, adapter in adapters(model).items()
        for name in ("lora_A", "lora_B")
    )


def flat_adapter(model: nn.Module) -> Float[Tensor, " numbers"]:
    """Concatenate all adapters in the order of the layout, on the device of the first one; differentiable."""
    return _joined([part for adapter in adapters(model).values() for part in (adapter.lora_A, adapter.lora_B)])


def step_sizes(model: nn.Module) -> Float[Tensor, " numbers"]:
    """Concatenate all step sizes in the order of the layout, on the device of the first one; differentiable."""
    return _joined([part for adapter in adapters(model).values() for part in adapter.step_sizes()])


@contextmanager
def updated(
    model: nn.Module,
    delta: Float[Tensor, "rows numbers"],
    *,
    off: Bool[Tensor, " rows"] | None = None,
    shared: bool = False,
) -> Generator[None]:
    """Inside the context, add a separate update to the adapter for every row of a batch; parameters are unchanged.

    Row r uses A + ΔA_r and B + ΔB_r. Other threads are unaffected. If a batch has k times as many rows as there are
    updates, as in beam search, each update applies to k consecutive rows.

    Args:
        model: The converted model.
        delta: Updates in the order of the layout; a zero row uses the adapter unchanged.
        off: Rows that use the pretrained model without any adapter.
        shared: Make the updates visible to other threads. Required in training with gradient checkpointing, because
            autograd's threads recompute layers; leave it off elsewhere.

    Raises:
        ConfigError: If the updates have another size than the adapter.
    """
    states = row_pairs(model, delta, off=off)
    with using_pairs(states):
        if not shared:
            yield
            return
        found = adapters(model).values()
        try:
            for adapter in found:
                adapter.shared_states = states[adapter]
            yield
        finally:
            for adapter in found:
                adapter.shared_states = None


def row_pairs(
    model: nn.Module, delta: Float[Tensor, "rows numbers"], *, off: Bool[Tensor, " rows"] | None = None
) -> dict[nn.Module, RowPairs | None]:
    """Return the per-row matrices of every adapter under separate updates, for any number of forward passes.

    Args:
        model: The converted model.
        delta: Updates in the order of the layout; a zero row uses the adapter unchanged.
        off: Rows that use the pretrained model without any adapter.

    Raises:
        ConfigError: If the updates have another size than the adapter.
    """
    shape = layout(model)
    if delta.ndim != 2 or delta.shape[1] != shape.size:
        raise ConfigError(f"Found an update of shape {list(delta.shape)}; expected [rows, {shape.size}].")
    parts = shape.split(delta)
    states: dict[nn.Module, RowPairs | None] = {}
    for path, adapter in adapters(model).items():
        device = adapter.lora_A.device
        lora_a = adapter.lora_A + parts[f"{path}.lora_A"].to(device)  # [rows rank inputs]
        lora_b = adapter.lora_B + parts[f"{path}.lora_B"].to(device)  # [rows outputs rank]
        states[adapter] = RowPairs(lora_a, lora_b if off is None else functional.mask_rows(lora_b, off.to(device)))
    return states


@contextmanager
def adapter_off(model: nn.Module) -> Generator[None]:
    """Switch all adapters off inside the context; other threads are unaffected."""
    with using_pairs(dict.fromkeys(adapters(model).values())):
        yield


@contextmanager
def recorded() -> Generator[Records]:
    """Collect (inputs, outputs) of every adapted projection during forward passes inside the context."""
    records: Records = {}
    token = _RECORDS.set(records)
    try:
        yield records
    finally:
        _RECORDS.reset(token)


@contextmanager
def using_pairs(states: States) -> Generator[None]:
    """Use these matrices inside the context; other threads are unaffected."""
    token = _STATES.set({**_STATES.get(), **states})
    try:
        yield
    finally:
        _STATES.reset(token)


def _repeated(pairs: RowPairs, x: Tensor) -> RowPairs:
    """Repeat per-row matrices for inputs `x` [k*rows tokens inputs] of k beams per row."""
    rows = pairs.lora_a.shape[0]
    if x.ndim != 3 or x.shape[0] % rows:
        raise ConfigError(
            f"Found inputs of shape {list(x.shape)} under updates for {rows} rows; expected [rows, tokens, width] with "
            "as many rows, or a multiple. Pass one update for each row of the batch."
        )
    times = x.shape[0] // rows
    if times == 1:
        return pairs
    # [rows ...] -> [k*rows ...], consecutive
    return RowPairs(pairs.lora_a.repeat_interleave(times, 0), pairs.lora_b.repeat_interleave(times, 0))


def _joined(parts: list[Tensor]) -> Tensor:
    # layers of a large model may be on several devices
    return torch.cat([part.flatten().to(parts[0].device) for part in parts])  # [numbers]
