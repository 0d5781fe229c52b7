"""The tasks of the offline world, in the format of UnifiedQA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from graftwork.tasks.task import Task
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
"""Task name to task; the files are written by `graftwork.demo.world.write_world`."""
