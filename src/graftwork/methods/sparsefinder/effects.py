"""Settings that have no effect together with others, which a new conversion refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

from graftwork.errors import ConfigError
from graftwork.methods.sparsefinder.config import BLOCKWISE, CLUSTERED, SparsefinderConfig

Condition = tuple[str, Callable[[SparsefinderConfig], bool]]
"""Condition under which a setting has an effect: its words, and a function of all settings."""

_WITH_P = frozenset({"minkowski", "direction", "min_norm"})


def _grouping(*names: str) -> Condition:
    return f"grouping {' or '.join(names)}", lambda config: config.grouping in names


_ANY_GRAPH: Condition = "a grouping", lambda config: config.grouping is not None
_LEARNED: Condition = (
    "a learned grouping (distance, kmeans, quantize, reformer, routing)",
    lambda config: config.projects,
)
_PROJECTED: Condition = (
    "a learned grouping without skip_projectors",
    lambda config: config.projects and not config.skip_projectors,
)
_PAIRS: Condition = (
    "a learned grouping of pairs (distance, kmeans, quantize, reformer, routing) without skip_projectors",
    lambda config: config.projects and not config.skip_projectors and config.grouping != "gate",
)
_FINETUNED: Condition = "finetune, which trains α", lambda config: config.finetune
_PATTERN: Condition = (
    "window_size, add_cls_mask or add_last_mask, and a grouping",
    lambda config: (
        config.grouping is not None and bool(config.window_size or config.add_cls_mask or config.add_last_mask)
    ),
)

CONDITIONS: dict[str, Condition] = {
    "learnable_alpha": _FINETUNED,
    "anneal_steps": _FINETUNED,
    "distance": _grouping("distance"),
    "threshold": _grouping("distance", "random"),
    "target_sparsity": (
        "grouping kmeans, or distance without threshold",
        lambda config: config.grouping == "kmeans" or (config.grouping == "distance" and config.threshold is None),
    ),
    "distance_p": (
        "grouping distance with distance minkowski, direction or min_norm",
        lambda config: config.grouping == "distance" and config.distance in _WITH_P,
    ),
    "bucket_size": _grouping("quantize"),
    "same_size": _grouping("quantize"),
    "temperature": (
        "grouping quantize without same_size",
        lambda config: config.grouping == "quantize" and not config.same_size,
    ),
    "num_clusters": _grouping(*sorted(CLUSTERED), "quantize"),
    "top_clusters": _grouping("kmeans"),
    "cluster_rounds": _grouping("kmeans"),
    "baseline_size": _grouping("bigbird", "longformer", "openai_sparse", "reformer"),
    "hash_rounds": _grouping("reformer"),
    "reference_plan": _grouping("bigbird"),
    "window_size": _ANY_GRAPH,
    "add_cls_mask": _ANY_GRAPH,
    "add_last_mask": _ANY_GRAPH,
    "block_size": (
        "a learned grouping, or grouping mean_pooled, pages or window",
        lambda config: config.projects or config.grouping in BLOCKWISE | {"window"},
    ),
    "block_budget": _grouping(*sorted(BLOCKWISE)),
    "rounds": _PROJECTED,
    "hidden_size": _PROJECTED,
    "share_projectors": _PAIRS,
    "skip_projectors": _LEARNED,
    "concat_q_and_k": _PAIRS,
    "loss": _PAIRS,
    "margin": _PAIRS,
    "train_distance": _PAIRS,
    "exclude_fixed": (
        "a learned grouping with window_size, add_cls_mask or add_last_mask",
        lambda config: _PAIRS[1](config) and _PATTERN[1](config),
    ),
    "projection_learning_rate": _PROJECTED,
    "projection_epochs": _PROJECTED,
    "projection_batch_size": _LEARNED,
    "l2": _PROJECTED,
    "samples": _LEARNED,
    "half_precision": _LEARNED,
    "executor": _ANY_GRAPH,
    "attention_block_size": (
        "a grouping and an executor other than dense",
        lambda config: config.grouping is not None and config.executor != "dense",
    ),
    "exact_blocks": (
        "a grouping and executor auto or blocks",
        lambda config: config.grouping is not None and config.executor in ("auto", "blocks"),
    ),
    "sort_tokens": (
        "grouping kmeans, quantize, reformer or routing with block_size 1, exact_blocks, and executor auto or blocks",
        lambda config: (
            config.grouping in ("kmeans", "quantize", "reformer", "routing")
            and config.block_size == 1
            and config.exact_blocks
            and config.executor in ("auto", "blocks")
        ),
    ),
    "cross_patterns": (
        "attention_kinds with cross, and window_size, add_cls_mask or add_last_mask with a grouping",
        lambda config: "cross" in config.attention_kinds and _PATTERN[1](config),
    ),
}
"""Condition of every setting that depends on others."""


def check_effects(config: SparsefinderConfig) -> None:
    """Refuse the first setting that differs from its default and has no effect.

    Raises:
        ConfigError: If there is such a setting.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if value == field.default or field.name not in CONDITIONS:
            continue
        words, has_effect = CONDITIONS[field.name]
        if not has_effect(config):
            grouping = "no grouping" if config.grouping is None else f"grouping {config.grouping}"
            raise ConfigError(
                f"{field.name} is {value} with {grouping}, where it has no effect. It needs {words}. Leave it out, or "
                "change the other settings."
            )
