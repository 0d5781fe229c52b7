"""Name, publication and settings of the method; imports no torch."""

from __future__ import annotations

from graftwork.grafting.method import About, Paper
from graftwork.methods.sparsefinder.config import SparsefinderConfig
from graftwork.surgery.families import FAMILIES

ABOUT = About(
    name="sparsefinder",
    title="Entmax attention along a predicted graph",
    summary="entmax attention along a sparsity graph that is predicted before any score is computed",
    paper=Paper("Predicting Attention Sparsity in Transformers", "arXiv:2109.12188", 2021, "deep-spin/sparsefinder"),
    config_class=SparsefinderConfig,
    families=frozenset(FAMILIES),
)
