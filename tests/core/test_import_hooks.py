"""Callbacks after the import of a module."""

from __future__ import annotations

import importlib
import sys

import pytest

from graftwork.core.import_hooks import after_import

LIBRARY = "VALUE = 1\n"
EXTENSION = "import hooked_library\nCALLS = []\ndef extend():\n    CALLS.append(hooked_library.VALUE)\n"


@pytest.fixture
def modules(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "hooked_library.py").write_text(LIBRARY)
    (tmp_path / "hooked_extension.py").write_text(EXTENSION)
    yield
    for name in ("hooked_library", "hooked_extension"):
        sys.modules.pop(name, None)


def test_a_callback_runs_once_after_the_module_and_leaves_its_loader_alone(modules):
    after_import("hooked_library", "hooked_extension:extend")
    after_import("hooked_library", "hooked_extension:extend")
    assert "hooked_extension" not in sys.modules
    library = importlib.import_module("hooked_library")
    assert sys.modules["hooked_extension"].CALLS == [1]
    assert "exec_module" not in vars(library.__spec__.loader)
    importlib.reload(library)
    assert sys.modules["hooked_extension"].CALLS == [1]


def test_a_callback_of_an_imported_module_runs_at_once(modules):
    importlib.import_module("hooked_library")
    after_import("hooked_library", "hooked_extension:extend")
    assert sys.modules["hooked_extension"].CALLS == [1]


def test_a_failing_callback_leaves_the_module_importable(modules, tmp_path):
    (tmp_path / "hooked_extension.py").write_text("def extend():\n    raise RuntimeError('unknown version')\n")
    after_import("hooked_library", "hooked_extension:extend")
    with pytest.warns(UserWarning, match="Graftwork cannot extend hooked_extension: RuntimeError: unknown version"):
        assert importlib.import_module("hooked_library").VALUE == 1


def test_a_callback_of_a_module_that_is_being_imported_runs_after_it(modules, tmp_path):
    # as transformers.modeling_utils imports torch, which imports an installed Graftwork, before it defines anything
    hook = "from graftwork.core.import_hooks import after_import\n"
    call = "after_import('hooked_library', 'hooked_extension:extend')\n"
    (tmp_path / "hooked_library.py").write_text(hook + call + LIBRARY)
    (tmp_path / "hooked_later.py").write_text("")
    importlib.import_module("hooked_library")
    importlib.import_module("hooked_later")
    del sys.modules["hooked_later"]
    assert sys.modules["hooked_extension"].CALLS == [1]
