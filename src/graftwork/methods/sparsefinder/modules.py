"""Modules of Sparsefinder: projections, and the attention module that owns all learned state."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Unpack

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from graftwork.errors import ConfigError
from graftwork.methods.sparsefinder.baselines import generator_for
from graftwork.methods.sparsefinder.block_graphs import Gate, predict_blocks
from graftwork.methods.sparsefinder.config import BLOCKWISE, CLUSTERED, SparsefinderConfig
from graftwork.methods.sparsefinder.executors import masked_attention, per_head, sparse_attention
from graftwork.methods.sparsefinder.graphs import Graph, gold_edges
from graftwork.methods.sparsefinder.key_cache import CacheSlot, project_cached
from graftwork.methods.sparsefinder.predictor import Learned, predict_graph
from graftwork.methods.sparsefinder.sorting import is_sortable
from graftwork.surgery.masks import LazyMask, PositionBias, allowed_by

if TYPE_CHECKING:
    from graftwork.surgery.attention import AttentionOptions


class Projection(nn.Module):
    """Projection of the queries or keys of every head to `rounds` dimensions: linear, or with one tanh layer.

    x W + b, or tanh(x W₁ + b₁) W₂ + b₂, with separate weights per head.

    Source: section 3.3 of the specification. Differs from the authors' code in the initialisation: weights uniform
    within ±1/√width, biases zero.

    Args:
        heads: Number of heads.
        width: Width of a head.
        rounds: Width of the projected space.
        hidden: Units of the tanh layer; None makes the projection linear.
        seed: Seed of the private generator of the initial weights.
    """

    def __init__(self, heads: int, width: int, rounds: int, hidden: int | None, seed: int) -> None:
        super().__init__()
        generator = generator_for(seed)
        sizes = [width, rounds] if hidden is None else [width, hidden, rounds]
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for incoming, outgoing in pairwise(sizes):
            weight = torch.empty(heads, incoming, outgoing).uniform_(-1, 1, generator=generator) * incoming**-0.5
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(torch.zeros(heads, 1, outgoing)))

    def forward(self, tokens: Float[Tensor, "batch heads tokens width"]) -> Float[Tensor, "batch heads tokens rounds"]:
        """Project in the precision of the weights."""
        result = tokens.to(self.weights[0].dtype)
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            # [batch heads tokens in] @ [heads in out] + [heads 1 out]
            result = (torch.tanh(result) if number else result) @ weight + bias
        return result


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """Arguments of one call of an attention module, for observers."""

    query: Float[Tensor, "batch heads queries width"]
    key: Float[Tensor, "batch groups keys width"]
    mask: LazyMask
    scale: float | Float[Tensor, " heads"]
    alpha: float | Tensor
    bias: PositionBias | Tensor | None


@dataclass(frozen=True, slots=True)
class Rule:
    """Settings and fitted values that predict a graph; replaces a module's own rule during a comparison."""

    config: SparsefinderConfig
    learned: Learned


