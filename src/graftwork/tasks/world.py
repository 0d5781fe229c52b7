"""Tasks of the offline demo world in the UnifiedQA format, and its mixtures of explained pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from graftwork.tasks.task import SIZE, Mixture, Task
from graftwork.tasks.unifiedqa import unifiedqa_task

DESCRIPTIONS = {
    "facts": "facts of the offline world, asked without a passage",
    "choice": "facts of the offline world, with options to choose from",
    "keywords": "facts of the offline world, asked by a keyword that no pretraining text holds",
    "profile": "two facts of the offline world in one answer",
    "yesno": "questions about the offline world, to be answered by yes or no",
    "reading": "questions about people that only the passage tells of",
}

TASKS: Mapping[str, Task] = {
    f"world/{name}": replace(unifiedqa_task(name), name=f"world/{name}", description=text)
    for name, text in DESCRIPTIONS.items()
}
"""Task by name; the files are written by `graftwork.demo.world.writers.write_world`."""

EXPLAINED_PAIRS = (100, 1000)

MIXTURES: Mapping[str, Mixture] = {
    mixture.name: mixture
    for count in EXPLAINED_PAIRS
    for mixture in [
        Mixture(
            f"world/pairs_{count}_explanations",
            {
                f"esnli_explanations_take{count}_v010": SIZE,
                f"esnli_labels_skip{count}_v010": SIZE,
                "esnli_eval_v010": 0,
            },
            f"{count} explained pairs of the offline world, all others with labels only",
        )
    ]
}
"""Mixture by name; rates follow the data size, because the e-SNLI mixtures assume half a million pairs."""
