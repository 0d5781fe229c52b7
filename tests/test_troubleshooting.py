"""The errors on the page of troubleshooting exist in the source, and commands print them."""

from __future__ import annotations

import ast
import json
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch

from graftwork.cli.app import run as command
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import save
from graftwork.methods.topk import TopK
from tiny_models import tiny_model, word_tokenizer

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
ROW = re.compile(r"^\| `(\w+Error): ([^`]+)` \| ([^|]+) \| ([^|]+) \|$", re.M)
ANY = "…"


ERRORS = {
    name
    for path in (ROOT / "src" / "graftwork").rglob("*.py")
    for name in re.findall(r"^class (\w+Error)\(", path.read_text(encoding="utf-8"), re.M)
}


def rows() -> list[tuple[str, str]]:
    """Error class and first words of every row."""
    return [(match[1], match[2]) for match in ROW.finditer(PAGE.read_text(encoding="utf-8"))]


@cache
def templates() -> list[str]:
    """Texts in the source, with … for values."""
    found: list[str] = []
    for path in sorted((ROOT / "src" / "graftwork").rglob("*.py")):
        found += [_text(node) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    return [text for text in found if text]


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else ANY for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def matches(words: str, text: str) -> bool:
    """True if a text contains these words, with anything in place of each …."""
    return re.search(".*?".join(map(re.escape, words.split(ANY))), text, re.S) is not None


def test_the_page_has_thirty_rows_in_the_navigation():
    assert len(rows()) >= 30
    assert len(set(rows())) == len(rows())
    table_lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert len(table_lines) == len(rows())
    assert "troubleshooting.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "words"), rows())
def test_every_quoted_error_exists_in_the_source(name, words):
    pieces = [piece.strip() for piece in words.split(ANY) if len(piece.strip()) > 3]
    assert pieces, words
    assert any(all(piece in text for piece in pieces) for text in templates()), words
    assert name in ERRORS


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run, a model folder, and files with one fault each."""
    folder = tmp_path_factory.mktemp("faults")
    model = tiny_model("t5", dtype=torch.float32)
    save(convert(model, TopK(feed_forward_k=6), tokenizer=word_tokenizer()), folder / "run")
    plain = folder / "plain"
    tiny_model("t5", dtype=torch.float32).save_pretrained(plain)
    word_tokenizer().save_pretrained(plain)
    (folder / "rows.jsonl").write_text(json.dumps({"input": "w4 w5", "target": "w6"}) + "\n")
    (folder / "inputs.txt").write_text("w4\n")
    (folder / "latin.jsonl").write_bytes(b'{"input": "\xe9"}\n')
    (folder / "broken.jsonl").write_text("{\n")
    (folder / "nofield.jsonl").write_text('{"text": "w4"}\n')
    (folder / "number.jsonl").write_text('{"input": 4}\n')
    (folder / "broken.yaml").write_text("train: [\n")
    (folder / "mine.txt").write_text("mine")
    (folder / "empty").mkdir()
    gguf = shutil.copytree(plain, folder / "gguf", ignore=shutil.ignore_patterns("*.safetensors"))
    (gguf / "model.gguf").write_bytes(b"GGUF")
    bare = shutil.copytree(plain, folder / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert bare.is_dir()
    pointer = shutil.copytree(plain, folder / "pointer")
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    torn = shutil.copytree(plain, folder / "torn")
    (torn / "model.safetensors").write_bytes((plain / "model.safetensors").read_bytes()[:500])
    changed = shutil.copytree(folder / "run", folder / "changed")
    (changed / "model" / "config.json").write_text((changed / "model" / "config.json").read_text() + " ")
    edited = shutil.copytree(folder / "run", folder / "edited")
    (edited / "run.yaml").write_text((edited / "run.yaml").read_text().replace("seed: 0", "seed: 1"))
    return folder


NO_EFFECT = "Found random_weights (--random-weights) for …, which has weights"
COMMANDS = {
    "convert topc plain -o new": "Unknown …",
    "convert topk plain -o new --set method.feed_forward_q=1": "Unknown key … in …",
    "convert topk ./nothing -o new --feed-forward-k 6": "Cannot load a model from …: there is no such folder",
    "convert topk {not}/{id} -o new --feed-forward-k 6": "Cannot load a model from …: … Expected a folder, or a hub id",
    "convert topk empty -o new --feed-forward-k 6": "Cannot load a model from …: found no config.json",
    "convert topk gguf -o new --feed-forward-k 6": "Cannot load a model from …: found …, weights in another format",
    "convert topk bare -o new --feed-forward-k 6": "Cannot load a model from …: found a configuration without weights",
    "evaluate bare --task rows.jsonl": "Cannot load a model from …: found a configuration without weights",
    "evaluate plain --task rows.jsonl --random-weights": NO_EFFECT,
    "predict plain --input inputs.txt --random-weights": NO_EFFECT,
    "convert topk pointer -o new --feed-forward-k 6": "… is a pointer of Git LFS",
    "convert topk torn -o new --feed-forward-k 6": "… is damaged",
    "convert topk plain -o new": "… would change nothing in …",
    "convert topk plain -o run --feed-forward-k 5": "… already contains …. Give another run folder",
    "report run": "… holds no …",
    "evaluate changed --task rows.jsonl": "… has changed since the model was saved",
    "train edited --task rows.jsonl": "… has changed since the run wrote it",
    "run edited": "… has changed since the run wrote it",
    "train run": "Found no task to train on",
    "evaluate run": "Found no task to evaluate",
    "train run --config broken.yaml --task rows.jsonl": "…: not readable as YAML",
    "predict run --input inputs.txt -o mine.txt": "… exists and was not written by Graftwork",
    "evaluate run --task rows.jsonl --checkpoints last": "… holds no checkpoint",
    "evaluate run --task latin.jsonl": "…, line …: found byte …; expected UTF-8",
    "evaluate run --task broken.jsonl": "…, line …: found …, not JSON",
    "evaluate run --task nofield.jsonl": "…: found … with the columns …; expected a known format",
    "evaluate run --task number.jsonl": "…, line …: found …; expected …. Fix or remove the line",
    "prepare --input empty -o new squad1_1": "Found no … in …; expected a folder for each data set",
    "index -o empty --query a": "Found no index in …",
    "train run --task rows.jsonl --max-steps 1 --learning-rate 1e30 --lr-scheduler-type constant": (
        "… at step …. The model is not saved"
    ),
}
"""Row of the page by the command that prints it."""


@pytest.mark.parametrize(("line", "words"), COMMANDS.items())
def test_commands_print_the_errors_of_the_page(line, words, place, monkeypatch, capsys):
    name = next(name for name, quoted in rows() if quoted == words)
    monkeypatch.chdir(place)
    assert command(line.split()) in (1, 2)
    printed = " ".join(capsys.readouterr().err.split())
    assert f"{name}: " in printed
    assert matches(words, printed), printed
    assert not (place / "new").exists()
