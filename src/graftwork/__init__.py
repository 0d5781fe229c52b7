"""Graft published methods onto pretrained Hugging Face transformers, without pretraining again.

`graftwork.convert`, `train`, `evaluate` and `report` are the stages. Every name in `__all__` is imported at first use,
so that `import graftwork` loads nothing heavy; the method classes among them come from `graftwork.methods.NAMES`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from graftwork.core.import_hooks import after_import
from graftwork.core.version import __version__ as __version__
from graftwork.methods import NAMES

if TYPE_CHECKING:
    from graftwork.errors import GraftworkError
    from graftwork.grafting.conversion import convert, restore
    from graftwork.grafting.converted import Converted
    from graftwork.grafting.method import Change, Method
    from graftwork.metrics.results import Results
    from graftwork.pipeline.answers import predict
    from graftwork.pipeline.estimation.estimate import estimate
    from graftwork.pipeline.evaluation import evaluate
    from graftwork.pipeline.loading import load, load_model
    from graftwork.pipeline.runner import run_recipe
    from graftwork.pipeline.sweeps import sweep
    from graftwork.pipeline.training import Trained, train
    from graftwork.reporting.render import report
    from graftwork.settings.evaluation import EvaluationSettings
    from graftwork.settings.recipe import RunConfig, load_recipe
    from graftwork.settings.training import TrainingSettings
    from graftwork.surgery.families import register_family
    from graftwork.tasks import Example, Mixture, Task, get_task
    from graftwork.tasks.sources import Record
    from graftwork.training.phases import Phase

_HOMES = {
    "Change": "graftwork.grafting.method",
    "Converted": "graftwork.grafting.converted",
    "EvaluationSettings": "graftwork.settings.evaluation",
    "Example": "graftwork.tasks",
    "GraftworkError": "graftwork.errors",
    "Method": "graftwork.grafting.method",
    "Mixture": "graftwork.tasks",
    "Phase": "graftwork.training.phases",
    "Record": "graftwork.tasks.sources",
    "Results": "graftwork.metrics.results",
    "RunConfig": "graftwork.settings.recipe",
    "Task": "graftwork.tasks",
    "Trained": "graftwork.pipeline.training",
    "TrainingSettings": "graftwork.settings.training",
    "convert": "graftwork.grafting.conversion",
    "estimate": "graftwork.pipeline.estimation.estimate",
    "evaluate": "graftwork.pipeline.evaluation",
    "get_task": "graftwork.tasks",
    "load": "graftwork.pipeline.loading",
    "load_model": "graftwork.pipeline.loading",
    "load_recipe": "graftwork.settings.recipe",
    "predict": "graftwork.pipeline.answers",
    "register_family": "graftwork.surgery.families",
    "report": "graftwork.reporting.render",
    "restore": "graftwork.grafting.conversion",
    "run_recipe": "graftwork.pipeline.runner",
    "sweep": "graftwork.pipeline.sweeps",
    "train": "graftwork.pipeline.training",
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
    "estimate",
    "evaluate",
    "get_task",
    "load",
    "load_model",
    "load_recipe",
    "predict",
    "register_family",
    "report",
    "restore",
    "run_recipe",
    "sweep",
    "train",
]
__all__ += sorted(NAMES.homes())  # pyright: ignore[reportUnsupportedDunderAll]


# loaders of transformers then open grafts, and save_pretrained writes them
after_import("transformers.modeling_utils", "graftwork.grafting.save_hook:install")
after_import("transformers.quantizers", "graftwork.pipeline.quantizer:register")
# `lm_eval --model graftwork` then works
after_import("lm_eval.models", "graftwork.pipeline.harness.registration:register")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'graftwork' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
