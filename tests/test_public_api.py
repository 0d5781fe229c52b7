"""Public API of `import graftwork`: exported names, lazy imports, no side effects."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

import graftwork

NAMES = [
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


def in_a_fresh_process(code: str) -> None:
    outcome = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout == outcome.stderr == ""


def test_exports_are_exactly_the_listed_names():
    assert sorted(graftwork.__all__) == sorted(NAMES)
    assert set(graftwork._HOMES) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_export_exists_and_is_documented(name):
    assert getattr(graftwork, name).__doc__


def test_an_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = graftwork.no_such_name


def test_import_loads_no_heavy_package():
    in_a_fresh_process("""
        import sys, graftwork
        heavy = {"torch", "transformers", "datasets", "peft", "matplotlib", "numpy", "typer", "yaml"} & set(sys.modules)
        assert not heavy, heavy
    """)


def test_settings_load_without_torch():
    in_a_fresh_process("""
        import sys
        from graftwork import EvaluationSettings, RunConfig, TrainingSettings, load_recipe
        from graftwork.methods.topk.config import TopKConfig
        load_recipe("topk/unifiedqa-t5-base_boolq")
        assert not {"torch", "transformers"} & set(sys.modules)
    """)


def test_import_changes_no_global_state():
    in_a_fresh_process("""
        import logging, os, random, sys, warnings
        import torch, transformers, numpy
        from transformers import PreTrainedModel  # imports scikit-learn if installed, which has side effects of its own

        def state():
            verbosity = transformers.logging.get_verbosity()
            return (
                dict(os.environ), random.getstate(), torch.get_rng_state().tolist(), torch.get_default_dtype(),
                torch.get_num_threads(), torch.is_grad_enabled(), verbosity, logging.root.level,
                list(logging.root.handlers), list(warnings.filters), sys.excepthook,
                numpy.random.get_state()[1].tolist(),
            )

        before = state()
        import graftwork
        for name in graftwork.__all__:
            getattr(graftwork, name)
        assert state() == before
    """)
