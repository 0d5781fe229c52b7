"""Style rules that ruff does not check."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "graftwork"
FILES = {str(path.relative_to(SOURCE)): path for path in sorted(SOURCE.rglob("*.py"))}


@pytest.mark.parametrize("name", FILES)
def test_files_have_at_most_400_lines(name):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("name", FILES)
def test_files_contain_no_assert_and_no_absolute_path(name):
    text = FILES[name].read_text(encoding="utf-8")
    assert not [node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assert)]
    assert not re.findall(r"[\"'](?:/home|/Users|/root|/work|/tmp|[A-Z]:\\)[/\\]?", text)
