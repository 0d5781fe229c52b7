"""Sparsefinder as modules: projections, and the attention behind the seam that owns everything learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from graftwork.errors import ConfigError
from graftwork.methods.sparsefinder.baselines import generator_for
from graftwork.methods.sparsefinder.config import CLUSTERED, SparsefinderConfig
from graftwork.methods.sparsefinder.executors import masked_attention, per_head, sparse_attention
from graftwork.methods.sparsefinder.graphs import Graph, gold_edges
from graftwork.methods.sparsefinder.predictor import Learned, predict_graph
from graftwork.surgery.masks import LazyMask, PositionBias


class Projection(nn.Module):
    """Queries or keys of every head into a space of few numbers: linear, or with one tanh layer.

    Source: section 3.3 of the specification. Differs from the authors' code in its first values: weights within
    ±1/√width, biases zero.
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
        """Project, in the precision of the weights."""
        result = tokens.to(self.weights[0].dtype)
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            result = (torch.tanh(result) if number else result) @ weight + bias
        return result


@dataclass(frozen=True, slots=True)
class Seen:
    """What an attention module was called with, for whoever watches."""

    query: Tensor
    key: Tensor
    mask: LazyMask
    scale: float
    alpha: float | Tensor
    bias: PositionBias | Tensor | None


@dataclass(frozen=True, slots=True)
class Rule:
    """A grouping that a module follows instead of its own, with what was fitted for it."""

    config: SparsefinderConfig
    learned: Learned


class SparsefinderAttention(nn.Module):
    """α-entmax attention along a predicted graph; the child behind the attention seam.

    Until its graph has been learned (`active`), all scores are computed, as without a grouping.

    Args:
        config: The method's settings.
        heads: Query heads.
        width: Width of a head.
        causal: Whether this is the self-attention of a decoder, where no row may depend on a later token.
        cross: Whether keys come from another sequence.
        number: Number of the module in its model, which makes its first values different from its neighbours'.
    """

    def __init__(
        self, config: SparsefinderConfig, heads: int, width: int, *, causal: bool, cross: bool, number: int
    ) -> None:
        super().__init__()
        self.config, self.heads, self.width = config, heads, width
        self.causal, self.cross = causal, cross
        self.watch: Callable[[SparsefinderAttention, Seen], None] | None = None
        self.rule: Rule | None = None
        self.progress: Tensor
        self.active: Tensor
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
        config = self.config
        width = self.width
        if not config.skip_projectors:
            incoming = 2 * width if config.concat_q_and_k else width
            make = [config.seed * 2 + number * 7919, config.seed * 2 + number * 7919 + 1]
            self.query_projection = Projection(self.heads, incoming, config.rounds, config.hidden_size, make[0])
            if not config.shared:
                self.key_projection = Projection(self.heads, incoming, config.rounds, config.hidden_size, make[1])
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
        mask: LazyMask | Tensor | None,
        *,
        scaling: float,
        dropout: float,
        position_bias: PositionBias | Tensor | None,
    ) -> Float[Tensor, "batch heads queries value_width"]:
        """Attend; called by `surgery.attention.attention_function`."""
        alpha = self.current_alpha()
        lazy = mask if isinstance(mask, LazyMask) else LazyMask(query.shape[0], query.shape[2], key.shape[2])
        if self.watch is not None:
            self.watch(self, Seen(query, key, lazy, scaling, alpha, position_bias))
        graph = self.graph(query, key, lazy) if self.predicts else None
        if graph is not None and self.followed.config.grouping == "gold":
            # all scores once more: no saving, and no difference to computing them
            edges = gold_edges(
                query.detach(), key.detach(), lazy, scale=scaling, alpha=per_head(alpha), bias=position_bias
            )
            graph = Graph(self.heads, lazy, edges=edges)
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
        )

    @property
    def followed(self) -> Rule:
        """The rule that attention follows now: its own, unless another was put in its place."""
        return Rule(self.config, self.learned()) if self.rule is None else self.rule

    @property
    def predicts(self) -> bool:
        """Whether attention follows a predicted graph now."""
        if self.rule is not None:
            return self.rule.config.grouping is not None
        return self.config.grouping is not None and (not self.config.projects or bool(self.active))

    def current_alpha(self) -> float | Tensor:
        """α as it is now: a number, or learned ones per head."""
        if self.config.learnable_alpha:
            learned = 1 + torch.sigmoid(self.alpha_logit)
            return learned if self.config.anneal_steps is None else 1 + (learned - 1) * self.progress.clamp(1e-3, 1.0)
        if self.config.anneal_steps is None:
            return self.config.alpha
        share = min(float(self.progress), 1.0)
        return 1.0 + (self.config.alpha - 1.0) * share if share < 1.0 else self.config.alpha

    def project(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as the grouping sees them, a key for every query head.

        Raises:
            ConfigError: If query and key of a position are projected together and do not come together.
        """
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1) if key.shape[1] != query.shape[1] else key
        if self.query_projection is None:
            return query, key
        if self.config.concat_q_and_k:
            if query.shape != key.shape:
                raise ConfigError(
                    "concat_q_and_k projects query and key of a position together, and found queries and keys of other "
                    "positions (cross-attention, or one new token). Switch it off."
                )
            joined = self.query_projection(torch.cat([query, key], dim=-1))
            return joined, joined
        keys = self.query_projection if self.key_projection is None else self.key_projection
        return self.query_projection(query), keys(key)

    def learned(self) -> Learned:
        """Centroids, thresholds and boundaries, those that this grouping has."""
        names = ("centroids", "thresholds", "query_boundaries", "key_boundaries")
        return Learned(**{name: self._buffers.get(name) for name in names})

    @torch.no_grad()
    def graph(self, query: Tensor, key: Tensor, mask: LazyMask, query_real: Tensor | None = None) -> Graph:
        """The graph predicted for these queries and keys."""
        rule = self.followed
        if rule.config.projects:
            query, key = self.project(query, key)
        return predict_graph(
            rule.config, query, key, mask, rule.learned, cross=self.cross, frozen=self.causal, query_real=query_real
        )

    def extra_repr(self) -> str:
        """α and grouping, for `print(model)` and the list of changes."""
        return f"alpha={self.config.alpha}, grouping={self.config.grouping}"


def _allowed(mask: LazyMask | Tensor | None, query: Tensor) -> Tensor | None:
    if isinstance(mask, LazyMask):
        return mask.block(0, mask.queries, device=query.device)
    if mask is None or mask.dtype == torch.bool:
        return mask
    # an additive mask forbids by the lowest number of its type, or by −∞
    return mask > torch.finfo(mask.dtype).min / 2


def sparsefinder_modules(model: nn.Module) -> dict[str, Any]:
    """Every Sparsefinder attention of a model by the path of the attention module that it belongs to."""
    from graftwork.surgery.attention import seam_modules

    return {path: graft for path, graft in seam_modules(model).items() if isinstance(graft, SparsefinderAttention)}


@contextmanager
def watching(model: nn.Module, watch: Callable[[SparsefinderAttention, Seen], None]) -> Iterator[None]:
    """Let a function see what every Sparsefinder module is called with."""
    modules = list(sparsefinder_modules(model).values())
    for module in modules:
        module.watch = watch
    try:
        yield
    finally:
        for module in modules:
            module.watch = None


@contextmanager
def following(model: nn.Module, rules: Mapping[str, Rule]) -> Iterator[None]:
    """Let modules, by path, follow other rules than their own."""
    modules = sparsefinder_modules(model)
    for path, rule in rules.items():
        modules[path].rule = rule
    try:
        yield
    finally:
        for path in rules:
            modules[path].rule = None
