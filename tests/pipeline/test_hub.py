"""Models pushed to the hub and loaded from it, against a stand-in of its HTTP API, in new processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import errors

import graftwork
from fake_hub import FakeHub
from graftwork.core.hub import hub_problem
from graftwork.demo import shipped_model
from graftwork.errors import ConfigError
from graftwork.grafting.conversion import convert
from graftwork.grafting.model_card import MARK
from graftwork.methods.sparsefinder import Sparsefinder
from graftwork.methods.topk import TopK
from graftwork.pipeline.evaluation import evaluate
from graftwork.pipeline.loading import load
from graftwork.settings.evaluation import EvaluationSettings
from peft_adapters import adapted

ROOT = Path(graftwork.__file__).parents[1]
IDS = [[5, 9, 11, 40, 2]]
COMMON = """
import os, sys, torch
import graftwork as gw
from graftwork.cli.app import run as command
ids = torch.tensor([[5, 9, 11, 40, 2]])
def attempt(call):
    try:
        return call()
    except gw.GraftworkError as error:
        assert "\\n" not in str(error)
        print(error)
def logits(model):
    with torch.no_grad():
        return model(input_ids=ids).logits
"""
PUSH = """
learned = gw.load("sparsefinder_run")
print(learned.push_to_hub("user/learned"))
assert command(["push", "run", "user/run", "--whole-run", "--private", "--commit-message", "A run"]) == 0
topk = gw.load("run")
print(topk.push_to_hub("user/run", revision="next"))
in_memory = gw.convert(gw.load("run/model").model, gw.TopK(attention_k=3))
print(in_memory.push_to_hub("user/memory", create_pr=True))
attempt(lambda: topk.push_to_hub("other/run"))
attempt(lambda: topk.push_to_hub("user/run/more"))
attempt(lambda: in_memory.push_to_hub("user/memory", whole_run=True))
with torch.no_grad():
    next(topk.model.parameters()).add_(1)
attempt(lambda: topk.push_to_hub("user/run"))
del os.environ["HF_TOKEN"]
attempt(lambda: topk.push_to_hub("user/run"))
"""
LOAD = """
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
for name, kind in (("user/learned", AutoModelForMaskedLM), ("user/run", AutoModelForCausalLM)):
    found = gw.load(name)
    assert torch.equal(logits(found.model), logits(kind.from_pretrained(name)))
    torch.save(logits(found.model), name.replace("/", "_") + ".pt")
    print(name, [method.name for method in found.methods], found.origin.model, found.folder)
print([method.config.attention_k for method in gw.load("user/run", revision="next").methods])
whole = gw.load("user/folder")
print(torch.equal(logits(whole.model), logits(found.model)), whole.origin.model)
adapted, _ = gw.load_model("user/adapter", dtype="float32")
torch.save(logits(adapted), "user_adapter.pt")
attempt(lambda: gw.load("user/missing"))
attempt(lambda: gw.load("gated/model"))
attempt(lambda: gw.load("user/run", revision="nowhere"))
attempt(lambda: gw.load("user/../run"))
"""
AWAY = """
if os.environ["HF_HUB_OFFLINE"] == "1":
    found = gw.load("user/run")
    print(torch.equal(logits(found.model), torch.load("user_run.pt")))
