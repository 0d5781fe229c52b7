"""Top-k attention and feed-forward layers on tensors: the functions that modules and tests import."""

from __future__ import annotations

from graftwork.methods.topk.activations import ACTIVATIONS, activate
from graftwork.methods.topk.attention import topk_attention
from graftwork.methods.topk.feed_forward import topk_feed_forward, topk_gated_feed_forward
from graftwork.methods.topk.selection import select_topk
from graftwork.methods.topk.statistics import (
    AttentionStatistics,
    FeedForwardStatistics,
    topk_attention_statistics,
    topk_feed_forward_statistics,
    topk_gated_feed_forward_statistics,
)

__all__ = [
    "ACTIVATIONS",
    "AttentionStatistics",
    "FeedForwardStatistics",
    "activate",
    "select_topk",
    "topk_attention",
    "topk_attention_statistics",
    "topk_feed_forward",
    "topk_feed_forward_statistics",
    "topk_gated_feed_forward",
    "topk_gated_feed_forward_statistics",
]
