"""The settings of Sparsefinder: the attention function, the predictor of its graph, and how both are learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from graftwork.errors import ConfigError

Grouping = Literal[
    "distance",
    "quantize",
    "kmeans",
    "window",
    "random",
    "bigbird",
    "longformer",
    "openai_sparse",
    "reformer",
    "routing",
    "gold",
]
Distance = Literal["cos", "euclidean", "l2", "direction", "minkowski", "min", "min_norm", "entmax"]
Loss = Literal["sum_hinge", "pair_hinge", "logistic"]
Executor = Literal["auto", "dense", "blocks", "flex"]

LEARNED = frozenset({"distance", "quantize", "kmeans", "reformer", "routing"})
"""Groupings that look at projected queries and keys."""
CLUSTERED = frozenset({"kmeans", "routing"})
"""Groupings that need centroids."""
LOOKS_AHEAD = frozenset({"bigbird", "longformer", "routing"})
"""Groupings whose rows depend on the length, and so on later tokens; refused for decoders."""


@dataclass(frozen=True)
class SparsefinderConfig:
    """Which attention function, which graph, and how the graph is learned."""

    alpha: float = 1.5
    """Exponent of α-entmax: 1 is softmax, 1.5 the paper's, 2 sparsemax; any other is solved by bisection."""
    learnable_alpha: bool = False
    """Learn α per head from its start value, between 1 and 2, in the entmax phase."""
    finetune: bool = True
    """Begin training with the entmax phase; off leaves the model's weights as they are."""
    anneal_steps: int | None = None
    """Optimiser steps of the entmax phase over which α rises from 1 (softmax); null starts at α."""
    grouping: Grouping | None = None
    """What predicts the graph: distance, quantize or kmeans on projections, or a baseline (window, random, bigbird,
    longformer, openai_sparse, reformer, routing), or gold, the true graph, to see what predicting costs; null
    computes all scores."""
    distance: Distance = "l2"
    """Distance between projected queries and keys; l2 is the squared one that the loss uses."""
    threshold: float | tuple[float, ...] | None = None
    """Connect below this distance: one number, or one per head; null is calibrated to target_sparsity. For random, the
    density; for entmax distance, its α."""
    target_sparsity: float | None = None
    """Share of pairs to leave out; calibrates the threshold (distance) or the number of clusters (kmeans) of every head
    on the training split."""
    distance_p: float = 2.0
    """p of the distances minkowski, direction and min_norm."""
    bucket_size: int = 16
    """Tokens per bin of quantize."""
    same_size: bool = True
    """Bins of equal count; off makes bins of equal width."""
    temperature: float = 1.0
    """Factor before tanh for bins of equal width."""
    num_clusters: int = 16
    """Clusters of kmeans and routing; for quantize in decoders, the number of frozen bins."""
    top_clusters: int = 1
    """Nearest clusters that a token belongs to."""
    cluster_rounds: int = 1
    """Independent runs of k-means; a match in any run connects."""
    baseline_size: int = 4
    """Random keys of bigbird, most globals of longformer, stride of openai_sparse, buckets of reformer."""
    hash_rounds: int = 1
    """Independent hashes of reformer."""
    reference_plan: bool = False
    """Draw the random keys of bigbird from the first columns only, as the authors' code does."""
    window_size: int | None = None
    """Width of the band around the diagonal that is always connected; null for none."""
    add_cls_mask: bool = False
    """Connect the first token with all."""
    add_last_mask: bool = False
    """Connect the last real token with all; encoders only."""
    block_size: int = 1
    """Tokens per block: projections of a block are concatenated, and whole blocks are connected."""
    rounds: int = 4
    """Width of the projected space."""
    hidden_size: int | None = None
    """Units of a tanh layer inside the projections; null makes them linear."""
    share_projectors: bool = False
    """Project queries and keys alike."""
    skip_projectors: bool = False
    """Group the queries and keys themselves, without projection."""
    concat_q_and_k: bool = False
    """One projection of query and key of each position together, used for both."""
    loss: Loss = "sum_hinge"
    """What trains projections: sum_hinge (the authors'), pair_hinge, or logistic (balanced)."""
    margin: float = 1.0
    """Margin of the hinges."""
    train_distance: Literal["l2", "min"] = "l2"
    """Squared distance in the loss: of the whole vectors, or of their nearest coordinate."""
    exclude_fixed: bool = False
    """Leave pairs that the band or the globals connect anyway out of the loss."""
    projection_learning_rate: float = 0.01
    """Learning rate of Adam for the projections."""
    projection_epochs: int = 1
    """Passes over the extracted sentences."""
    projection_batch_size: int = 16
    """Sentences per step."""
    l2: float = 0.0
    """Weight decay of Adam, added to the gradient."""
    samples: int = 500
    """Sentences of the training data whose queries and keys are extracted."""
    half_precision: bool = False
    """Store extracted queries and keys in float16."""
    seed: int = 0
    """Seed of negatives, clusters, hashes and random graphs."""
    executor: Executor = "auto"
    """dense computes all scores and masks them (simulated); blocks gathers key blocks; flex is FlexAttention, forward
    only; auto takes blocks from 1,024 keys on."""
    attention_block_size: int = 64
    """Tokens per block of the executors."""
    exact_blocks: bool = True
    """Inside gathered blocks compute the graph's pairs only; off keeps whole blocks, which can only add edges."""
    stacks: tuple[Literal["encoder", "decoder"], ...] = ("encoder", "decoder")
    """Stacks to change."""
    layers: str | None = None
    """Layer numbers to change in each stack, from 0, such as "0-3,7"; null changes every layer."""
    attention_kinds: tuple[Literal["self", "cross"], ...] = ("self", "cross")
    """Kinds of attention to change."""
    cross_patterns: bool = False
    """Let band and globals act in cross-attention too."""

    def __post_init__(self) -> None:
        """Refuse impossible values.

        Raises:
            ConfigError: If a value is out of range, or two settings contradict each other.
        """
        from graftwork.surgery.layers import parse_layers

        self._check_numbers()
        parse_layers(self.layers, "layers")
        if not self.stacks or not self.attention_kinds:
            raise ConfigError(
                "stacks or attention_kinds is empty, so nothing would change. Name at least one, or leave it out."
            )
        if self.grouping == "kmeans" and self.target_sparsity is None and self.top_clusters > self.num_clusters:
            raise ConfigError(
                f"top_clusters is {self.top_clusters} of {self.num_clusters} clusters. Expected at most num_clusters."
            )
        if self.grouping == "distance" and self.threshold is None and self.target_sparsity is None:
            raise ConfigError("Found no threshold for grouping distance. Set threshold, or target_sparsity.")
        if self.grouping == "random" and not isinstance(self.threshold, float):
            raise ConfigError(f"threshold is {self.threshold}. Expected the density of the random graph, 0 to 1.")
        if self.grouping == "window" and not (self.window_size or self.add_cls_mask or self.add_last_mask):
            raise ConfigError("Found grouping window without window_size. Set it, such as window_size 11.")
        if self.grouping == "reformer" and self.baseline_size % 2:
            raise ConfigError(
                f"baseline_size is {self.baseline_size}. Expected an even number of buckets for reformer."
            )
        if self.skip_projectors and self.concat_q_and_k:
            raise ConfigError("skip_projectors and concat_q_and_k are both on. Switch one of them off.")

    def _check_numbers(self) -> None:
        for name in (
            "bucket_size",
            "num_clusters",
            "top_clusters",
            "cluster_rounds",
            "baseline_size",
            "hash_rounds",
            "block_size",
            "rounds",
            "hidden_size",
            "projection_epochs",
            "projection_batch_size",
            "samples",
            "attention_block_size",
            "anneal_steps",
            "window_size",
        ):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or value < 1):
                raise ConfigError(
                    f"{name} is {value}. Expected a whole number from 1; to switch it off, leave it out or set it to "
                    "null."
                )
        if not 1.0 <= self.alpha <= 10.0:
            raise ConfigError(f"alpha is {self.alpha}. Expected a number from 1 (softmax), usually 1.5.")
        if self.learnable_alpha and not 1.0 < self.alpha < 2.0:
            raise ConfigError(f"alpha is {self.alpha}. Expected a start between 1 and 2 for learnable_alpha.")
        if self.target_sparsity is not None and not 0.0 < self.target_sparsity < 1.0:
            raise ConfigError(f"target_sparsity is {self.target_sparsity}. Expected a share between 0 and 1.")
        if self.projection_learning_rate <= 0 or self.l2 < 0 or self.temperature <= 0 or self.distance_p <= 0:
            raise ConfigError(
                "projection_learning_rate, temperature and distance_p must be above 0, and l2 at least 0; found "
                f"{self.projection_learning_rate}, {self.temperature}, {self.distance_p} and {self.l2}."
            )

    @property
    def projects(self) -> bool:
        """Whether queries and keys are projected for the graph."""
        return self.grouping in LEARNED

    @property
    def shared(self) -> bool:
        """Whether one projection serves queries and keys."""
        return self.share_projectors or self.concat_q_and_k
