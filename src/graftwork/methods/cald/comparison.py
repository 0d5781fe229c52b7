"""Comparison of mixers before training: errors per layer, distance of the whole model, time, and gain of a guide."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Unpack, cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from graftwork.grafting.conversion import attach
from graftwork.methods.cald import calibration
from graftwork.methods.cald.distances import layer_distances
from graftwork.methods.cald.functional import softmax_attention
from graftwork.methods.cald.guides import dense_copy
from graftwork.methods.cald.method import Cald
from graftwork.methods.cald.mixers import MIXERS
from graftwork.methods.cald.modules import repeat_heads
from graftwork.methods.cald.recurrence import dense_attention, relative_error
from graftwork.metrics.cost import interleaved_times
from graftwork.surgery.attention import AttentionGraft, AttentionOptions, graft_attention, seam_modules
from graftwork.surgery.masks import LazyMask, key_padding
from graftwork.surgery.sites import pretrained

RATE = 1e-2
"""Learning rate of the guided updates of a comparison."""
ROUNDS = 3
"""Timed passes of each choice; the median counts."""

Batches = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class MixerChoice:
    """Measurements of one choice of settings on one model and one sample."""

    name: str
    """Short name, such as "segment_mean, rank 16"."""
    errors: tuple[float, ...]
    """Relative squared error of the attention output of each converted layer, if only that layer is converted."""
    guided_errors: tuple[float, ...]
    """The same errors after the guided updates of the mixers alone; empty for a mixer without parameters."""
    distances: tuple[float, ...]
    """Distance of every hidden state (embeddings first) to the dense model, if all layers are converted."""
    time_ratio: float
    """Time of a forward pass of the converted model relative to the dense model."""

    @property
    def error(self) -> float:
        """Mean of `errors`."""
        return statistics.fmean(self.errors)

    @property
    def guided_error(self) -> float:
        """Mean of `guided_errors`; of `errors` if there are none."""
        return statistics.fmean(self.guided_errors or self.errors)

    @property
    def distance(self) -> float:
        """Sum of `distances`."""
        return sum(self.distances)


@dataclass(frozen=True)
class MixerComparison:
    """Choices of mixers for one model, in the order in which they were given."""

    choices: tuple[MixerChoice, ...]
    layers: tuple[str, ...]
    """Paths of the converted attention modules."""
    guided_updates: int
    """Number of updates behind `guided_errors`."""
    update_ratios: Mapping[str, float] = field(default_factory=dict[str, float])
    """Time of an update, by guide, relative to one without a guide; of the choice with the smallest error."""


class AttentionProbe(nn.Module):
    """Dense attention of one layer, which also measures candidates on the same inputs; an `AttentionGraft`.

    Args:
        mixers: Candidates.
        causal: True for a decoder.
    """

    def __init__(self, mixers: Sequence[nn.Module], *, causal: bool) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(mixers)
        self.causal = causal
        self.errors: list[Float[Tensor, ""]] = []
        """Relative error of each candidate in the latest call."""

    def forward(
        self,
        owner: nn.Module,
        query: Float[Tensor, "batch heads queries width"],
        key: Float[Tensor, "batch groups keys width"],
        value: Float[Tensor, "batch groups keys value_width"],
        mask: LazyMask | Shaped[Tensor, ...] | None,
        **options: Unpack[AttentionOptions],
    ) -> Float[Tensor, "batch heads queries value_width"]:
        """Return dense attention, and store the errors of the candidates. See `AttentionGraft`."""
        scale = options["scaling"]
        if self.causal:
            padding = mask.padding if isinstance(mask, LazyMask) else None
            dense = dense_attention(query, key, value, scale, padding, None)
        else:
            padding = key_padding(mask)
            dense = softmax_attention(
                query, repeat_heads(key, query), repeat_heads(value, query), scale=scale, padding=padding
            )
        self.errors = [
            relative_error(mixer(owner, query, key, value, mask, **options), dense, padding) for mixer in self.mixers
        ]
        return dense


def compare_mixers(
    model: nn.Module,
    methods: Mapping[str, Cald],
    fitted: Batches,
    held_out: Batches,
    *,
    guided_updates: int = 20,
) -> MixerComparison:
    """Measure choices of mixers on copies of a dense model.

    Every converted layer receives the hidden states of the dense model and passes the dense attention output on, so one
    forward pass measures all layers of all choices. The guided updates train the mixers alone on the same errors.

    Args:
        model: Dense model.
        methods: Choices by name, with numbers as ranks and the same converted layers.
        fitted: Batches for the guided updates and for the initialisation svd.
        held_out: Batches for all measurements.
        guided_updates: Number of guided updates; 0 measures the initialisations only.

    Raises:
        UnsupportedModelError: If the mixers cannot replace the attention of this model.
    """
    dense = dense_copy(model).eval().requires_grad_(False)
    causal = any(MIXERS[method.config.mixer].causal for method in methods.values())
    maps: Mapping[str, Tensor] = {}
    if any(_by_svd(method) for method in methods.values()):
        maps = calibration.mean_attention(dense, fitted)
    # the initial states: the guided updates change the mixers
    mixers: list[Mapping[str, nn.Module]] = []
    starts: list[Mapping[str, Mapping[str, Tensor]]] = []
    for method in methods.values():
        student = dense_copy(dense)
        attach(student, method)
        if _by_svd(method):
            calibration.set_singular_vectors(student, maps)
        mixers.append(seam_modules(student))
        starts.append({path: _cloned(mixer) for path, mixer in mixers[-1].items()})
    layers = tuple(mixers[0])
    probed = dense_copy(dense)
    probes = {path: AttentionProbe([own[path] for own in mixers], causal=causal) for path in layers}
    graft_attention(probed, Cald.name, cast("Mapping[str, AttentionGraft]", probes))
    errors = _mean_errors(probed, probes, held_out)
    _train(probed, probes, fitted, guided_updates)
    after = _mean_errors(probed, probes, held_out)
    del probed
    states = [_states(dense, batch) for batch in held_out]
    choices: list[MixerChoice] = []
    for number, (name, method) in enumerate(methods.items()):
        student = _student(dense, method, starts[number])
        timed = interleaved_times(
            {kind: _forward(each, held_out[0]) for kind, each in (("dense", dense), ("converted", student))}, ROUNDS
        )
        choices.append(
            MixerChoice(
                name,
                tuple(errors[number]),
                tuple(after[number]) if MIXERS[method.config.mixer].learns and guided_updates else (),
                _distances(student, held_out, states, method),
                statistics.median(timed["converted"]) / statistics.median(timed["dense"]),
            )
        )
    closest = min(range(len(choices)), key=lambda number: choices[number].guided_error)
    student = _student(dense, list(methods.values())[closest], starts[closest])
    return MixerComparison(tuple(choices), layers, guided_updates, _update_ratios(dense, student, held_out[0]))


def _by_svd(method: Cald) -> bool:
    return method.config.mixer == "linformer" and method.config.effective_initialization == "svd"


def _cloned(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _student(dense: nn.Module, method: Cald, start: Mapping[str, Mapping[str, Tensor]]) -> nn.Module:
    """Converted copy of a dense model with given parameters of the mixers, by path."""
    student = dense_copy(dense)
    attach(student, method)
    for path, mixer in seam_modules(student).items():
        mixer.load_state_dict(start[path])
    return student.eval()


@torch.no_grad()
def _mean_errors(model: nn.Module, probes: Mapping[str, AttentionProbe], sample: Batches) -> list[list[float]]:
    """Mean error over the batches, by choice and layer."""
    sums = torch.zeros(len(next(iter(probes.values())).mixers), len(probes), dtype=torch.float64)  # [choices layers]
    for batch in sample:
        _run(model, batch)
        sums += torch.stack([torch.stack(probe.errors) for probe in probes.values()], 1).double().cpu()
    return [[float(value) for value in row] for row in sums / len(sample)]


def _train(model: nn.Module, probes: Mapping[str, AttentionProbe], sample: Batches, updates: int) -> None:
    """Train all candidates of all layers at once; their parameters are independent of each other."""
    mixers = [mixer for probe in probes.values() for mixer in probe.mixers]
    parameters = [parameter.requires_grad_() for mixer in mixers for parameter in mixer.parameters()]
    if not parameters:
        return
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    for number in range(updates):
        _run(model, sample[number % len(sample)])
        errors = torch.stack([error for probe in probes.values() for error in probe.errors])  # [layers · choices]
        cast(Any, errors.sum()).backward()
        cast(Any, optimizer).step()
        optimizer.zero_grad()


def _run(model: nn.Module, batch: Mapping[str, Tensor], *, states: bool = False) -> Any:
    inner: Any = pretrained(model)
    options = {"use_cache": False} if inner.can_generate() else {}
    inputs = {name: value.to(inner.device) for name, value in batch.items() if name != "labels"}
    return inner.base_model(**inputs, output_hidden_states=states, **options)


@torch.no_grad()
def _states(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Hidden states [batch tokens hidden], embeddings first."""
    return _run(model, batch, states=True).hidden_states


