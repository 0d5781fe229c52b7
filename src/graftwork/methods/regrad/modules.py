"""Low-rank adapters beside projections, and the updates that a batch brings along, which are never written to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from graftwork.errors import ConfigError
from graftwork.methods.regrad import functional
from graftwork.methods.regrad.bank.layout import Layout
from graftwork.methods.regrad.config import ReGradConfig
from graftwork.surgery.sites import pretrained

ADAPTER = "graftwork_adapter"
"""The child of a projection that holds its adapter."""


@dataclass(frozen=True, slots=True)
class RowPairs:
    """The pair of matrices that each row of a batch uses at one projection."""

    lora_a: Float[Tensor, "rows rank inputs"]
    lora_b: Float[Tensor, "rows outputs rank"]


States = Mapping[nn.Module, RowPairs | None]
"""What adapters use in place of their own matrices; None for those that are off."""

_STATES: ContextVar[States] = ContextVar("regrad_states", default={})  # noqa: B039 (never changed in place)
Records = dict[nn.Module, list[tuple[Tensor, Tensor]]]
"""What went into every adapted projection and came out of it, one entry for each call: a layer may work in chunks."""
_RECORDS: ContextVar[Records | None] = ContextVar("regrad_records", default=None)


class LowRankAdapter(nn.Module):
    """The low-rank pair of one projection, with its step sizes; 32-bit whatever the model is kept in.

    Rounding the adapter to 16 bits would swallow most of a small update, so casting the model leaves it alone.

    Args:
        config: Rank, scale and step sizes.
        inputs: Width of the projection's input.
        outputs: Width of its output.
        device: Where the projection is.
        generator: Draws the start.
        owner: The adapter that owns the one step size, with `step_size_mode="same"`, if it is another one.
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
        # a plain reference: registered, the step size would be counted and saved once for every projection
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
        """The projection's output with what the adapter adds, with the batch's own matrices where it brought some."""
        own = RowPairs(self.lora_A, self.lora_B)
        states = _STATES.get()
        pairs = states.get(self, self.shared_states or own)
        if pairs is None:
            return output
        if pairs is not own:
            pairs = _fitting(pairs, x)
        compute = torch.promote_types(x.dtype, pairs.lora_a.dtype)
        # automatic mixed precision would round what must not be rounded
        with torch.autocast(x.device.type, enabled=False):
            added = functional.low_rank(x.to(compute), pairs.lora_a.to(compute), pairs.lora_b.to(compute), self.scaling)
            return output + added.to(output.dtype)

    def step_sizes(self) -> tuple[Tensor, Tensor]:
        """Step sizes of the numbers of A and of B, each of that matrix's shape."""
        found = []
        for name, tensor in (("step_size_A", self.lora_A), ("step_size_B", self.lora_B)):
            if self.mode == "fix":
                found.append(torch.full_like(tensor, self.initial))
                continue
            owner: LowRankAdapter = self.__dict__["owner"] or self
            raw = owner.step_size if self.mode == "same" else getattr(self, name)
            size: Tensor = nn.functional.softplus(raw) if self.positive else raw  # type: ignore[arg-type]
            found.append(size.expand_as(tensor))
        return found[0], found[1]

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"rank={self.lora_A.shape[0]}, scaling={self.scaling:g}, step_sizes={self.mode}"

    def _owned(self) -> dict[str, Tensor]:
        """Names and shapes of the step sizes that are this module's own."""
        scalar = torch.zeros((), device=self.lora_A.device)
        if self.mode == "same":
            return {} if self.__dict__["owner"] is not None else {"step_size": scalar}
        if self.mode == "fix":
            return {}
        full = self.mode == "full"
        tensors = {"step_size_A": self.lora_A.detach(), "step_size_B": self.lora_B.detach()}
        return {name: tensor if full else scalar for name, tensor in tensors.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            lowered = moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device) if lowered else moved

        return super()._apply(keep, recurse)


