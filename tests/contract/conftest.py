"""Parametrisation of the contract tests over methods and families."""

from __future__ import annotations

import pytest

from contract_settings import FURTHER, Case
from graftwork.methods import NAMES
from tiny_models import TINY, family_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    methods = [NAMES.get(name) for name in NAMES]
    if "case" in metafunc.fixturenames:
        only = metafunc.definition.get_closest_marker("only")
        cases = [
            Case(method, name)
            for method in methods
            for name, tiny in TINY.items()
            if (family_of(name) in method.families or name in FURTHER.get(method.name, ()))
            and (only is None or tiny.kind in only.args)
            and (method.changes_model or not metafunc.definition.get_closest_marker("changes_model"))
        ]
        metafunc.parametrize("case", cases, ids=[f"{case.method_class.name}-{case.name}" for case in cases])
    elif "method_class" in metafunc.fixturenames:
        metafunc.parametrize("method_class", methods, ids=[method.name for method in methods])