def _distances(
    student: nn.Module, sample: Batches, dense: Sequence[tuple[Tensor, ...]], method: Cald
) -> tuple[float, ...]:
    """Mean distance over the batches, by hidden state."""
    rows: list[list[float]] = []
    for batch, expected in zip(sample, dense, strict=True):
        mask = batch["attention_mask"].bool().to(expected[0].device)
        found = layer_distances(_states(student, batch), expected, mask, method.config)
        rows.append([float(distance) for distance in found.values()])
    return tuple(statistics.fmean(column) for column in zip(*rows, strict=True))


def _forward(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    def run() -> None:
        with torch.no_grad():
            _run(model, batch)

    return run


def _update_ratios(dense: nn.Module, student: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, float]:
    """Time of forward and backward passes by guide, relative to those without a guide; optimizers are not timed."""

    def update(model: nn.Module) -> None:
        _run(model, batch)[0].square().mean().backward()

    def trained(model: nn.Module) -> nn.Module:
        return model.requires_grad_(True)

    teacher = trained(dense_copy(dense))
    passes = {"unguided": lambda: update(student), "forward": _forward(dense, batch), "update": lambda: update(teacher)}
    trained(student)
    times = {name: statistics.median(own) for name, own in interleaved_times(passes, ROUNDS).items()}
    own = times["unguided"]
    return {
        "unguided": 1.0,
        "target, waypoint, hybrid": (own + times["forward"]) / own,
        "trajectory": (own + times["update"]) / own,
    }
