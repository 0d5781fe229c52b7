"""A sixth method needs its folder, one line in `NAMES`, and a recipe; everything that lists methods finds it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

CONFIG = '''"""Settings of the mean."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MeanConfig:
    """Settings of the mean."""

    strength: float = 1.0
    """Factor on the mean; below 1 it shrinks the output."""
'''

METHOD = '''"""Attention that averages the values."""

from __future__ import annotations

from graftwork.grafting.method import Change, Method, Paper
from graftwork.methods.mean.config import MeanConfig


class Mean(Method[MeanConfig]):
    """Attention that averages the values."""

    name = "mean"
    title = "Mean attention"
    summary = "attention without scores"
    paper = Paper("The mean", "arXiv:0000.00000", 1999, "nobody/mean")
    config_class = MeanConfig
    families = frozenset({"gpt2"})

    def apply(self, model):
        """Change nothing: this method exists to be listed."""
        return [Change("lm_head", "Linear", "Linear")]
'''

PACKAGE = '''"""Mean attention."""

from graftwork.methods.mean.config import MeanConfig
from graftwork.methods.mean.method import Mean

__all__ = ["Mean", "MeanConfig"]
'''

COMMANDS = '''"""Commands of the mean."""


def averages() -> None:
    """Print an average."""
    print("average 42")


COMMANDS = {"averages": averages}
'''

TABLES = '''"""Tasks of the mean."""

from dataclasses import replace

from graftwork.tasks.unifiedqa import unifiedqa_task

TASKS = {"mean_task": replace(unifiedqa_task("mean"), name="mean_task")}
MIXTURES = {}
'''

CARD = """# Mean attention

<!-- settings: begin -->
<!-- settings: end -->
<!-- families: begin -->
<!-- families: end -->
"""

CHECKS = """
import sys

sys.path.insert(0, "docs")
import hooks

import graftwork
from graftwork.demo.run import PARTS

assert graftwork.Mean.name == "mean" and "Mean" in graftwork.__all__ and "Mean" in dir(graftwork)
assert graftwork.get_task("mean_task").name == "mean_task"
assert "mean" in hooks.method_names()
assert "::: graftwork.methods.mean.Mean\\n::: graftwork.methods.mean.config.MeanConfig" in hooks.methods_api()
assert hooks.card("mean").startswith("# Mean attention")


class Config:
    nav = [{"Methods": []}]


assert "methods/mean.md" in hooks.on_config(Config()).nav[0]["Methods"]
assert "mean" in PARTS
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", folder)
    package = folder / "src" / "graftwork"
    method = package / "methods" / "mean"
    method.mkdir()
    for name, text in {
        "__init__.py": PACKAGE,
        "config.py": CONFIG,
        "method.py": METHOD,
        "commands.py": COMMANDS,
        "tables.py": TABLES,
        "README.md": CARD,
    }.items():
        (method / name).write_text(text)
    names = package / "methods" / "__init__.py"
    line = '        "cald": "graftwork.methods.cald:Cald",\n'
    text = names.read_text()
    assert line in text
    names.write_text(text.replace(line, line + '        "mean": "graftwork.methods.mean:Mean",\n'))
    recipes = package / "recipes" / "mean"
    recipes.mkdir()
    (recipes / "half.yaml").write_text("model: gpt2\nmethod: {name: mean, strength: 0.5}\n")
    # the demonstration of a method is optional, and found by its file
    parts = package / "demo" / "parts"
    shutil.copy(parts / "topk.py", parts / "mean.py")
    return folder


def python(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder / "src")}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_exports_tasks_documentation_and_demonstration_find_it(copy):
    python(copy, "-c", CHECKS)


@pytest.mark.long
def test_tables_of_readme_and_card_are_generated(copy):
    assert "README.md" in python(copy, "docs/generate.py")
    assert "| `mean` | attention without scores | [0000.00000]" in (copy / "README.md").read_text()
    card = (copy / "src" / "graftwork" / "methods" / "mean" / "README.md").read_text()
    assert "| `strength` | `float` | `1.0` | Factor on the mean; below 1 it shrinks the output. |" in card
    assert "| `gpt2` |" in card
    assert python(copy, "docs/generate.py", "--check") == "Up to date\n"


def test_the_command_line_lists_it_and_runs_its_commands(copy):
    program = (
        "from graftwork.cli.app import run\n"
        "for words in (['list', 'methods'], ['list', 'recipes', '--method', 'mean'], ['show', 'mean'], ['averages'],"
        " ['convert', 'mean', '--help']):\n"
        "    assert run(words) == 0, words\n"
    )
    printed = python(copy, "-c", program)
    assert "mean\tMean attention\tarXiv:0000.00000 (1999)" in printed
    assert "mean/half" in printed
    assert "average 42" in printed
    assert "--strength" in printed
