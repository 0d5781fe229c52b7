"""Name, publication and settings of the method; imports no torch."""

from __future__ import annotations

from graftwork.grafting.method import About, Paper
from graftwork.methods.cald.config import CaldConfig

ABOUT = About(
    name="cald",
    title="Linear-complexity attention, converted while fine-tuning",
    summary=(
        "an encoder or decoder with attention of linear complexity, converted during fine-tuning with the dense model "
        "as teacher"
    ),
    paper=Paper(
        "Joint Fine-tuning and Conversion of Pretrained Speech and Language Models towards Linear Complexity",
        "arXiv:2410.06846",
        2025,
        "idiap/linearize-distill-pretrained-transformers",
    ),
    config_class=CaldConfig,
    families=frozenset({"bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert"}),
)
