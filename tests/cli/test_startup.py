"""Imports of each command, completion in shells, and the order of options and positionals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from graftwork.cli.app import command_line, run
from graftwork.demo import shipped_model
from graftwork.methods import NAMES, about, package

MODEL = shipped_model("encoder_decoder")

HEAVY = (
    *("accelerate", "datasets", "fastapi", "huggingface_hub", "jinja2", "lance", "matplotlib", "numpy", "pandas"),
    *("peft", "pyarrow", "ray", "scipy", "sklearn", "tokenizers", "torch", "transformers"),
)
"""Modules that take long to import."""
REPORTS = ("numpy", "matplotlib", "jinja2")
"""Those of them that pictures and pages need."""

CHILD = """
import contextlib, io, json, sys

commands, heavy = json.loads(sys.argv[1]), set(json.loads(sys.argv[2]))
imported, current = [], None

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in heavy and current is not None and name not in current[1]:
            imported.append([" ".join(current[0]), name])
            raise ModuleNotFoundError(f"{name} is heavy", name=name)

sys.meta_path.insert(0, Finder())
current = ["import graftwork.cli.app"], ()
from graftwork.cli.app import run
codes = []
for current in commands:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        codes.append([" ".join(current[0]), run(current[0]), len(out.getvalue())])
print(json.dumps([codes, imported]))
"""


def _leaves(words, command):
    yield [*words, "--help"], command
    for name, entry in getattr(command, "commands", {}).items():
        yield from _leaves([*words, name], entry)


@pytest.fixture(scope="module")
def leaves():
    return list(_leaves([], command_line()))


def test_commands_that_run_no_model_import_no_heavy_module(graftwork, leaves, converted_run, data, tmp_path):
    run_folder = shutil.copytree(converted_run, tmp_path / "run")
    small = ("--limit", "2", "--max-new-tokens", "2")
    assert graftwork("evaluate", run_folder, "--task", "world/facts", "--data", data, *small).code == 0
    predictions = str(next((run_folder / "predictions").rglob("*.jsonl")))
    free = [words for words, _ in leaves]
    free += [["convert", name, "--help"] for name in NAMES]
    free += [["show", name] for name in (*NAMES, "world/facts", "regrad/llama-3.1-8b-instruct_law")]
    free += [["list", kind, "--json"] for kind in ("methods", "tasks", "mixtures", "families", "recipes")]
    free += [["list", "tasks", "--method", "wt5"], ["doctor"]]
    reports = [["report", str(run_folder)], ["compare", predictions, predictions]]
    commands = [(words, ()) for words in free] + [(words, REPORTS) for words in reports]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(commands), json.dumps(HEAVY)],
        capture_output=True,
        text=True,
        check=True,
    )
    codes, imported = json.loads(child.stdout)
    assert imported == []
    assert [entry for entry in codes if entry[1] != 0 or not entry[2]] == []
    assert len(codes) > 40


@pytest.mark.parametrize("name", list(NAMES))
def test_a_method_is_described_as_its_class_is(name):
    cls, found = NAMES.get(name), about(name)
    assert (found.name, found.title, found.summary, found.paper) == (cls.name, cls.title, cls.summary, cls.paper)
    assert found.config_class is cls.config_class
    assert found.families == cls.families
    assert package(name) == cls.__module__.rpartition(".")[0]


def test_options_may_precede_positionals_in_every_verb(leaves):
    verbs = {" ".join(words[:-1]): command for words, command in leaves if not hasattr(command, "commands")}
    assert len(verbs) > 20
    assert [name for name, command in verbs.items() if not command.allow_interspersed_args] == []


@pytest.mark.parametrize(
    "words",
    [
        ("convert", "topk", MODEL, "--feed-forward-k", "16", "--dry-run"),
        ("convert", "--feed-forward-k", "16", "--dry-run", "topk", MODEL),
        ("convert", "--dry-run", "-o", "wt5", "topk", "--feed-forward-k", "16", MODEL),
        ("convert", "topk", "--dry-run", "--feed-forward-k=16", MODEL),
    ],
    ids=["after", "before", "the name of another method as a value", "between"],
)
def test_convert_takes_the_settings_of_the_method_in_any_order(graftwork, words):
    outcome = graftwork(*words)
    assert outcome.code == 0, outcome.err
    assert "TopKFeedForward(k=16" in outcome.out


def test_help_of_convert_names_every_method_and_the_way_to_its_settings(graftwork):
    text = graftwork("convert", "--help").out
    assert "graftwork convert METHOD --help" in text
    for name in NAMES:
        assert f"  {name} " in text
        assert about(name).title in text


def test_a_wrong_setting_points_to_the_help_of_its_method(graftwork):
    assert "See `graftwork convert topk --help`" in graftwork("convert", "topk", MODEL, "--feed-forwad-k", "3").err
    assert "See `graftwork convert --help`" in graftwork("convert", "--feed-forward-k", "3").err


def _completions(capfd, monkeypatch, line):
    monkeypatch.setenv("_GRAFTWORK_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    with pytest.raises(SystemExit) as ended:
        run([])
    captured = capfd.readouterr()
    assert ended.value.code == 0
    assert captured.err == ""
    return captured.out.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("graftwork pre", {"prepare", "predict"}),
        ("graftwork convert to", {"topk"}),
        ("graftwork convert topk M --feed-forward-c", {"--feed-forward-chunk-size"}),
        ("graftwork evaluate R --task world/f", {"world/facts"}),
        ("graftwork run wt5/t5-11b_cos", {"wt5/t5-11b_cos_e"}),
        ("graftwork list fam", {"families"}),
    ],
)
def test_a_shell_completes_verbs_methods_settings_tasks_and_recipes(capfd, monkeypatch, line, expected):
    assert expected <= set(_completions(capfd, monkeypatch, line))


def test_help_names_the_installation_of_completion(graftwork):
    assert "--install-completion" in graftwork("--help").out
