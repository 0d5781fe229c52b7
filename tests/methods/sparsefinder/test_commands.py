"""Acceptance case 28: our equivalents of the five commands of the authors' readme, on a random model and short text."""

from __future__ import annotations

import json
import random
from dataclasses import fields

import pytest
import torch

import graftwork as gw
from graftwork.cli.app import run as command
from graftwork.errors import CheckpointMismatchError, ConfigError
from graftwork.methods.sparsefinder.config import SparsefinderConfig
from graftwork.methods.sparsefinder.extraction import QueriesKeys, extract
from graftwork.methods.sparsefinder.legacy import import_dump
from graftwork.methods.sparsefinder.modules import override_rules, sparsefinder_modules
from graftwork.methods.sparsefinder.old_flags import OLD_FLAGS
from tiny_models import VOCABULARY, tiny_model, word_tokenizer


@pytest.fixture(scope="module")
def wikipath(tmp_path_factory):
    """A few kilobytes in the layout of WikiText-103 raw."""
    folder = tmp_path_factory.mktemp("wiki") / "wikitext-103-raw"
    folder.mkdir()
    draw = random.Random(1)
    for split, count in (("train", 60), ("valid", 20)):
        lines = [" ".join(f"w{draw.randrange(4, VOCABULARY)}" for _ in range(20)) for _ in range(count)]
        (folder / f"wiki.{split}.raw").write_text("".join(f" {line} \n \n" for line in lines))
    return folder.parent


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """A random RoBERTa of two layers with a tokenizer that has a mask."""
    folder = tmp_path_factory.mktemp("model") / "roberta"
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<unk>"})
    tiny_model("roberta", dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(roberta, wikipath, tmp_path_factory):
    """Steps 1 to 3b: convert, then fine-tune, extract, project and cluster in one command."""
    folder = tmp_path_factory.mktemp("run") / "run"
    # values of step 3 of the readme; hyphens and underscores in options are equivalent
    method = [
        "--grouping",
        "kmeans",
        "--rounds",
        "4",
        "--share-projectors",
        "--projection_batch_size",
        "32",
        "--projection-learning-rate",
        "0.001",
        "--projection_epochs",
        "3",
        "--add-cls-mask",
        "--window_size=3",
        "--top_clusters",
        "1",
        "--num-clusters",
        "16",
        "--block_size",
        "1",
        "--cluster-rounds",
        "1",
        "--samples",
        "50",
    ]
    assert command(["convert", "sparsefinder", str(roberta), "-o", str(folder), *method]) == 0
    words = ["train", str(folder), "--task", "wikitext/103_raw", "--data", str(wikipath), "--max_steps", "2"]
    assert command([*words, "--max-input-tokens", "16", "--per_device_train_batch_size", "2"]) == 0
    return folder


def test_the_run_contains_the_results_of_the_commands(run):
    config = gw.load(run, strict=True).methods[0].config
    assert (config.grouping, config.rounds, config.window_size, config.num_clusters) == ("kmeans", 4, 3, 16)
    assert config.share_projectors
    assert config.projection_epochs == 3
    grafts = sparsefinder_modules(gw.load(run).model)
    assert len(grafts) == 2
    assert all(graft.predicts and graft.key_projection is None for graft in grafts.values())
    index = json.loads((run / "artifacts" / "queries_keys" / "index.json").read_text())
    assert 0 < index["sentences"] <= 50


def test_step_four_evaluates_the_run_with_another_window_and_more_clusters(run, wikipath, capsys):
    capsys.readouterr()
    words = ["evaluate", str(run), "--task", "wikitext/103_raw", "--data", str(wikipath), "--batch_size", "8"]
    changed = ["--set", "method.window_size=11", "--set", "method.top_clusters=2", "--set", "method.add_last_mask=true"]
    assert command([*words, "--max-input-tokens", "16", *changed, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert {"perplexity", "loss", "token_accuracy"} <= row.keys()


def test_options_with_hyphens_and_with_underscores_are_the_same(roberta, tmp_path):
    made = []
    for name, words in (
        ("hyphen", ["--window-size", "5", "--grouping=window"]),
        ("underscore", ["--window_size", "5", "--grouping=window"]),
    ):
        assert command(["convert", "sparsefinder", str(roberta), "-o", str(tmp_path / name), *words]) == 0
        made.append(gw.load(tmp_path / name).methods[0].config)
    assert made[0] == made[1]


def test_a_dump_marked_as_unscaled_is_rescaled_only_with_force(tmp_path):
    tensors = [torch.randn(2, 2, 5, 4)]
    torch.save({"q": tensors, "k": tensors, "length_src": [5], "unscaled": True}, tmp_path / "qk_enc-attn.pt")
    with pytest.raises(ConfigError, match="is marked as unscaled"):
        import_dump(tmp_path / "qk_enc-attn.pt", tmp_path / "refused", rescale_queries=True)
    assert not (tmp_path / "refused").exists()
    forced = import_dump(tmp_path / "qk_enc-attn.pt", tmp_path / "forced", rescale_queries=True, force=True)
    torch.testing.assert_close(forced.read(0, 0)[0], tensors[0][0] * 2.0)


@pytest.mark.long
def test_graphs_score_the_model_and_belong_to_its_report(run, wikipath, tmp_path, capsys):
    capsys.readouterr()
    words = ["graphs", str(run), "--task", "wikitext/103_raw", "--data", str(wikipath), "--samples", "8"]
    chosen = ["--method", "window", "--method", "kmeans", "--max-input-tokens", "16", "--cost_lengths", "128"]
    assert command([*words, *chosen, "--json"]) == 0
    scores = json.loads((run / "graphs" / "scores.json").read_text())
    whole, gold, empty = scores[:3]
    assert gold["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-5)
    assert empty["perplexity"] != pytest.approx(whole["perplexity"], rel=1e-4)
    assert {score["method"] for score in scores[3:]} == {"window", "kmeans"}
    costs = json.loads((run / "graphs" / "executors.json").read_text())
    assert {cost["length"] for cost in costs} == {128}
    assert costs[0]["label"] == "own graph (kmeans), prediction included"
    labels = [cost["label"] for cost in costs if not cost["backward"]]
    own = [label for label in labels if label.startswith("own graph (kmeans)")]
    # as configured, and by key blocks in the given order and sorted by cluster
    assert len(own) == 3
    assert labels[:3] == own
    assert labels[3:] == [
        "SDPA (softmax)",
        "dense entmax",
        "distance of 64-token blocks, dense, masked",
        "distance of 64-token blocks, blocks",
        "distance of 64-token blocks, blocks, prediction included",
        "distance of 64-token blocks, flex, not compiled",
    ]
    assert command(["evaluate", str(run), "--task", "wikitext/103_raw", "--data", str(wikipath)]) == 0
    assert command(["report", str(run), "--format", "html"]) == 0
    page = (run / "report.html").read_text()
    for title in ("Recall of the entmax graph against sparsity", "Perplexity along the graphs", "One attention layer"):
        assert title in page


def test_scoring_leaves_a_model_as_it_was(run):
    converted = gw.load(run)
    grafts = sparsefinder_modules(converted.model)
    before = {path: graft.rule for path, graft in grafts.items()}
    with override_rules(converted.model, before):
        assert all(graft.override is not None for graft in grafts.values())
    assert all(graft.override is None for graft in grafts.values())


def test_invalid_lengths_are_refused(run, wikipath, capsys):
    words = ["graphs", str(run), "--task", "wikitext/103_raw", "--data", str(wikipath), "--cost-lengths", "12,x"]
    assert command(words) == 2
    assert "Expected whole numbers" in capsys.readouterr().err


def test_files_of_the_authors_are_imported_into_a_run(tmp_path, capsys):
    settings = {"grouping": "kmeans", "num_clusters": 3, "share_projectors": True}
    bert = tiny_model("bert", dtype=torch.float32)
    model = gw.convert(bert, gw.Sparsefinder(**settings), tokenizer=word_tokenizer())
    model.save(tmp_path / "run")
    entries = [{"w": torch.randn(2, 8, 4), "b": torch.randn(2, 1, 4)} for _ in range(2)]
    torch.save([{"q": entry, "k": entry} for entry in entries], tmp_path / "projections.pickle")
    centroids = [torch.randn(2, 1, 3, 4) for _ in range(2)]
    torch.save(centroids, tmp_path / "centroids.pickle")
    torch.save(
        {"q": [torch.randn(2, 2, 5, 8)], "k": [torch.randn(2, 2, 5, 8)], "length_src": [5]}, tmp_path / "dump.pt"
    )
    words = ["import", "sparsefinder", str(tmp_path / "run")]
    files = ["--projections", str(tmp_path / "projections.pickle"), "--centroids", str(tmp_path / "centroids.pickle")]
    assert command([*words, *files, "--dump", str(tmp_path / "dump.pt"), "--json"]) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out) == {"layers": 2, "sentences": 1}
    grafts = list(sparsefinder_modules(gw.load(tmp_path / "run").model).values())
    assert [graft.predicts for graft in grafts] == [True, True]
    assert torch.equal(grafts[1].query_projection.weights[0], entries[1]["w"])
    assert torch.equal(grafts[1].centroids, centroids[1])
    assert command(words) == 2
    assert "Found nothing to import" in capsys.readouterr().err
    assert command([*words, "--projections", str(tmp_path / "projections.pickle"), "--rescale-queries"]) == 2
    assert "--rescale-queries without --dump" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["convert", "sparsefinder", "x", "-o", "y", "--attn_variant", "extender"],
            "--attn-variant is here: --grouping",
        ),
        (["evaluate", "x", "--cls_size", "2"], "--cls-size is here: --add-cls-mask"),
        (["train", "x", "--dist-t", "0.5"], "--dist-t is here: --threshold"),
    ],
)
def test_flags_of_the_authors_are_answered_with_their_new_form(words, expected, capsys):
    assert command(words) == 2
    assert expected in capsys.readouterr().err


