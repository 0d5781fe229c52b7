"""Imports point one way along the spine, including those in functions, type checks and registry strings."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "graftwork"

SPINE: list[set[str]] = [
    {"errors"},
    {"core"},
    {"surgery", "settings", "metrics", "retrieval"},
    {"tasks"},
    {"training", "reporting"},
    {"grafting"},
    {"evaluation", "method"},
    {"methods"},
    {"pipeline"},
    {"serving", "demo"},
    {"cli"},
]
"""Slots of packages from left to right; a package imports only from slots to its left."""

SLOT = {name: slot for slot, names in enumerate(SPINE) for name in names}
DOTTED = re.compile(r"^graftwork((?:\.\w+)+)(?::\w+)?$")


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
INSIDE = [name for name in MODULES if name not in ("", "__main__")]


def imported(tree: ast.AST) -> set[str]:
    """Return the package modules imported by a syntax tree, by statements or by strings such as "graftwork.a:B"."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "graftwork":
            inner = node.module.removeprefix("graftwork").strip(".")
            for alias in node.names:
                whole = f"{inner}.{alias.name}".strip(".")
                found.add(whole if whole in MODULES else inner)
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.removeprefix("graftwork.") for alias in node.names if alias.name.startswith("graftwork")
            }
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and (match := DOTTED.match(node.value)):
            whole = match[1].strip(".")
            # names of entry-point groups look like modules, so that only existing modules count
            if whole in MODULES and (":" in node.value or whole.count(".")):
                found.add(whole)
    return found


@cache
def imports(module: str) -> frozenset[str]:
    return frozenset(imported(ast.parse(MODULES[module].read_text(encoding="utf-8"))))


def package(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("module", INSIDE)
def test_a_module_imports_only_from_the_left(module):
    own = package(module)
    for target in imports(module):
        other = package(target)
        assert target != "", f"{module} imports from the package itself; name the module instead"
        assert other == own or SLOT[other] < SLOT[own], f"{module} imports {target}, which is not to its left"


def test_imports_between_files_have_no_cycle():
    """Depth-first search over imports from every file; a file that is on the current path closes a cycle."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in sorted(imports(module)):
                if target in MODULES and target != module:
                    visit(target, (*path, module))
            done.add(module)

    for module in INSIDE:
        visit(module, ())


def test_methods_never_import_each_other():
    for module in INSIDE:
        if module.startswith("methods."):
            own = module.split(".")[1]
            others = {target.split(".")[1] for target in imports(module) if target.startswith("methods.")}
            assert others <= {own}, f"{module} imports {others}"


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    from graftwork.cli import app",
        "if TYPE_CHECKING:\n    from graftwork.cli.app import app",
        "ENTRIES = {'a': 'graftwork.cli.app:app'}",
        "import graftwork.cli.app",
    ],
)
def test_imports_in_functions_type_checks_and_strings_are_found(source):
    assert any(package(target) == "cli" for target in imported(ast.parse(source)))


def test_settings_import_no_torch():
    for module, path in MODULES.items():
        if package(module) in ("errors", "core", "settings") or re.fullmatch(r"methods\.\w+\.config", module):
            assert not {"torch", "transformers"} & top_level_imports(path), module


def top_level_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found
