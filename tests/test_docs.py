"""Code blocks of the documents run, links exist, and generated tables are up to date."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pytest

from graftwork.demo import shipped_model
from graftwork.methods import NAMES

ROOT = Path(__file__).parent.parent
CARDS = {name: Path(str(files(NAMES.get(name).__module__.rpartition(".")[0]) / "README.md")) for name in NAMES}
# the blocks of the serving guide need a server: tests/serving/test_guide.py runs them
PAGES = [
    ROOT / "docs" / "index.md",
    *(page for page in sorted((ROOT / "docs" / "guides").glob("*.md")) if page.stem != "serving"),
]
DOCUMENTS = {"README.md": ROOT / "README.md", **{page.stem: page for page in PAGES}, **CARDS}
HEADINGS = [
    "What it changes",
    "Use it",
    "Settings",
    "Paper symbols ↔ names",
    "From the paper's commands to ours",
    "Supported families",
    "Published and reproduced numbers",
    "Differences from the paper and the authors' code",
    "When not to use it",
    "Citation",
]
BLOCK = re.compile(r"(?P<mark><!-- not run: [^\n]+ -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.S)
BLOCKS = [
    pytest.param(match["language"], match["code"], id=f"{name}-{number}-{match['language']}")
    for name, path in DOCUMENTS.items()
    for number, match in enumerate(BLOCK.finditer(path.read_text(encoding="utf-8")), start=1)
    if match["language"] in ("python", "shell") and not match["mark"]
]


@pytest.mark.parametrize(("language", "code"), BLOCKS)
def test_code_blocks_run(language, code, offline_world, tmp_path, monkeypatch, capsys):
    """Run one block in a folder that contains the offline world only. See `BLOCKS`."""
    (tmp_path / "world").symlink_to(offline_world)
    monkeypatch.chdir(tmp_path)
    if language == "python":
        exec(compile(code, "block", "exec"), {})
        return
    command = shutil.which("graftwork", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("the graftwork command is not installed beside this Python")
    environment = {
        **os.environ,
        "MODEL": shipped_model("encoder_decoder"),
        "ENCODER": shipped_model("encoder"),
        "DATA": str(offline_world / "unifiedqa"),
        "PATH": f"{Path(command).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
    }
    # one process for all commands of a block, because each would import torch again
    lines = [line.strip() for line in code.splitlines() if line.strip()]
    assert subprocess.run([command, "--version"], capture_output=True, env=environment, check=False).returncode == 0
    script = "\n".join(["set -e", 'graftwork() { echo "$@" >> calls; }', *lines])
    subprocess.run(["bash", "-c", script], check=True, env=environment)
    from graftwork.cli.app import run

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for call in (tmp_path / "calls").read_text().splitlines():
        assert run(call.split()) == 0, f"graftwork {call}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("name", NAMES)
def test_cards_have_the_same_headings(name):
    assert re.findall(r"^## (.+)$", CARDS[name].read_text(encoding="utf-8"), re.M) == HEADINGS


def test_generated_tables_are_up_to_date():
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "Up to date\n"), done.stdout + done.stderr


def test_readme_is_short_and_relative_links_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    for document in (*DOCUMENTS.values(), ROOT / "CONTRIBUTING.md", ROOT / "docs" / "guides" / "serving.md"):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", document.read_text(encoding="utf-8")):
            # the documentation generates a page for each card
            card = re.fullmatch(r"(?:\.\./)?methods/(\w+)\.md", target)
            exists = card[1] in NAMES if card else (document.parent / target).exists()
            assert exists, f"{document.name}: {target}"


REFERENCE = re.compile(r"`(?P<file>[\w/]+\.py)::(?P<name>[\w.]+)`")
LOOK_UPS = (ROOT / "docs" / "guides" / "reading.md").read_text(encoding="utf-8").split("\n### ")


def source_of(file: str, name: str) -> str | None:
    """Return the source of a class, function or method; None if the file does not define it."""
    text = (Path(str(files("graftwork"))) / file).read_text(encoding="utf-8")
    found: ast.AST | None = ast.parse(text)
    for part in name.split("."):
        body = getattr(found, "body", [])
        found = next((node for node in body if getattr(node, "name", None) == part), None)
    return None if found is None else ast.get_source_segment(text, found)


def test_every_name_in_the_guide_to_the_source_exists():
    named = [(match["file"], match["name"]) for match in REFERENCE.finditer("\n### ".join(LOOK_UPS))]
    assert len(named) > 20
    assert [f"{file}::{name}" for file, name in named if source_of(file, name) is None] == []


@pytest.mark.parametrize("text", LOOK_UPS[1:], ids=[text.partition("\n")[0] for text in LOOK_UPS[1:]])
def test_each_step_of_a_look_up_names_the_next_one(text):
    steps = [REFERENCE.search(step) for step in re.findall(r"^\d\. (.+(?:\n   .+)*)", text, re.M)]
    assert steps[0]["file"].endswith("/method.py")
    for before, after in pairwise(steps):
        # the source of each step must contain a name of the next step
        seen = source_of(before["file"], before["name"])
        assert any(re.search(rf"\b{part}\b", seen) for part in after["name"].split(".")), (before[0], after[0])
    found = re.search(r"^Found: `([\w/]+\.py)` → `(\w+)` → `(\w+)`", text, re.M)
    assert source_of(found[1], f"{found[2]}.{found[3]}")
    assert found[1].split("/")[1] == steps[0]["file"].split("/")[1]


def test_the_guide_to_the_source_has_a_look_up_for_every_method():
    assert len(LOOK_UPS[1:]) == 5
    assert {text.partition("methods/")[2].partition("/")[0] for text in LOOK_UPS[1:]} == {*NAMES} - {"topk"}


@pytest.mark.parametrize(
    ("name", "letter", "count"), [("topk", "D", 31), ("cald", "C", 22), ("wt5", "Q", 29), ("regrad", "Q", 23)]
)
def test_every_defect_of_the_authors_code_is_addressed_on_the_card(name, letter, count):
    card = CARDS[name].read_text(encoding="utf-8")
    assert [int(number) for number in re.findall(rf"^\| {letter}(\d+) ", card, re.M)] == list(range(1, count + 1))
