"""The whole pipeline on a random model and a few kilobytes of text: all commands, resumes, and graph comparison."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace

import pytest
import torch

import graftwork as gw
from graftwork.cli.app import run as command
from graftwork.core.digests import file_digest
from graftwork.core.files import read_json, write_json
from graftwork.core.run_folder import RunFolder
from graftwork.errors import CheckpointMismatchError, ConfigError, DataError
from graftwork.evaluation.language_modelling import score_chunks, text_chunks
from graftwork.grafting.converted import write_model
from graftwork.methods.sparsefinder import Sparsefinder
from graftwork.methods.sparsefinder.extraction import QueriesKeys, check_origin, extract, fingerprint
from graftwork.methods.sparsefinder.modules import Rule, sparsefinder_modules
from graftwork.methods.sparsefinder.phases import CENTROIDS_FILE, CENTROIDS_NOTES, HELD_OUT, QUERIES_KEYS
from graftwork.pipeline.contents import check_contents
from graftwork.tasks import get_task
from graftwork.tasks.wikitext import task_from_text
from graftwork.training.running_text import TextBatch, TextChunks
from tiny_models import VOCABULARY, tiny_model, word_tokenizer


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Learnable text: every word follows from its predecessor by a rule."""
    draw = random.Random(0)
    lines = []
    for _ in range(60):
        word = draw.randrange(4, VOCABULARY)
        words = []
        for _ in range(12):
            words.append(f"w{word}")
            word = 4 + (word * 3 + draw.randrange(3)) % (VOCABULARY - 4)
        lines.append(" ".join(words))
    path = tmp_path_factory.mktemp("text") / "rule.txt"
    path.write_text("\n\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random decoder with a tokenizer, saved."""
    folder = tmp_path_factory.mktemp("model") / "llama"
    tiny_model("llama", dtype=torch.float32).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(model, text, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("run") / "run"
    method = ["--grouping", "kmeans", "--num-clusters", "4", "--window-size", "3", "--add-cls-mask", "--samples", "24"]
    assert command(["convert", "sparsefinder", str(model), "-o", str(folder), *method]) == 0
    train = ["--max-steps", "2", "--max-input-tokens", "16", "--per-device-train-batch-size", "4"]
    assert command(["train", str(folder), "--task", str(text), "--set", "train.split=all[:80%]", *train]) == 0
    return folder


def test_the_run_holds_every_artefact_and_follows_its_graph(trained):
    for name in ("entmax", "project", "cluster"):
        assert (trained / "train" / name / "finished.json").exists()
    assert (trained / "artifacts" / "queries_keys" / "index.json").exists()
    notes = json.loads((trained / "artifacts" / "centroids.json").read_text())
    assert all(len(note["projections"]) == 16 and len(note["clusters"]) == 4 for note in notes["modules"].values())
    grafts = sparsefinder_modules(gw.load(trained, strict=True).model)
    assert all(graft.predicts for graft in grafts.values())
    assert all(graft.centroids.isfinite().all() for graft in grafts.values())


def test_language_models_are_scored_by_perplexity(trained, text, capsys):
    capsys.readouterr()
    words = ["evaluate", str(trained), "--task", str(text), "--split", "all[80%:]", "--max-input-tokens", "16"]
    assert command([*words, "--baseline", "--json"]) == 0
    rows = {row["setting"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == {"dense", "converted"}
    for row in rows.values():
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]), rel=0.02)
    measures = gw.Results.read(trained / "results.json").measures["converted"]
    assert {key.partition("/")[0] for key in measures} == {"sparsity", "gold_sparsity", "recall", "exact", "empty_rows"}


def perplexity(converted, text):
    settings = gw.EvaluationSettings(split="all[80%:]", max_input_tokens=16, batch_size=3)
    results = gw.evaluate(converted, [str(text)], settings=settings)
    return results.rows[0].scores["perplexity"]


def test_the_gold_graph_costs_nothing_and_an_empty_one_does(model, text):
    dense = gw.convert(gw.load(model), Sparsefinder())
    expected = perplexity(dense, text)
    full = gw.convert(gw.load(model), Sparsefinder(grouping="gold"))
    assert perplexity(full, text) == pytest.approx(expected, abs=1e-5)
    empty = gw.convert(gw.load(model), Sparsefinder(grouping="random", threshold=0.0))
    assert abs(perplexity(empty, text) - expected) > 1e-3


def test_measures_of_the_gold_graph(model):
    batch = {"input_ids": torch.randint(4, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))}
    converted = gw.convert(gw.load(model), Sparsefinder(grouping="gold"))
    measured = converted.methods[0].measure(converted.model, batch)
    for path in sparsefinder_modules(converted.model):
        assert measured[f"recall/{path}"] == measured[f"exact/{path}"] == 1.0
        assert measured[f"sparsity/{path}"] == measured[f"gold_sparsity/{path}"]


