"""Graft published methods onto pretrained Hugging Face transformers, without pretraining again.

`graftwork.convert`, `train`, `evaluate` and `report` are the stages; everything named in `__all__` is imported when
it is first used, so that `import graftwork` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftwork.checkpoint import Converted, load, load_model
    from graftwork.conversion import convert, restore
    from graftwork.errors import GraftworkError
    from graftwork.evaluation_settings import EvaluationSettings
    from graftwork.method import Change, Method, Phase
    from graftwork.methods.cald import Cald
    from graftwork.methods.regrad import ReGrad
    from graftwork.methods.sparsefinder import Sparsefinder
    from graftwork.methods.topk import TopK
    from graftwork.methods.wt5 import WT5
    from graftwork.pipeline import Trained, evaluate, report, sweep, train
    from graftwork.prediction import predict
    from graftwork.recipe import RunConfig, load_recipe
    from graftwork.reporting.results import Results
    from graftwork.runner import run_recipe
    from graftwork.tasks import Example, Mixture, Task, get_task
    from graftwork.tasks.sources import Record
    from graftwork.training.settings import TrainingSettings

__version__ = "0.1.0"

_HOMES = {
    "Cald": "methods.cald",
    "Change": "method",
    "Converted": "checkpoint",
    "EvaluationSettings": "evaluation_settings",
    "Example": "tasks",
    "GraftworkError": "errors",
    "Method": "method",
    "Mixture": "tasks",
    "Phase": "method",
    "ReGrad": "methods.regrad",
    "Record": "tasks.sources",
    "Results": "reporting.results",
    "RunConfig": "recipe",
    "Sparsefinder": "methods.sparsefinder",
    "Task": "tasks",
    "TopK": "methods.topk",
    "WT5": "methods.wt5",
    "Trained": "pipeline",
    "TrainingSettings": "training.settings",
    "convert": "conversion",
    "evaluate": "pipeline",
    "get_task": "tasks",
    "load": "checkpoint",
    "load_model": "checkpoint",
    "load_recipe": "recipe",
    "predict": "prediction",
    "report": "pipeline",
    "restore": "conversion",
    "run_recipe": "runner",
    "sweep": "pipeline",
    "train": "pipeline",
}

__all__ = [
    "WT5",
    "Cald",
    "Change",
    "Converted",
    "EvaluationSettings",
    "Example",
    "GraftworkError",
    "Method",
    "Mixture",
    "Phase",
    "ReGrad",
    "Record",
    "Results",
    "RunConfig",
    "Sparsefinder",
    "Task",
    "TopK",
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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'graftwork' has no attribute {name!r}")
    return getattr(import_module(f"graftwork.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
