"""Name, publication and settings of the method; imports no torch."""

from __future__ import annotations

from graftwork.grafting.method import About, Paper
from graftwork.methods.topk.config import TopKConfig
from graftwork.surgery.families import FAMILIES

ABOUT = About(
    name="topk",
    title="Top-k feed-forward and attention layers",
    summary=(
        "feed-forward and attention layers that keep the k largest scores: less activation memory, no training needed"
    ),
    paper=Paper(
        "Memory-efficient Transformers via Top-k Attention", "arXiv:2106.06899", 2021, "ag1988/top_k_attention"
    ),
    config_class=TopKConfig,
    families=frozenset(FAMILIES),
)
