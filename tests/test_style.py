"""Rules of style that no linter knows."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "graftwork"
FILES = {str(path.relative_to(SOURCE)): path for path in sorted(SOURCE.rglob("*.py"))}


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_long(name):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("name", FILES)
def test_no_assert_and_no_path_of_one_machine(name):
    text = FILES[name].read_text(encoding="utf-8")
    assert not [node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assert)]
    assert not re.findall(r"[\"'](?:/home|/Users|/root|/work|/tmp|[A-Z]:\\)[/\\]?", text)
