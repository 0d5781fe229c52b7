"""Name, publication and settings of the method; imports no torch."""

from __future__ import annotations

from graftwork.grafting.method import About, Paper
from graftwork.methods.wt5.config import WT5Config

ABOUT = About(
    name="wt5",
    title="Models that explain their predictions",
    summary="a text-to-text model that predicts a label and an explanation, with metrics and reports for explanations",
    paper=Paper(
        "WT5?! Training Text-to-Text Models to Explain their Predictions",
        "arXiv:2004.14546",
        2020,
        "google-research/google-research, wt5",
    ),
    config_class=WT5Config,
    families=frozenset({"t5", "mt5"}),
)
