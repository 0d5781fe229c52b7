"""Code blocks of the documents run, links exist, and generated tables are up to date."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pytest

import walk
from graftwork.core.version import __version__
from graftwork.methods import NAMES
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.recipe import RunConfig, load_recipe, recipe_names
from graftwork.settings.training import TrainingSettings

ROOT = Path(__file__).parent.parent
CARDS = walk.cards()
DOCUMENTS = walk.documents()
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
BLOCKS = {name: walk.blocks_of(name, path) for name, path in DOCUMENTS.items()}
NOT_RUN = {
    "README.md": {2: "installs packages", 3: "installs packages"},
    "index": {2: "installs packages"},
    "ecosystem": {**dict.fromkeys((2, 3), "lm-eval downloads the data of its tasks"), 4: "needs the hub"},
    "memory": {3: "downloads a model; needs torchao", 4: "uses the downloaded model"},
    "scale": {
        1: "starts several processes; tests/methods/cald/test_commands.py does",
        2: "needs Docker",
        3: "the files are examples",
        4: "needs an encoder from the hub",
    },
    "serving": dict.fromkeys(range(1, 10), "needs a server, which tests/serving/test_guide.py starts"),
    "your_data": {2: "uses files of your own, and the hub"},
    "cald": {4: "needs a student trained with the authors' code"},
    "regrad": {3: "needs an object store", 4: "needs pairs of questions; tests/card_commands/regrad.txt has them"},
    "sparsefinder": {6: "needs the model and the text"},
    "topk": {6: "needs the network"},
}
"""Blocks with commands or Python code that are not executed, with the reason, by document and number."""


SLOW = {"cald": {4}, "sparsefinder": {3}}
"""Blocks that only the long test executes."""


def executed(document: str) -> list[walk.Block]:
    """Blocks of a document that a reader can execute in an empty folder."""
    listed = NOT_RUN.get(document, {})
    return [block for block in BLOCKS[document] if block.language in ("python", "shell") and block.number not in listed]


def unexpected(output: str) -> list[str]:
    """Lines of an output that a reader would take for a problem."""
    return re.findall(r"^.*(?:Traceback|Warning|Error|weights are in bfloat16).*$", output, re.M)


QUICK = ("README.md", "ten_minutes", "topk")
"""Documents whose blocks the default suite executes."""


@pytest.mark.parametrize(
    "document",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in DOCUMENTS if executed(name)],
)
def test_code_blocks_run_in_reading_order_in_an_empty_folder(document, cached_world, tmp_path):
    fast = [block for block in executed(document) if block.number not in SLOW.get(document, ())]
    output = walk.walk(fast, tmp_path)
    surprises = {str(block): lines for block, text in output.items() if (lines := unexpected(text))}
    assert surprises == {}


@pytest.mark.long
def test_all_documents_run_twice_in_one_folder(cached_world, tmp_path):
    blocks = [block for document in DOCUMENTS for block in executed(document)]
    assert len(blocks) > 25
    for _ in range(2):
        output = walk.walk(blocks, tmp_path)
        assert {str(block): lines for block, text in output.items() if (lines := unexpected(text))} == {}


@pytest.mark.long
def test_a_newcomer_follows_the_readme(tmp_path, monkeypatch):
    """One process for each command, as a reader starts them, with an empty cache; the second pass is above."""
    if shutil.which("graftwork", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("the graftwork command is not installed beside this Python")
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "empty"
    folder.mkdir()
    output = walk.walk(executed("README.md"), folder, alone=True)
    assert [unexpected(text) for text in output.values()] == [[]] * len(output)
    assert "demo/world/models/encoder_decoder" in "".join(output.values())
    assert (folder / "runs" / "first" / "report.html").is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.ipynb")), ids=lambda path: path.stem)
def test_cells_of_a_notebook_run_in_order(path, cached_world, tmp_path):
    """Run all cells in one namespace, and keep outputs out of the repository."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 3
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    whole = "\n".join("".join(cell["source"]) for cell in cells)
    output = walk.walk([walk.Block(path.name, 1, "python", whole, None)], tmp_path)
    assert "changes undone" in "".join(output.values())


