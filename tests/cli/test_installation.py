"""What is installed holds everything, and says what is not installed."""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import constants  # noqa: F401 (reads the environment once, before commands change it)

from graftwork.cli.app import run
from graftwork.demo import shipped_model

ROOT = Path(__file__).parents[2]
SMALL = ("--limit", "1", "--max-new-tokens", "2", "--max-input-tokens", "32")
STEP = ("--max-steps", "1", "--max-input-tokens", "16", "--per-device-train-batch-size", "2", "--set", "train.take=4")
CASES = [
    ("tantivy", "tantivy", "regrad", "index corpus.tsv -o index"),
    ("lance", "pylance", "regrad", "bank build regrad corpus.tsv -o bank"),
    ("obstore", "obstore", "regrad", "bank stats s3://bucket/bank"),
    ("ray", "ray", "ray", "bank build regrad corpus.tsv -o bank --workers 1"),
    ("elasticsearch", "elasticsearch", "elasticsearch", "index corpus.tsv -o wiki --backend elasticsearch"),
    ("opensearchpy", "opensearch-py", "opensearch", "index corpus.tsv -o wiki --backend opensearch"),
    ("fastapi", "fastapi", "serve", "serve regrad"),
    ("gradio", "gradio", "serve", "serve regrad"),
    ("peft", "peft", "lora", "train MODEL --task world/facts --data WORLD/unifiedqa LORA STEP"),
    (
        "sklearn",
        "scikit-learn",
        "sparsefinder",
        "train sparsefinder --task wikitext/103_raw --data WORLD/wikitext STEP",
    ),
    ("sacrebleu", "sacrebleu", "wt5", "evaluate MODEL --task esnli_eval_v010 --split validation --data WORLD SMALL"),
    (
        "spacy",
        "spacy",
        "wt5",
        "evaluate MODEL --task movie_rationales_eval_v010 --split validation --data WORLD --mode reference SMALL",
    ),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("without")
    (folder / "corpus.tsv").write_text("id\ttext\ttitle\n1\tan owl sat\tx\n")
    for method, model, options in (
        ("topk", "encoder_decoder", ("--feed-forward-k", "8")),
        ("regrad", "decoder", ("--rank", "2")),
        ("sparsefinder", "encoder", ("--grouping", "kmeans", "--no-finetune", "--samples", "4")),
    ):
        words = ["convert", method, shipped_model(model), "-o", str(folder / method), "--dtype", "float32", *options]
        assert run(words) == 0
    return folder


@pytest.mark.parametrize(("module", "package", "extra", "line"), CASES, ids=[case[0] for case in CASES])
def test_a_missing_extra_names_itself_in_one_line(
    module, package, extra, line, place, offline_world, monkeypatch, capsys
):
    from graftwork.methods.wt5 import parsing

    for cached in (parsing._spacy, parsing._spacy_tokens):
        cached.cache_clear()
    for name in [module, *(name for name in sys.modules if name.startswith(f"{module}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(place)
    for name in ("ELASTICSEARCH", "OPENSEARCH"):
        monkeypatch.setenv(f"GRAFTWORK_{name}_URL", "http://localhost:9")
    known = {"MODEL": ("topk",), "STEP": STEP, "SMALL": SMALL, "LORA": ("--set", "train.lora={r: 2}")}
    words = [part.replace("WORLD", str(offline_world)) for word in line.split() for part in known.get(word, (word,))]
    capsys.readouterr()
    assert run(words) == 1
    said = capsys.readouterr().err.strip().splitlines()
    told = [line for line in said if " cut after " not in line]
    assert told == [
        f"MissingExtraError: {package} is not installed, and this needs it. Run: pip install 'graftwork[{extra}]'."
    ]


def test_a_wheel_holds_every_file_of_the_package(tmp_path):
    wheel = pytest.importorskip(
        "hatchling.builders.wheel", reason="nothing to build a wheel with: pip install hatchling"
    )
    (path,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path))
    with zipfile.ZipFile(path) as archive:
        held = set(archive.namelist())
        (metadata,) = (name for name in held if name.endswith(".dist-info/METADATA"))
        described = archive.read(metadata).decode()
    extras = {line for line in described.splitlines() if line.startswith("Provides-Extra: ")}
    # the package index shows the README alone, where relative links lead nowhere
    links = re.findall(r"\]\(([^)\s]+)\)", described)
    repository = re.findall(r"^Project-URL: Repository, (.+)$", described, re.M)[0]
    own = [link.removeprefix(f"{repository}/blob/main/") for link in links if link.startswith(repository)]
    assert len(own) > 10
    assert [link for link in own if not (ROOT / link.partition("#")[0]).exists()] == []
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    source = ROOT / "src"
    files = {
        str(file.relative_to(source))
        for file in (source / "graftwork").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert files - held == set()
    assert {"graftwork/py.typed", "graftwork/demo/models/encoder/model.safetensors"} <= files
    assert {extra for _, _, extra, _ in CASES} <= {extra.partition(": ")[2] for extra in extras}
