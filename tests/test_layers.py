"""Imports point one way only, those inside functions too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "graftwork"

LAYERS = [
    {"errors", "files", "processes", "progress", "registry"},
    {"config", "run_folder", "lengths"},
    {"method"},
    {"surgery", "tasks", "metrics", "retrieval"},
    {"evaluation_settings", "training.settings"},
    {
        "training",
        "methods",
        "checkpoint",
        "conversion",
        "prediction",
        "language_modelling",
        "loading",
        "prompting",
        "costs",
        "recipe",
        "reporting",
    },
    {"pipeline"},
    {"runner", "graph_report", "serving"},
    {"demo", "cli"},
]
"""From the bottom; what stands in one layer may import its own layer and those below, except as `APART` says."""

APART = {
    "methods": {"checkpoint", "conversion", "prediction", "costs", "recipe", "reporting", "loading", "prompting"},
    "surgery": {"tasks", "metrics", "retrieval"},
    "metrics": {"surgery", "tasks", "retrieval"},
}

EXCEPTIONS = {
    # the protocol's default phase is plain fine-tuning
    ("method", "training"),
    # a name of a shipped task or mixture leads to the offline world, lazily
    ("tasks", "demo"),
}


def layer_of(module: str) -> tuple[int, str]:
    for level, names in reversed(list(enumerate(LAYERS))):
        for name in sorted(names, key=len, reverse=True):
            if (module == name or module.startswith(f"{name}.")) and not (
                name == "training" and module == "training.settings"
            ):
                return level, name
    raise AssertionError(f"{module} stands in no layer")


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name not in ("", "__main__"):
            found[name] = path
    return found


def imports(path: Path) -> set[str]:
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        # what only a type checker sees is no dependency
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "graftwork":
            inner = node.module.removeprefix("graftwork").strip(".")
            for alias in node.names:
                whole = f"{inner}.{alias.name}".strip(".")
                found.add(whole if whole in MODULES else inner)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("graftwork.") for a in node.names if a.name.startswith("graftwork.")}
    return found - {""}


MODULES = modules()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_lies_below(module):
    level, name = layer_of(module)
    for target in imports(MODULES[module]):
        other_level, other = layer_of(target)
        if (name, other) in EXCEPTIONS:
            continue
        assert other_level <= level, f"{module} imports {target}, which lies above it"
        assert other not in APART.get(name, ()), f"{module} imports {target}, which stands beside it"


def test_methods_never_import_each_other():
    for module, path in MODULES.items():
        if module.startswith("methods."):
            own = module.split(".")[1]
            others = {target.split(".")[1] for target in imports(path) if target.startswith("methods.")}
            assert others <= {own}, f"{module} imports {others}"


def test_configurations_import_no_torch():
    for module in (
        "config",
        "recipe",
        "lengths",
        "evaluation_settings",
        "training.settings",
        "registry",
        "errors",
        "method",
    ):
        assert "torch" not in top_level_imports(MODULES[module]), module
    for module, path in MODULES.items():
        if module.startswith("methods.") and module.endswith(".config"):
            assert "torch" not in top_level_imports(path), module


def top_level_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found
