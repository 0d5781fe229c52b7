"""Graft published methods onto pretrained Hugging Face transformers, without pretraining again.

`graftwork.convert`, `train`, `evaluate` and `report` are the stages. Every name in `__all__` is imported at first use,
so that `import graftwork` loads nothing heavy; the method classes among them come from `graftwork.methods.NAMES`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from graftwork.core.version import __version__ as __version__
from graftwork.methods import NAMES

if TYPE_CHECKING:
    from graftwork.checkpoint import Converted, load, load_model
    from graftwork.conversion import convert, restore
    from graftwork.errors import GraftworkError
    from graftwork.method import Change, Method, Phase
    from graftwork.metrics.results import Results
    from graftwork.pipeline import Trained, evaluate, report, sweep, train
    from graftwork.prediction import predict
    from graftwork.runner import run_recipe
    from graftwork.settings.evaluation import EvaluationSettings
    from graftwork.settings.recipe import RunConfig, load_recipe
    from graftwork.settings.training import TrainingSettings
    from graftwork.tasks import Example, Mixture, Task, get_task
    from graftwork.tasks.sources import Record

_HOMES = {
    "Change": "graftwork.method",
    "Converted": "graftwork.checkpoint",
    "EvaluationSettings": "graftwork.settings.evaluation",
    "Example": "graftwork.tasks",
    "GraftworkError": "graftwork.errors",
    "Method": "graftwork.method",
    "Mixture": "graftwork.tasks",
    "Phase": "graftwork.method",
    "Record": "graftwork.tasks.sources",
    "Results": "graftwork.metrics.results",
    "RunConfig": "graftwork.settings.recipe",
    "Task": "graftwork.tasks",
    "Trained": "graftwork.pipeline",
    "TrainingSettings": "graftwork.settings.training",
    "convert": "graftwork.conversion",
    "evaluate": "graftwork.pipeline",
    "get_task": "graftwork.tasks",
    "load": "graftwork.checkpoint",
    "load_model": "graftwork.checkpoint",
    "load_recipe": "graftwork.settings.recipe",
    "predict": "graftwork.prediction",
    "report": "graftwork.pipeline",
    "restore": "graftwork.conversion",
    "run_recipe": "graftwork.runner",
    "sweep": "graftwork.pipeline",
    "train": "graftwork.pipeline",
    **NAMES.homes(),
}

__all__ = [
    "Change",
    "Converted",
    "EvaluationSettings",
    "Example",
    "GraftworkError",
    "Method",
    "Mixture",
    "Phase",
    "Record",
    "Results",
    "RunConfig",
    "Task",
    "Trained",
    "TrainingSettings",
    "convert",
    "evaluate",
    "get_task",
    "load",
    "load_model",
    "load_recipe",
    "predict",
    "report",
    "restore",
    "run_recipe",
    "sweep",
    "train",
]
__all__ += sorted(NAMES.homes())  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'graftwork' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