attempt(lambda: gw.load("user/missing"))
"""


def in_process(code: str, folder: Path, hub: str, **variables: str) -> list[str]:
    """Lines that a new process prints; it reads the address of the hub at import."""
    own = {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": str(ROOT),
        **variables,
    }
    done = subprocess.run(
        [sys.executable, "-c", COMMON + code],
        cwd=folder,
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.long
def test_models_are_pushed_and_loaded_by_new_processes(tmp_path):
    pytest.importorskip("peft")
    run = convert(load(shipped_model("decoder"), dtype="float32"), TopK(attention_k=2))
    run.save(tmp_path / "run")
    learned = convert(load(shipped_model("encoder"), dtype="float32"), Sparsefinder(alpha=1.5))
    learned.save(tmp_path / "sparsefinder_run")
    wrapped = adapted(load(shipped_model("decoder"), dtype="float32").model, "decoder")
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = {"learned": learned.model, "run": run.model, "adapter": wrapped}
    with torch.no_grad():
        expected = {name: model(input_ids=torch.tensor(IDS)).logits for name, model in expected.items()}
    with FakeHub() as hub:
        pushed = in_process(PUSH, tmp_path, hub.endpoint, HF_TOKEN="writer")
        assert pushed[0].startswith(f"{hub.endpoint}/user/learned/commit/")
        assert pushed[3] == f"{hub.endpoint}/user/memory/discussions/1"
        refused = pushed[4:]
        for line, words in zip(
            refused,
            (
                "Cannot push to other/run: the hub answered 403",
                "is no id of a repository. Expected OWNER/NAME",
                "Found no run folder of this model",
                "Found other weights or methods than those in run",
                "found no token of the hub. Log in with `hf auth login`, or set HF_TOKEN.",
            ),
            strict=True,
        ):
            assert words in line
        repository = hub.repositories["user/run"]
        files = repository.commits[repository.branches["main"]]
        assert repository.private
        assert repository.messages[0] == "A run"
        assert {"README.md", "graftwork.json", "config.json", "tokenizer.json", "run/run.yaml"} <= files.keys()
        assert repository.lfs == {"model.safetensors"}
        assert 'gw.load("user/run")' in files["README.md"].decode()
        assert all(card["library_name"] == "graftwork" for card in hub.cards)
        # a run folder and an adapter that other programs have uploaded
        hub.repositories["user/folder"] = uploaded(tmp_path / "run")
        hub.repositories["user/adapter"] = uploaded(tmp_path / "adapter")
        loaded = in_process(LOAD, tmp_path, hub.endpoint, HF_TOKEN="reader", HF_HOME=str(tmp_path / "other"))
        assert loaded[:2] == [
            "user/learned ['sparsefinder'] user/learned None",
            "user/run ['topk'] user/run None",
        ]
        assert loaded[2:4] == ["[2]", "True user/folder"]
        for line, words in zip(
            loaded[4:],
            (
                "'user/missing': the hub has no such repository",
                "restricted (gated)",
                "no such revision",
                "no such folder",
            ),
            strict=True,
        ):
            assert words in line
    for name, logits in expected.items():
        found = torch.load(tmp_path / f"user_{name}.pt")
        torch.testing.assert_close(found, logits, atol=1e-5 if name == "adapter" else 0, rtol=0)
    # the server is gone: what is in the cache loads, and the rest is one line
    other = str(tmp_path / "other")
    [line] = in_process(AWAY, tmp_path, hub.endpoint, HF_HOME=other)
    assert "cannot be reached" in line
    whole, line = in_process(AWAY, tmp_path, hub.endpoint, HF_HOME=other, HF_HUB_OFFLINE="1")
    assert whole == "True"
    assert "HF_HUB_OFFLINE is set" in line


def uploaded(folder: Path) -> object:
    from fake_hub import Repository

    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return Repository(False, {"1" * 40: files}, {"main": "1" * 40})


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, offline_world) -> Path:
    run = tmp_path_factory.mktemp("card") / "run"
    convert(load(shipped_model("encoder_decoder")), TopK(feed_forward_k=16)).save(run)
    before = (run / "model" / "README.md").read_text()
    assert "Not measured." in before
    settings = EvaluationSettings(limit=20, baseline=True, cost_lengths=(8,), max_new_tokens=8)
    evaluate(run, ["world/facts"], settings=settings, data=offline_world / "unifiedqa")
    return run


def test_the_model_card_has_scores_and_costs_beside_the_dense_model(evaluated):
    text = (evaluated / "model" / "README.md").read_text()
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["library_name"] == "graftwork"
    assert header["tags"] == ["graftwork", "transformers", "topk"]
    assert "base_model" not in header
    results = json.loads((evaluated / "results.json").read_text())
    scores = {row["label"]: row["scores"]["exact_match"] for row in results["rows"]}
    [shown] = header["model-index"][0]["results"][0]["metrics"][:1]
    assert (shown["type"], shown["value"]) == ("exact_match", scores["converted"])
    difference = scores["converted"] - scores["dense"]
    row = next(line for line in text.splitlines() if line.startswith("| world/facts | dev | exact_match |"))
    assert f"| {scores['dense']:.2f} | {scores['converted']:.2f} |" in row
    assert f"{abs(difference):.1f} points [" in row
    assert row.endswith("| 20 |")
    assert "| forward pass of 8 tokens, converted |" in text
    assert "| `decoder.block.*.layer.2.DenseReluDense` | 0–1 |" in text
    assert "https://arxiv.org/abs/2106.06899" in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["method"] == {"name": "topk", "feed_forward_k": 16}
    assert str(evaluated.parent) not in text
    # the card is no part of what the manifest vouches for
    load(evaluated)


def test_a_readme_of_someone_else_is_kept(evaluated):
    from graftwork.core.run_folder import RunFolder
    from graftwork.grafting.model_card import write_card

    file = evaluated / "model" / "README.md"
    before = file.read_text()
    file.write_text("Mine.")
    write_card(RunFolder(evaluated), load(evaluated).methods)
    assert file.read_text() == "Mine."
    file.write_text(f"old\n{MARK}\n")
    write_card(RunFolder(evaluated), load(evaluated).methods)
    assert file.read_text() == before


def test_a_base_model_on_the_hub_is_named_in_the_header(tmp_path):
    from dataclasses import replace

    converted = convert(load(shipped_model("decoder")), TopK(attention_k=2))
    assert converted.origin is not None
    replace(converted, origin=replace(converted.origin, model="owner/base")).save(tmp_path / "run")
    header = yaml.safe_load((tmp_path / "run" / "model" / "README.md").read_text().split("---\n")[1])
    assert (header["base_model"], header["base_model_relation"]) == ("owner/base", "finetune")
    assert header["pipeline_tag"] == "text-generation"


def test_an_upload_without_token_or_id_is_refused_before_anything_is_written(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    converted = convert(load(shipped_model("decoder")), TopK(attention_k=2))
    with pytest.raises(ConfigError, match=r"Cannot push to user/name: found no token"):
        converted.push_to_hub("user/name")
    with pytest.raises(ConfigError, match=r"is no id of a repository\. Expected OWNER/NAME"):
        converted.push_to_hub("a/b/c", token="writer")


def test_errors_of_other_kinds_are_not_taken_for_those_of_the_hub():
    assert hub_problem(ValueError("other"), "user/name") is None
    wrapped = OSError("We couldn't connect")
    wrapped.__cause__ = errors.OfflineModeIsEnabled("offline")
    assert "HF_HUB_OFFLINE" in str(hub_problem(wrapped, "user/name"))