def test_every_setting_and_every_recipe_is_in_the_documentation():
    settings = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    for cls in (TrainingSettings, EvaluationSettings, RunConfig):
        assert [field.name for field in fields(cls) if f"| `{field.name}` |" not in settings] == []
    recipes = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name in recipe_names():
        (row,) = re.findall(rf"^\| `{re.escape(name)}` \| (.+)$", recipes, re.M)
        purpose, published, command = row.removesuffix(" |").split(" | ")
        assert purpose
        assert name in command
        for number in load_recipe(name).published:
            assert f"{number.metric} {number.value:g} (`{number.task}`" in published


def test_blocks_that_are_not_executed_have_a_reason():
    for name, blocks in BLOCKS.items():
        listed = NOT_RUN.get(name, {})
        assert set(listed) <= {block.number for block in blocks}
        for block in blocks:
            if block.mark or (block.language == "text" and block.commands):
                assert block.number in listed, f"{block}: {block.mark or block.commands}"
            # the reader of the page sees the reason as well, except where a page is about a server
            if block.number in listed and block.language == "shell" and name != "serving":
                assert block.mark == listed[block.number]


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("graftwork list nothing", "Unknown kind"),
        ("echo one | graftwork predict no-model -\n", "Cannot load"),
        ("false | true\n", "ended with 1"),
        ("graftwork list methods > names\ngrep -q topkk names\n", "ended with 1"),
    ],
)
def test_a_failing_block_is_found(tmp_path, code, text):
    with pytest.raises(AssertionError, match=text):
        walk.walk([walk.Block("page", 1, "shell", code, None)], tmp_path)


def test_commands_in_a_block_read_stdin_variables_and_folders(tmp_path):
    code = "mkdir deep && cd deep\nX=methods\ngraftwork list $X | head -1 > ../out\ngraftwork --version > version\n"
    walk.walk([walk.Block("page", 1, "shell", code, None)], tmp_path)
    assert (tmp_path / "out").read_text().startswith("name")
    assert (tmp_path / "deep" / "version").read_text().strip() == __version__
    with pytest.raises(ZeroDivisionError):
        walk.walk([walk.Block("page", 1, "python", "1 / 0", None)], tmp_path)


FIGURES = json.loads((ROOT / "docs" / "measured.json").read_text(encoding="utf-8"))["figures"]


def numbers_on_card(place: dict) -> list[float]:
    """Numbers of a figure on a card: in cells of rows that start with a text, or in a text that the card contains."""
    card = CARDS[place["name"]].read_text(encoding="utf-8")
    if "text" in place:
        assert place["text"] in card
        texts = re.findall(r"\d+\.\d+", place["text"])
    else:
        rows = [(next(row for row in card.splitlines() if row.startswith(start)), n) for start, n in place["cells"]]
        texts = [re.search(r"\d+\.\d+", row.split(" | ")[column])[0] for row, column in rows]
    return [1 / float(text) if place.get("inverse") else float(text) for text in texts]


@pytest.mark.parametrize("figure", [one for one in FIGURES if "card" in one], ids=lambda figure: figure["id"])
def test_figures_of_the_readme_are_those_of_the_card(figure):
    measured = sorted(round(ratio, 2) for runs in figure.get("ratios", {}).values() for ratio in runs)
    assert sorted(round(number, 2) for number in numbers_on_card(figure["card"])) == measured
    assert "shown" not in figure or figure["card"]["text"].partition(" passages")[0] in figure["shown"]


def test_ratios_that_depend_on_the_machine_are_ranges_over_three_runs():
    repeated = [figure for figure in FIGURES if "script" in figure]
    assert len(repeated) == 8
    for figure in repeated:
        assert len(figure["ratios"]["1"]) >= 3, figure["id"]
        # with two threads, on this machine or on an earlier one
        assert figure["ratios"].get("2") or figure["earlier"], figure["id"]


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
    for document in (*DOCUMENTS.values(), ROOT / "CONTRIBUTING.md"):
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