class AdaptedForward:
    """The forward of a projection that has an adapter: its own, as it was, and then the adapter's.

    Args:
        module: The projection.
        adapter: Its adapter.
    """

    def __init__(self, module: nn.Module, adapter: LowRankAdapter) -> None:
        self.module, self.adapter = module, adapter
        # off-loading hangs its own forward on a module, and must go on being called
        self.before = module.__dict__.get("forward")

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the projection with its adapter."""
        if self.before is None:
            output = type(self.module).forward(self.module, x, *args, **kwargs)
        else:
            output = self.before(x, *args, **kwargs)
        adapted = self.adapter(x, output)
        records = _RECORDS.get()
        if records is None:
            return adapted
        # nothing below the lowest adapted projection is differentiated: the graph begins at its output
        adapted = adapted if adapted.requires_grad else adapted.detach().requires_grad_()
        records.setdefault(self.adapter, []).append((x.detach(), adapted))
        return adapted


def adapters(model: nn.Module) -> dict[str, LowRankAdapter]:
    """Every adapter of a model by the path of its projection, in the order in which gradients are laid out.

    Raises:
        ConfigError: If there is none.
    """
    found = {
        path.removesuffix(f".{ADAPTER}"): module
        for path, module in pretrained(model).named_modules()
        if isinstance(module, LowRankAdapter)
    }
    if not found:
        raise ConfigError("Found a model without adapters. Convert it with regrad first.")
    return found


def layout(model: nn.Module) -> Layout:
    """Names and shapes of the tensors of one gradient: A and B of every adapted projection."""
    return Layout.of(
        (f"{path}.{name}", tuple(getattr(adapter, name).shape))
        for path, adapter in adapters(model).items()
        for name in ("lora_A", "lora_B")
    )


def flat_adapter(model: nn.Module) -> Float[Tensor, " numbers"]:
    """All adapters' numbers in the order of the layout, on the device of the first; differentiable."""
    return _joined([part for adapter in adapters(model).values() for part in (adapter.lora_A, adapter.lora_B)])


def step_sizes(model: nn.Module) -> Float[Tensor, " numbers"]:
    """All step sizes in the order of the layout, on the device of the first; differentiable where they are learned."""
    return _joined([part for adapter in adapters(model).values() for part in adapter.step_sizes()])


@contextmanager
def updated(
    model: nn.Module,
    delta: Float[Tensor, "rows numbers"],
    *,
    off: Bool[Tensor, " rows"] | None = None,
    shared: bool = False,
) -> Iterator[None]:
    """Let every row of the batches inside use the adapter plus its own update. Parameters are not touched.

    Other threads do not see it. A batch whose rows are a multiple, as with beams, uses each update for the rows that
    came of one.

    Args:
        model: The converted model.
        delta: What is added to the adapter for each row, in the order of the layout; zeros for nothing.
        off: Rows that are answered by the pretrained model, without any adapter.
        shared: Let other threads see it: autograd's own compute a checkpointed layer again. For training only.

    Raises:
        ConfigError: If the update has another size than the adapter.
    """
    found, size = adapters(model), layout(model).size
    if delta.ndim != 2 or delta.shape[1] != size:
        raise ConfigError(f"Found an update of shape {list(delta.shape)}; expected [rows, {size}].")
    parts = layout(model).split(delta)
    states: dict[nn.Module, RowPairs | None] = {}
    for path, adapter in found.items():
        device = adapter.lora_A.device
        lora_a = adapter.lora_A + parts[f"{path}.lora_A"].to(device)
        lora_b = adapter.lora_B + parts[f"{path}.lora_B"].to(device)
        states[adapter] = RowPairs(lora_a, lora_b if off is None else functional.switched(lora_b, off.to(device)))
    with _using(states):
        if not shared:
            yield
            return
        try:
            for adapter in found.values():
                adapter.shared_states = states[adapter]
            yield
        finally:
            for adapter in found.values():
                adapter.shared_states = None


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The pretrained model, for everything inside; other threads do not see it."""
    with _using(dict.fromkeys(adapters(model).values())):
        yield


@contextmanager
def recorded() -> Iterator[Records]:
    """Collect (inputs, outputs) of every adapted projection in the forward passes inside."""
    records: Records = {}
    token = _RECORDS.set(records)
    try:
        yield records
    finally:
        _RECORDS.reset(token)


@contextmanager
def _using(states: States) -> Iterator[None]:
    token = _STATES.set({**_STATES.get(), **states})
    try:
        yield
    finally:
        _STATES.reset(token)


def _fitting(pairs: RowPairs, x: Tensor) -> RowPairs:
    rows = pairs.lora_a.shape[0]
    if x.ndim != 3 or x.shape[0] % rows:
        raise ConfigError(
            f"Found inputs of shape {list(x.shape)} under updates for {rows} rows; expected [rows, tokens, width] with "
            "as many rows, or a multiple. Give one update for each row of the batch."
        )
    times = x.shape[0] // rows
    if times == 1:
        return pairs
    return RowPairs(pairs.lora_a.repeat_interleave(times, 0), pairs.lora_b.repeat_interleave(times, 0))


def _joined(parts: list[Tensor]) -> Tensor:
    # the layers of a large model may lie on several devices
    return torch.cat([part.flatten().to(parts[0].device) for part in parts])
