"""Settings of Sparsefinder: attention function, graph predictor, and training of both."""

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
    "mean_pooled",
    "pages",
    "gate",
    "gold",
]
Distance = Literal["cos", "euclidean", "l2", "direction", "minkowski", "min", "min_norm", "entmax"]
Loss = Literal["sum_hinge", "pair_hinge", "logistic"]
Executor = Literal["auto", "dense", "blocks", "flex"]

LEARNED = frozenset({"distance", "quantize", "kmeans", "reformer", "routing", "gate"})
"""Groupings that use projected queries and keys."""
BLOCKWISE = frozenset({"mean_pooled", "pages", "gate"})
"""Groupings that choose blocks of keys within a budget."""
CLUSTERED = frozenset({"kmeans", "routing"})
"""Groupings that need centroids."""
LOOKS_AHEAD = frozenset({"bigbird", "longformer", "routing"})
"""Groupings whose rows depend on the sequence length and thus on later tokens; refused for decoders."""


@dataclass(frozen=True)
class SparsefinderConfig:
    """Settings of the attention function, of the graph, and of the training of the graph."""

    alpha: float = 1.5
    """α of entmax, 1 to 3: 1 is softmax, 1.5 the paper's choice and the fastest, 2 sparsemax; above 2 it is solved in
    float64."""
    learnable_alpha: bool = False
    """Learn α per head in the entmax phase, starting at `alpha` between 1 and 2; choose it if heads differ in
    sparsity."""
    finetune: bool = True
    """Run the entmax phase, which fine-tunes the model; switch it off if the model is already trained with entmax."""
    anneal_steps: int | None = None
    """Optimiser steps of the entmax phase over which α increases from 1 (softmax); set it if training from a softmax
    model is unstable. null starts at `alpha`."""
    grouping: Grouping | None = None
    """Predictor of the graph: distance (usually the best recall), kmeans or quantize on projections; key blocks within
    block_budget, the graphs that save time: mean_pooled (mean key), pages (bounds of the keys) or gate (learned); a
    baseline (window, random, bigbird, longformer, openai_sparse, reformer, routing); or gold, the true graph, as an
    upper bound for predictors, to which window and global tokens are added too. null computes all scores."""
    distance: Distance = "l2"
    """Distance between projected queries and keys; l2 is the squared distance of the loss."""
    threshold: float | tuple[float, ...] | None = None
    """Pairs below this distance are connected: one number, or one per head. null calibrates it to target_sparsity,
    which is usually easier to choose. Density for random; α for distance entmax."""
    target_sparsity: float | None = None
    """Share of pairs outside the graph; calibrates the threshold (distance) or the number of clusters (kmeans) of every
    head on the training split."""
    distance_p: float = 2.0
    """Order p of the norms of minkowski, direction and min_norm."""
    bucket_size: int = 16
    """Tokens per bin of quantize; smaller bins give sparser graphs."""
    same_size: bool = True
    """Bins of equal count in quantize; switch it off for bins of equal width."""
    temperature: float = 1.0
    """Factor before tanh for bins of equal width; raise it if most values fall into the middle bins."""
    num_clusters: int = 16
    """Number of clusters of kmeans and routing, or of frozen bins of quantize in decoders; more give sparser graphs."""
    top_clusters: int = 1
    """Number of nearest clusters per token; raise it for higher recall at lower sparsity."""
    cluster_rounds: int = 1
    """Independent runs of k-means; a pair is connected if it shares a cluster in any run."""
    baseline_size: int = 4
    """Random keys of bigbird, maximal global tokens of longformer, stride of openai_sparse, buckets of reformer."""
    hash_rounds: int = 1
    """Number of independent hashes of reformer."""
    reference_plan: bool = False
    """Sample the random keys of bigbird from the first columns only; set it to reproduce the authors' code."""
    window_size: int | None = None
    """Width of the band around the diagonal that is always connected; null for none. Combine it with any grouping if
    neighbouring tokens matter."""
    add_cls_mask: bool = False
    """Connect the first token with all tokens; choose it if many heads attend to the first token."""
    add_last_mask: bool = False
    """Connect the last non-padding token with all tokens; encoders only."""
    block_size: int = 1
    """Tokens per block of the graph: projections of a block are concatenated, and whole blocks are connected. Set it to
    the size of the executor's blocks if speed matters; 1 gives the highest recall. mean_pooled, pages and gate need at
    least 2, and also work in decoders."""
    block_budget: float = 0.25
    """Share of the allowed key blocks that mean_pooled, pages and gate keep; own block, band and global tokens count.
    `graftwork graphs --oracle` measures which budget a model needs."""
    rounds: int = 4
    """Width of the projected space; a larger space raises recall and slows down grouping."""
    hidden_size: int | None = None
    """Units of a tanh layer in the projections; null makes them linear."""
    share_projectors: bool = False
    """Use one projection for queries and keys; halves the parameters."""
    skip_projectors: bool = False
    """Group queries and keys without projections; choose it as a baseline, because nothing is learned."""
    concat_q_and_k: bool = False
    """Project the concatenated query and key of each position, for a symmetric graph; encoders only."""
    loss: Loss = "sum_hinge"
    """Loss of the projections: sum_hinge (the authors' choice), pair_hinge, or logistic, which uses all pairs and
    balances gold and other pairs."""
    margin: float = 1.0
    """Margin ω of the loss."""
    train_distance: Literal["l2", "min"] = "l2"
    """Squared distance in the loss: l2 of the whole vectors, or min over coordinates; min corresponds to quantize,
    which connects on any coordinate."""
    exclude_fixed: bool = False
    """Exclude pairs that the band or global tokens connect from the loss; choose it together with window_size."""
    projection_learning_rate: float = 0.01
    """Learning rate of the projections."""
    projection_epochs: int = 1
    """Epochs over the extracted sentences."""
    projection_batch_size: int = 16
    """Sentences per optimiser step of the projections."""
    l2: float = 0.0
    """Weight of the L2 penalty of the projections, added to the loss."""
    samples: int = 500
    """Number of training sentences whose queries and keys are extracted."""
    half_precision: bool = False
    """Store extracted queries and keys in float16; choose it if disk space is short."""
    seed: int = 0
    """Seed of initial projections, clusters, hashes and random graphs."""
    executor: Executor = "auto"
    """Implementation of sparse attention: dense computes all scores and masks them (simulated), blocks gathers key
    blocks, flex is FlexAttention (forward only). auto uses blocks from 1,024 keys and dense below."""
    attention_block_size: int = 64
    """Tokens per block of the executors blocks and flex."""
    exact_blocks: bool = True
    """Compute only the edges of the graph inside gathered blocks; switch it off to keep whole blocks, which adds edges.
    In decoders on long inputs that is faster, because only the own block needs a mask; a cached step stays exact."""
    sort_tokens: bool = False
    """Sort queries and keys by bucket before blocks are gathered: the same result with fewer blocks, because tokens of
    one cluster share blocks. Choose it for kmeans or routing with one cluster per token on long inputs."""
    stacks: tuple[Literal["encoder", "decoder"], ...] = ("encoder", "decoder")
    """Stacks to convert."""
    layers: str | None = None
    """Layers to convert in each stack, counted from 0, such as "0-3,7"; null converts every layer."""
    attention_kinds: tuple[Literal["self", "cross"], ...] = ("self", "cross")
    """Kinds of attention to convert."""
    cross_patterns: bool = False
    """Apply band and global tokens in cross-attention too."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: If a value is out of range, or two settings contradict each other.
        """
        from graftwork.surgery.layers import parse_layers

        self._check_numbers()
        parse_layers(self.layers, "layers")
        if not self.stacks or not self.attention_kinds:
            raise ConfigError(
                "Found empty stacks or attention_kinds. Expected at least one of each. Add one, or omit the setting."
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
        self._check_blocks()
        if self.skip_projectors and self.concat_q_and_k:
            raise ConfigError(
                "Found both skip_projectors and concat_q_and_k. Expected at most one. Switch one of them off."
            )

    def _check_blocks(self) -> None:
        if not 0.0 < self.block_budget <= 1.0:
            raise ConfigError(f"block_budget is {self.block_budget}. Expected a share above 0, up to 1.")
        if self.grouping in BLOCKWISE and self.block_size < 2:
            raise ConfigError(
                f"block_size is {self.block_size} with grouping {self.grouping}. Expected tokens per block, such as 64."
            )
        if self.grouping == "gate" and (self.skip_projectors or self.share_projectors or self.concat_q_and_k):
            raise ConfigError(
                "Found skip_projectors, share_projectors or concat_q_and_k with grouping gate. Expected separate "
                "projections of queries and of pooled keys. Switch them off, or choose mean_pooled."
            )

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
                    f"{name} is {value}. Expected a whole number of at least 1, or null if the setting is optional."
                )
        if not 1.0 <= self.alpha <= 3.0:
            raise ConfigError(f"alpha is {self.alpha}. Expected a number between 1 (softmax) and 3, usually 1.5.")
        if self.learnable_alpha and not 1.0 < self.alpha < 2.0:
            raise ConfigError(f"alpha is {self.alpha}. Expected an initial value between 1 and 2 for learnable_alpha.")
        if self.target_sparsity is not None and not 0.0 < self.target_sparsity < 1.0:
            raise ConfigError(f"target_sparsity is {self.target_sparsity}. Expected a share between 0 and 1.")
        if self.projection_learning_rate <= 0 or self.l2 < 0 or self.temperature <= 0 or self.distance_p <= 0:
            raise ConfigError(
                f"Found projection_learning_rate {self.projection_learning_rate}, temperature {self.temperature}, "
                f"distance_p {self.distance_p} and l2 {self.l2}. Expected the first three above 0, and l2 at least 0."
            )

    @property
    def projects(self) -> bool:
        """True if the grouping uses projected queries and keys."""
        return self.grouping in LEARNED

    @property
    def shared(self) -> bool:
        """True if queries and keys share one projection."""
        return self.share_projectors or self.concat_q_and_k