def test_no_old_flag_is_an_option_and_the_card_lists_it():
    own = {"--" + field.name.replace("_", "-") for field in fields(SparsefinderConfig)}
    assert not own & set(OLD_FLAGS)
    assert all(flag == flag.lower().replace("_", "-") for flag in OLD_FLAGS)


def test_a_training_uses_an_imported_dump(tmp_path):
    settings = {"grouping": "kmeans", "num_clusters": 3, "samples": 4, "finetune": False}
    text = tmp_path / "text.txt"
    text.write_text("\n".join("w5 w6 w7 w8 w9" for _ in range(12)))
    bert = tiny_model("bert", dtype=torch.float32)
    gw.convert(bert, gw.Sparsefinder(**settings), tokenizer=word_tokenizer()).save(tmp_path / "run")
    generator = torch.Generator().manual_seed(0)
    pair = [[torch.randn(2, 2, 5, 8, generator=generator) for _ in range(6)] for _ in range(2)]
    torch.save({"q": pair[0], "k": pair[1], "length_src": [5, 4, 5, 3, 5, 5]}, tmp_path / "dump.pt")
    assert command(["import", "sparsefinder", str(tmp_path / "run"), "--dump", str(tmp_path / "dump.pt")]) == 0
    words = ["train", str(tmp_path / "run"), "--task", str(text), "--set", "train.split=all", "--max-steps", "1"]
    assert command([*words, "--max-input-tokens", "8"]) == 0
    stored = QueriesKeys(tmp_path / "run" / "artifacts" / "queries_keys")
    assert len(stored) == 6
    assert torch.equal(stored.read(1, 0)[0], pair[0][1][0, :, :4])
    graft = next(iter(sparsefinder_modules(gw.load(tmp_path / "run").model).values()))
    # centroids are means of projected points of the dump: every one lies within their range
    points = torch.cat([graft.project(*(x[None] for x in stored.read(n, 0)))[0][0] for n in range(6)], 1).detach()
    keys = torch.cat([graft.project(*(x[None] for x in stored.read(n, 0)))[1][0] for n in range(6)], 1).detach()
    both = torch.cat([points, keys], 1)
    centroids = graft.centroids[:, 0]
    assert bool((centroids >= both.amin(1, keepdim=True) - 1e-5).all())
    assert bool((centroids <= both.amax(1, keepdim=True) + 1e-5).all())


def test_an_imported_dump_of_another_model_is_refused(tmp_path):
    model = gw.convert(tiny_model("bert", dtype=torch.float32), gw.Sparsefinder(grouping="kmeans")).model
    other = [torch.randn(3, 2, 5, 8)]
    torch.save({"q": other, "k": other, "length_src": [5]}, tmp_path / "d.pt")
    import_dump(tmp_path / "d.pt", tmp_path / "kept")
    with pytest.raises(CheckpointMismatchError, match="imported queries and keys"):
        extract(model, [], lambda rows: {}, tmp_path / "kept", samples=1)
