"""Name, publication and settings of the method; imports no torch."""

from __future__ import annotations

from graftwork.grafting.method import About, Paper
from graftwork.methods.regrad.config import ReGradConfig

ABOUT = About(
    name="regrad",
    title="Documents retrieved as gradients at question time",
    summary="new documents retrieved as stored gradients at inference time; the weights are never overwritten",
    paper=Paper(
        "Retrievable Gradients: Continual Post-Training Without Cumulative Weight Drift",
        "arXiv:2606.15734",
        2026,
        "oneal2000/ReGrad",
    ),
    config_class=ReGradConfig,
    families=frozenset({"llama", "mistral", "qwen2"}),
)
