"""Language of docstrings, comments and documents, and what a docstring must contain.

Run with paths to list offences: `python tests/test_language.py src/graftwork/training`.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "graftwork"

OPENERS = {"What", "Whether", "How", "Where", "Which", "Those", "Who", "Whom", "Whose"}
"""First words that hide the noun a reader looks for."""
WORDS = re.compile(
    r"manieth|\b(?:gone|goes|go|going) on with\b|\b(?:mends?|mended|mending|tells?|told|telling|says?|"
    r"said|saying|stands?|stood|standing|lies|lie|lay|lying|hangs)\b(?!-alone|alone)|\bnobody minds\b",
    re.I,
)
"""Words of speech and posture, which code does not have, and constructions that no reader searches for."""
FORMATTER = re.compile(r"fmt: (?:skip|off)")


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Docstrings of modules, classes, functions and attributes, with their lines."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            if (
                isinstance(statement, ast.Expr)
                and isinstance(statement.value, ast.Constant)
                and isinstance(statement.value.value, str)
            ):
                yield statement.lineno, statement.value.value


def comments(text: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def prose(markdown: str) -> Iterator[tuple[int, str]]:
    """Lines of a document outside code blocks, quotations of other texts, and inline code."""
    code = False
    for number, line in enumerate(markdown.splitlines(), start=1):
        if line.lstrip().startswith("```"):
            code = not code
        elif not code and not line.startswith(">"):
            yield number, re.sub(r"`[^`]*`", "", line)


def public_functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                # a method that implements a documented protocol refers to it, and dunders follow their class
                if isinstance(inner, ast.FunctionDef) and not inner.name.startswith("_"):
                    yield f"{node.name}.{inner.name}", inner


def arguments(function: ast.FunctionDef) -> list[ast.arg]:
    every = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [one for one in every if one.arg not in ("self", "cls")]


def tensor_without_shape(function: ast.FunctionDef) -> list[str]:
    """Tensor arguments whose shape is neither in the annotation nor in the docstring (`name …[batch keys]`, scalar)."""
    text = " ".join((ast.get_docstring(function) or "").split())
    missing = []
    for argument in arguments(function):
        annotation = "" if argument.annotation is None else ast.unparse(argument.annotation)
        if not re.search(r"\bTensor\b", annotation) or re.search(r"\[Tensor, ", annotation):
            continue
        if re.search(r"Mapping|dict|Sequence|list|tuple|Iterable|Callable", annotation):
            continue
        if not re.search(rf"\b{argument.arg}\b`?[^\[]{{0,160}}(?:\[[\w. ×*+-]*\]|scalar)", text):
            missing.append(argument.arg)
    return missing


def offences(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return [f"{path}:{line}: word {m[0]!r}" for line, own in prose(text) for m in WORDS.finditer(own)]
    tree = ast.parse(text)
    found = []
    for line, own in docstrings(tree):
        if own.split() and own.split()[0].strip(",:") in OPENERS:
            found.append(f"{path}:{line}: opener {own.split()[0]!r}")
        found += [f"{path}:{line}: word {m[0]!r}" for m in WORDS.finditer(re.sub(r"`[^`]*`", "", own))]
    found += [f"{path}:{line}: word {m[0]!r}" for line, own in comments(text) for m in WORDS.finditer(own)]
    for name, function in public_functions(tree):
        shown = ast.get_docstring(function) or ""
        found += [f"{path}:{function.lineno}: {name}: no shape of {one}" for one in tensor_without_shape(function)]
        follows = re.search(r"\bSee `?\w|Implements|Typer|Annotated\[", shown + ast.unparse(function.args))
        if len(arguments(function)) >= 5 and "Args:" not in shown and not follows:
            found.append(f"{path}:{function.lineno}: {name}: no Args section")
    return found


SOURCES = sorted(SOURCE.rglob("*.py"))
DOCUMENTS = sorted(
    [
        *(ROOT / "docs").rglob("*.md"),
        *SOURCE.rglob("*.md"),
        *(ROOT / f"{n}.md" for n in ("README", "CHANGELOG", "CONTRIBUTING")),
    ]
)


@pytest.mark.parametrize("path", [*SOURCES, *DOCUMENTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_language_shapes_and_argument_sections(path):
    found = offences(path)
    # an opener may be right now and then; they are counted below
    assert [line for line in found if ": opener " not in line] == []


def test_few_docstrings_hide_their_noun():
    every = [text for path in SOURCES for _, text in docstrings(ast.parse(path.read_text(encoding="utf-8")))]
    hidden = [line for path in SOURCES for line in offences(path) if ": opener " in line]
    assert len(hidden) <= len(every) / 100, hidden


def test_the_formatter_has_few_exceptions():
    found = [path for path in SOURCES for _ in FORMATTER.finditer(path.read_text(encoding="utf-8"))]
    assert len(found) <= 10, found


@pytest.mark.parametrize(
    ("source", "offence"),
    [
        ('"""Whether it is so."""', "opener 'Whether'"),
        ('"""True if it is gone on with."""', "word 'gone on with'"),
        ("# nobody minds", "word 'nobody minds'"),
        ('def f(x: Tensor) -> None:\n    """Add one to x."""', "no shape of x"),
        ('def f(a: int, b: int, c: int, d: int, e: int) -> None:\n    """Add."""', "no Args section"),
    ],
)
def test_offences_are_found(source, offence, tmp_path):
    (tmp_path / "module.py").write_text(source)
    assert any(line.endswith(offence) for line in offences(tmp_path / "module.py"))


@pytest.mark.parametrize(
    "source",
    [
        '"""True if it is so; resumes from the checkpoint."""',
        'def f(x: Tensor) -> None:\n    """Add one to x [rows width]."""',
        'def f(x: Float[Tensor, "rows width"]) -> None:\n    """Add one."""',
    ],
)
def test_good_sources_have_no_offence(source, tmp_path):
    (tmp_path / "module.py").write_text(source)
    assert offences(tmp_path / "module.py") == []


if __name__ == "__main__":
    for given in sys.argv[1:]:
        place = Path(given)
        for file in sorted([*place.rglob("*.py"), *place.rglob("*.md")]) if place.is_dir() else [place]:
            for offence in offences(file):
                print(offence)