class SparsefinderAttention(nn.Module):
    """α-entmax attention along a predicted graph; child module of the attention module that it replaces.

    All scores are computed until the graph has been learned (`active`).

    Args:
        config: Settings of the method.
        heads: Number of query heads.
        width: Width of a head.
        causal: True for the self-attention of a decoder, where no row may depend on a later token.
        cross: True if keys come from another sequence.
        number: Index of the module in its model, part of the seed of its initial weights.
    """

    def __init__(
        self, config: SparsefinderConfig, heads: int, width: int, *, causal: bool, cross: bool, number: int
    ) -> None:
        super().__init__()
        self.config, self.heads, self.width = config, heads, width
        self.causal, self.cross = causal, cross
        self.observer: Callable[[SparsefinderAttention, AttentionCall], None] | None = None
        self.override: Rule | None = None
        self._seen: tuple[Tensor, int, bool] | None = None
        self.cache_slot: CacheSlot | None = None
        # absent centroids are NaN, and a threshold that admits every pair is infinite
        self.non_finite_marks = frozenset({"centroids", "thresholds"})
        self.progress: Tensor
        self.active: Tensor
        self.centroids: Tensor | None
        self.thresholds: Tensor | None
        self.query_boundaries: Tensor | None
        self.key_boundaries: Tensor | None
        for name in ("centroids", "thresholds", "query_boundaries", "key_boundaries"):
            self.register_buffer(name, None)
        self.query_projection: Projection | None = None
        self.key_projection: Projection | None = None
        if config.learnable_alpha:
            start = torch.logit(torch.tensor(config.alpha - 1.0))
            self.alpha_logit = nn.Parameter(torch.full((heads,), float(start)))
        if config.anneal_steps is not None:
            self.register_buffer("progress", torch.zeros(()))
        if config.projects:
            self._make_learned(number)

    def _make_learned(self, number: int) -> None:
        """Create the projections and buffers that the grouping needs."""
        config = self.config
        width = self.width
        if not config.skip_projectors:
            incoming = 2 * width if config.concat_q_and_k else width
            pooled = 3 * width if config.grouping == "gate" else incoming
            make = [config.seed * 2 + number * 7919, config.seed * 2 + number * 7919 + 1]
            self.query_projection = Projection(self.heads, incoming, config.rounds, config.hidden_size, make[0])
            if not config.shared:
                self.key_projection = Projection(self.heads, pooled, config.rounds, config.hidden_size, make[1])
            width = config.rounds
        width *= config.block_size
        self.register_buffer("active", torch.zeros((), dtype=torch.bool))
        if config.grouping in CLUSTERED:
            shape = (self.heads, config.cluster_rounds, config.num_clusters, width)
            self.register_buffer("centroids", torch.full(shape, torch.nan))
        if config.grouping == "distance" and config.threshold is None:
            self.register_buffer("thresholds", torch.zeros(self.heads))
        if config.grouping == "quantize" and self.causal:
            shape = (self.heads, width, config.num_clusters - 1)
            self.register_buffer("query_boundaries", torch.zeros(shape))
            self.register_buffer("key_boundaries", torch.zeros(shape))

    def forward(
        self,
        owner: nn.Module,
        query: Float[Tensor, "batch heads queries width"],
        key: Float[Tensor, "batch groups keys width"],
        value: Float[Tensor, "batch groups keys value_width"],
        mask: LazyMask | Shaped[Tensor, "batch 1 queries keys"] | None,
        /,
        **options: Unpack[AttentionOptions],
    ) -> Float[Tensor, "batch heads queries value_width"]:
        """Implements `AttentionGraft.forward`: α-entmax along the current graph, or over all keys without one."""
        dropout, position_bias = options["dropout"], options["position_bias"]
        scaling = _scale(options["scaling"], self.heads)
        alpha = self.current_alpha()
        lazy = mask if isinstance(mask, LazyMask) else LazyMask(query.shape[0], query.shape[2], key.shape[2])
        call = AttentionCall(query, key, lazy, scaling, alpha, position_bias)
        if self.observer is not None:
            self.observer(self, call)
        graph = self.current_graph(call) if self.predicts else None
        if graph is None or isinstance(mask, Tensor):
            allowed = _allowed(mask, query)
            if graph is not None:
                allowed = graph.dense(query.device) & allowed if allowed is not None else graph.dense(query.device)
            return masked_attention(
                query,
                key,
                value,
                None,
                scale=scaling,
                alpha=alpha,
                allowed=allowed,
                bias=position_bias,
                dropout=dropout,
            )
        return sparse_attention(
            query,
            key,
            value,
            graph,
            scale=scaling,
            alpha=alpha,
            executor=self.config.executor,
            block_size=self.config.attention_block_size,
            exact=self.config.exact_blocks,
            bias=position_bias,
            dropout=dropout,
            sort=self.config.sort_tokens and is_sortable(graph),
        )

    @property
    def rule(self) -> Rule:
        """Rule of the current graph: the override if one is set, otherwise the module's own."""
        return Rule(self.config, self.learned()) if self.override is None else self.override

    @property
    def predicts(self) -> bool:
        """True if attention currently uses a predicted graph."""
        if self.override is not None:
            return self.override.config.grouping is not None
        return self.config.grouping is not None and (not self.config.projects or self._is_active())

    def _is_active(self) -> bool:
        """Value of `active`, read only after a change, because a read waits for the device."""
        if torch.compiler.is_compiling() or self.active.is_inference():
            return bool(self.active)
        seen = self._seen
        if seen is None or seen[0] is not self.active or seen[1] != self.active._version:
            seen = self._seen = (self.active, self.active._version, bool(self.active))
        return seen[2]

    def current_alpha(self) -> float | Tensor:
        """Current α: a number, or a learned tensor [heads].

        Learned: 1 + sigmoid(logit). Annealed: 1 + (α − 1) · progress, with progress from 0 to 1.
        """
        if self.config.learnable_alpha:
            # in half precision, α would move in steps of up to 0.008
            learned = 1 + torch.sigmoid(self.alpha_logit.float())
            return learned if self.config.anneal_steps is None else 1 + (learned - 1) * self.progress.clamp_max(1.0)
        if self.config.anneal_steps is None:
            return self.config.alpha
        share = min(float(self.progress), 1.0)
        return 1.0 + (self.config.alpha - 1.0) * share if share < 1.0 else self.config.alpha

    def project(
        self, query: Float[Tensor, "batch heads queries width"], key: Float[Tensor, "batch groups keys width"]
    ) -> tuple[Float[Tensor, "batch heads queries rounds"], Float[Tensor, "batch heads keys rounds"]]:
        """Project queries and keys for the grouping, with one key per query head.

        Raises:
            ConfigError: If `concat_q_and_k` is on and queries and keys have different positions.
        """
        heads = query.shape[1]
        if self.query_projection is not None and not self.config.concat_q_and_k:
            keys = self.query_projection if self.key_projection is None else self.key_projection
            slot, self.cache_slot = self.cache_slot, None
            return self.query_projection(query), project_cached(slot, key, lambda own: keys(_per_head(own, heads)))
        key = _per_head(key, heads)
        if self.query_projection is None:
            return query, key
        if query.shape != key.shape:
            raise ConfigError(
                "Found queries and keys of different positions (cross-attention, or one new token). Expected both of "
                "the same positions, because concat_q_and_k projects them together. Set concat_q_and_k to false."
            )
        joined = self.query_projection(torch.cat([query, key], dim=-1))  # [batch heads tokens 2·width] → rounds
        return joined, joined

    def gate(self) -> Gate | None:
        """Projections of grouping gate; None for other groupings."""
        if self.config.grouping != "gate" or self.query_projection is None or self.key_projection is None:
            return None
        return Gate(self.query_projection, self.key_projection)

    def learned(self) -> Learned:
        """Fitted values of the grouping; None for values that it does not use."""
        return Learned(self.centroids, self.thresholds, self.query_boundaries, self.key_boundaries)

    @torch.no_grad()
    def current_graph(self, call: AttentionCall, query_real: Bool[Tensor, "batch queries"] | None = None) -> Graph:
        """Graph of a call: predicted, or the gold graph with grouping gold, with the fixed patterns.

        The gold graph computes all scores a second time.
        """
        graph = self.graph(call.query, call.key, call.mask, query_real)
        if self.rule.config.grouping != "gold":
            return graph
        edges = gold_edges(
            call.query,
            call.key,
            call.mask,
            scale=call.scale,
            alpha=per_head(call.alpha),
            bias=call.bias,
            query_real=query_real,
        )
        return Graph(self.heads, call.mask, edges=edges, pattern=graph.pattern, query_real=query_real)

    @torch.no_grad()
    def graph(
        self,
        query: Float[Tensor, "batch heads queries width"],
        key: Float[Tensor, "batch groups keys width"],
        mask: LazyMask,
        query_real: Bool[Tensor, "batch queries"] | None = None,
    ) -> Graph:
        """Predict the graph of queries and keys."""
        rule = self.rule
        if rule.config.grouping in BLOCKWISE:
            return predict_blocks(
                rule.config, query, key, mask, gate=self.gate(), cross=self.cross, query_real=query_real
            )
        if rule.config.projects:
            query, key = self.project(query, key)
        return predict_graph(
            rule.config, query, key, mask, rule.learned, cross=self.cross, frozen=self.causal, query_real=query_real
        )

    def extra_repr(self) -> str:
        """α and grouping, for `print(model)` and the list of changes."""
        return f"alpha={self.config.alpha}, grouping={self.config.grouping}"