def test_scores_do_not_depend_on_batch_size_order_or_earlier_runs(trained, model, text):
    """Scores of one setting alone, in batches, in reverse order, and after baselines with random graphs."""
    converted = gw.load(trained)
    settings = gw.EvaluationSettings(split="all[80%:]", max_input_tokens=16)

    def loss(size, baseline=False):
        chosen = replace(settings, batch_size=size)
        rows = gw.evaluate(converted, [str(text)], settings=chosen, baseline=baseline).rows
        return next(row for row in rows if row.label == "converted").scores["loss"]

    found = [loss(size) for size in (1, 3, 7)]
    rows = task_from_text(text).load(text.parent, settings.split).rows
    chunks, collate = text_chunks(converted, rows, settings)
    backwards = list(range(len(chunks)))[::-1]
    found.append(score_chunks(converted, chunks, collate, backwards, batch_size=3)["loss"])
    random_graph = gw.convert(gw.load(model), Sparsefinder(grouping="random", threshold=0.2))
    gw.evaluate(random_graph, [str(text)], settings=settings)
    found.append(loss(3, baseline=True))
    assert found == pytest.approx([found[0]] * 5, abs=1e-6)


@pytest.mark.long
def test_a_resumed_training_equals_an_uninterrupted_one(model, text, tmp_path):
    method = {"grouping": "distance", "target_sparsity": 0.6, "samples": 16, "projection_epochs": 2}
    settings = gw.TrainingSettings(tasks=(str(text),), split="all[:50%]", **small())
    weights = []
    for name in ("whole", "stopped"):
        folder = tmp_path / name
        gw.convert(gw.load(model), Sparsefinder(**method)).save(folder)
        gw.train(gw.load(folder), settings, run=folder)
        if name == "stopped":
            for finished in (folder / "train").glob("*/finished.json"):
                finished.unlink()
            # a partial checkpoint of the projections and a truncated shard entry, as after a kill
            newest = max((folder / "train" / "project").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
            shutil.rmtree(newest)
            fresh = gw.convert(gw.load(model), Sparsefinder(**method))
            write_model(fresh, RunFolder(folder))
            gw.train(gw.load(folder), settings, run=folder)
        weights.append(gw.load(folder).model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-6)


def small():
    return {
        "max_steps": 2,
        "max_input_tokens": 16,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_steps": 1,
    }


@pytest.mark.long
def test_graphs_are_compared_on_held_out_text(trained, text, tmp_path, capsys):
    capsys.readouterr()
    words = ["graphs", str(trained), "--task", str(text), "--split", "all[80%:]", "--samples", "8"]
    chosen = ["--method", "window", "--method", "kmeans", "--method", "distance", "--max-input-tokens", "16"]
    timed = ["--cost-lengths", "96"]
    assert command([*words, *chosen, *timed, "-o", str(tmp_path / "graphs"), "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert {row["method"] for row in table} <= {"window", "kmeans", "distance"}
    assert all(0 <= row["test_recall"] <= 1 for row in table)
    points = json.loads((tmp_path / "graphs" / "points.json").read_text())
    assert {point["split"] for point in points} == {"tune", "test"}
    for name in ("table.md", "points.csv", "pareto.png"):
        assert (tmp_path / "graphs" / name).stat().st_size > 0


def test_a_run_that_chooses_blocks_is_compared_by_budget(model, text, tmp_path, capsys):
    """No training is needed; recall is that of the graph which the module chooses with the same budget and window."""
    run = tmp_path / "blocks"
    convert = ["convert", "sparsefinder", str(model), "-o", str(run), "--no-finetune", "--grouping", "mean_pooled"]
    assert command([*convert, "--block-size", "4"]) == 0
    words = ["graphs", str(run), "--task", str(text), "--split", "all[80%:]", "--samples", "4"]
    words += ["--max-input-tokens", "24", "--method", "mean_pooled", "--method", "random", "--json"]
    capsys.readouterr()
    assert command(words) == 0
    rows = json.loads(capsys.readouterr().out)
    row = next(row for row in rows if row["method"] == "mean_pooled")
    held_out = QueriesKeys(RunFolder(run).artifacts / HELD_OUT)
    recalls = []
    for site, graft in enumerate(sparsefinder_modules(gw.load(run).model).values()):
        data = held_out.batch(range(2, 4), site)
        settings = {"block_budget": row["block_budget"], "window_size": None if row["window"] == "–" else row["window"]}
        graft.override = Rule(replace(graft.config, **settings), graft.learned())
        edges, gold = graft.graph(data.query, data.key, data.mask, data.query_real).dense(), data.gold(1.5)
        recalls.append((edges & gold).sum((2, 3)) / gold.sum((2, 3)))
    assert row["test_recall"] == pytest.approx(float(torch.stack(recalls).mean()), abs=6e-5)
    assert row["test_sparsity"] >= row["at"] - 0.05
    scores = read_json(RunFolder(run).graphs / "scores.json")
    assert {"mean_pooled", "random", "gold graph"} <= {score["method"] for score in scores}
    assert command([*words, "--method", "distance"]) == 2
    assert "Found method 'distance'" in capsys.readouterr().err


def test_a_run_without_training_is_not_compared(model, text, tmp_path, capsys):
    run = tmp_path / "untrained"
    assert (
        command(["convert", "sparsefinder", str(model), "-o", str(run), "--grouping", "gate", "--block-size", "4"]) == 0
    )
    assert command(["graphs", str(run), "--task", str(text)]) == 2
    assert "has no learned graphs" in capsys.readouterr().err


@pytest.mark.long
def test_overwriting_a_training_removes_its_artifacts(model, text, tmp_path, capsys):
    folder = tmp_path / "run"
    assert (
        command(
            [
                "convert",
                "sparsefinder",
                str(model),
                "-o",
                str(folder),
                "--grouping",
                "kmeans",
                "--num-clusters",
                "4",
                "--samples",
                "8",
                "--no-finetune",
            ]
        )
        == 0
    )
    train = ["train", str(folder), "--task", str(text), "--max-steps", "1", "--max-input-tokens", "16"]
    graphs = [
        "graphs",
        str(folder),
        "--task",
        str(text),
        "--split",
        "all[80%:]",
        "--samples",
        "2",
        "--method",
        "window",
        "--max-input-tokens",
        "16",
    ]
    assert command([*train, "--split", "all[:40%]"]) == 0
    assert command(graphs) == 0
    assert command([*train, "--split", "all[40%:80%]"]) == 2
    assert (folder / "artifacts" / "held_out").exists()
    assert command([*train, "--split", "all[40%:80%]", "--overwrite"]) == 0
    assert not (folder / "artifacts" / "held_out").exists()
    assert command(graphs) == 0


def test_running_text_is_read_by_name_by_path_and_in_parts(tmp_path, text, shared):
    whole = get_task("wikitext/2_raw").load(shared / "data", "test")
    assert len(whole.rows) == 2008
    assert whole.running_text
    part = get_task("wikitext/2_raw").load(shared / "data", "test[25%:50%]")
    assert [row.input for row in part.rows] == [row.input for row in whole.rows[502:1004]]
    with pytest.raises(DataError, match=r"no wiki\.train\.raw"):
        get_task("wikitext/2_raw").load(shared / "data", "train")
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(DataError, match="contains no text"):
        task_from_text(tmp_path / "empty.txt").load(tmp_path, "all")


def test_masks_are_those_of_the_chunk_whatever_the_batch():
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    rows = task_rows()
    chunks = TextChunks(rows, tokenizer, max_tokens=12, causal=False)
    collate = TextBatch(tokenizer, "masked", seed=3)
    together = collate([chunks[index] for index in range(len(chunks))])
    for index in range(len(chunks)):
        alone = collate([chunks[index]])
        width = alone["input_ids"].shape[1]
        assert torch.equal(alone["input_ids"][0], together["input_ids"][index, :width])
        assert torch.equal(alone["labels"][0], together["labels"][index, :width])
    hidden = together["labels"] != -100
    assert 0.05 < hidden.float().mean() < 0.35
    assert (together["input_ids"][hidden] == tokenizer.mask_token_id).float().mean() > 0.5


def task_rows():
    from graftwork.tasks import Example

    return [Example(str(n), " ".join(f"w{4 + (n * 7 + i) % 60}" for i in range(30)), "") for n in range(20)]


def test_models_without_a_perplexity_are_refused(text):
    from graftwork.grafting.converted import Converted

    with pytest.raises(ConfigError, match="encoder–decoder"):
        gw.evaluate(Converted(tiny_model("t5"), tokenizer=word_tokenizer()), [str(text)])


def test_a_run_without_anything_to_train_is_refused(model):
    converted = gw.convert(gw.load(model), Sparsefinder(finetune=False, grouping="window", window_size=3))
    with pytest.raises(ConfigError, match="nothing to train"):
        converted.methods[0].phases(converted.model)


def flip_last_bit(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def state_of(run, check, **options):
    return next((state for name, state, _ in check_contents(RunFolder(run), **options) if name == check), None)


def test_queries_keys_and_centroids_carry_the_digest_of_what_they_were_made_from(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    stored = QueriesKeys(folder / "artifacts" / QUERIES_KEYS)
    model = gw.load(folder).model
    notes = read_json(folder / "artifacts" / CENTROIDS_NOTES)
    assert notes["made_from"]["model"] == stored.identity["model"] == fingerprint(model)
    assert notes["made_from"]["centroids"] == file_digest(folder / "artifacts" / CENTROIDS_FILE)
    recorded = read_json(folder / "model" / "graftwork.json")["training"]["artifacts"]
    assert {f"artifacts/{CENTROIDS_FILE}", f"artifacts/{CENTROIDS_NOTES}"} < set(recorded)
    check_origin(stored, model)
    assert state_of(folder, "artifacts") == "ok"
    # the last element of a tensor that is longer than any sample of its first ones
    with torch.no_grad():
        model.get_input_embeddings().weight[-1, -1] += 1
    with pytest.raises(CheckpointMismatchError, match="queries and keys of other weights"):
        check_origin(stored, model)
    flip_last_bit(folder / "artifacts" / CENTROIDS_FILE)
    assert state_of(folder, "artifacts") == "wrong"
    shutil.rmtree(folder / "artifacts")
    assert state_of(folder, "artifacts") == "absent"


def test_a_changed_shard_of_queries_and_keys_is_refused(trained, tmp_path):
    folder = tmp_path / "queries_keys"
    shutil.copytree(trained / "artifacts" / QUERIES_KEYS, folder)
    stored = QueriesKeys(folder)
    stored.check()
    flip_last_bit(sorted(folder.glob("shard-*.safetensors"))[0])
    with pytest.raises(CheckpointMismatchError, match=r"shard-000000\.safetensors is missing or has changed"):
        QueriesKeys(folder).read(0, 0)


def test_an_extraction_without_digests_is_repeated_with_one_line(trained, tmp_path, caplog):
    folder = tmp_path / "queries_keys"
    shutil.copytree(trained / "artifacts" / QUERIES_KEYS, folder)
    model = gw.load(trained).model
    rows = [{"input_ids": [4, 5, 6 + n], "attention_mask": [1, 1, 1]} for n in range(3)]

    def collate(batch):
        return {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}

    with pytest.raises(ConfigError, match="another model or text"):
        extract(model, rows, collate, folder, samples=3)
    index = read_json(folder / "index.json")
    write_json(folder / "index.json", {**index, "identity": {**index["identity"], "model": "0" * 16}})
    assert len(extract(model, rows, collate, folder, samples=3)) == 3
    assert caplog.text.count("records no digest of the weights, so it is extracted again") == 1