def _per_head(key: Tensor, heads: int) -> Tensor:
    """One key per query head [batch heads keys width] from keys of groups [batch groups keys width]."""
    return key if key.shape[1] == heads else key.repeat_interleave(heads // key.shape[1], 1)


def _scale(scaling: float | Tensor, heads: int) -> float | Tensor:
    """Factor on query·key: a number, or one per head [heads] from any shape that broadcasts against the scores."""
    return scaling.flatten().expand(heads) if isinstance(scaling, Tensor) else scaling


def _allowed(mask: LazyMask | Tensor | None, query: Tensor) -> Tensor | None:
    """Boolean mask that broadcasts against [batch heads queries keys]; None if every pair is allowed."""
    if isinstance(mask, LazyMask):
        return mask.block(0, mask.queries, device=query.device)
    return None if mask is None else allowed_by(mask)


def sparsefinder_modules(model: nn.Module) -> dict[str, SparsefinderAttention]:
    """Sparsefinder modules of a model, by the path of the attention module that each replaces."""
    from graftwork.surgery.attention import seam_modules

    return {path: graft for path, graft in seam_modules(model).items() if isinstance(graft, SparsefinderAttention)}


@contextmanager
def observe_calls(
    model: nn.Module, observer: Callable[[SparsefinderAttention, AttentionCall], None]
) -> Generator[None]:
    """Call a function with the arguments of every call of a Sparsefinder module."""
    modules = list(sparsefinder_modules(model).values())
    for module in modules:
        module.observer = observer
    try:
        yield
    finally:
        for module in modules:
            module.observer = None


@contextmanager
def override_rules(model: nn.Module, rules: Mapping[str, Rule]) -> Generator[None]:
    """Replace the rules of modules, by path, until the context exits."""
    modules = sparsefinder_modules(model)
    for path, rule in rules.items():
        modules[path].override = rule
    try:
        yield
    finally:
        for path in rules:
            modules[path].override = None
