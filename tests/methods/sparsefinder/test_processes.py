"""Training in two processes: the extraction is written once, and weights and centroids are those of one process."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from graftwork.cli.app import run as command
from graftwork.core.files import read_lines, write_records
from graftwork.methods.sparsefinder.extraction import extract
from graftwork.methods.sparsefinder.phases import StoredBatches
from graftwork.training.encoding import PadBatch
from tiny_models import VOCABULARY, tiny_model, word_tokenizer

GRAPHS = [
    {"grouping": "kmeans", "num_clusters": 4},
    {"grouping": "distance", "target_sparsity": 0.7, "loss": "logistic", "l2": 0.1},
]


def rows(count):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
    return [
        {"input_ids": ids, "attention_mask": [1] * len(ids)}
        for ids in (torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths)
    ]


def stored_of(folder, count=21):
    from graftwork.grafting.conversion import convert
    from graftwork.methods.sparsefinder import Sparsefinder

    method = Sparsefinder(grouping="kmeans", num_clusters=2, projection_batch_size=4, projection_epochs=3)
    model = convert(tiny_model("bert"), method).model
    return extract(model, rows(count), PadBatch(0), folder, samples=count), method.config, model


def test_every_process_makes_the_steps_of_one(tmp_path, monkeypatch):
    stored, config, _ = stored_of(tmp_path / "kept")
    alone = StoredBatches(stored, config)
    monkeypatch.setenv("WORLD_SIZE", "3")
    shared = StoredBatches(stored, config)
    assert len(alone) == 3 * 6
    assert len(shared) == 3 * len(alone)
    for rank in range(3):
        # items of a data set go to the processes in turns
        assert [shared[index]["number"] for index in range(rank, len(shared), 3)] == list(range(len(alone)))
    for epoch in range(3):
        numbers = [number for batch in alone.batches[epoch * 6 : epoch * 6 + 6] for number in batch]
        assert sorted(numbers) == list(range(21))
    assert alone.batches[:6] != alone.batches[6:12]
    for index in (0, 17):
        first, again = alone[index]["heads"], shared[index * 3 + 2]["heads"]
        assert all(torch.equal(a.query, b.query) for a, b in zip(first, again, strict=True))


def test_an_extraction_that_two_processes_wrote_is_repaired(tmp_path):
    stored, _, model = stored_of(tmp_path / "kept")
    listed = tmp_path / "kept" / "sentences.jsonl"
    before = [stored.read(index, 1)[0] for index in range(len(stored))]
    lines = list(read_lines(listed))
    write_records(listed, [{k: v for k, v in line.items() if k != "sha256"} for line in (*lines[:8], *lines)][:21])
    repaired = extract(model, rows(21), PadBatch(0), tmp_path / "kept", samples=21)
    assert [row["sentence"] for row in repaired.sentences] == list(range(21))
    assert all(torch.equal(repaired.read(index, 1)[0], query) for index, query in enumerate(before))


@pytest.mark.long
@pytest.mark.parametrize("settings", GRAPHS, ids=lambda settings: settings["grouping"])
def test_two_processes_train_what_one_trains(settings, tmp_path):
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path / "llama")
    word_tokenizer().save_pretrained(tmp_path / "llama")
    words = [f"w{4 + 7 * n % (VOCABULARY - 4)}" for n in range(800)]
    lines = [" ".join(words[start : start + 12]) for start in range(0, 800, 12)]
    (tmp_path / "rule.txt").write_text("\n\n".join(lines) + "\n")
    flags = [word for name, value in settings.items() for word in ("--" + name.replace("_", "-"), str(value))]
    flags += ["--no-finetune", "--samples", "21", "--projection-batch-size", "4", "--projection-epochs", "2"]
    train = ["--task", str(tmp_path / "rule.txt"), "--max-input-tokens", "16"]
    for name, launch in (
        ("one", [sys.executable]),
        ("two", [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]),
    ):
        assert command(["convert", "sparsefinder", str(tmp_path / "llama"), "-o", str(tmp_path / name), *flags]) == 0
        done = subprocess.run(
            [*launch, "-m", "graftwork", "train", str(tmp_path / name), *train],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stderr
    for file in ("model/model.safetensors", "artifacts/centroids.safetensors"):
        one, two = (load_file(tmp_path / name / file) for name in ("one", "two"))
        for name in one:
            assert torch.equal(one[name].view(torch.uint8), two[name].view(torch.uint8)), name
    assert len(list(read_lines(tmp_path / "two" / "artifacts" / "queries_keys" / "sentences.jsonl"))) == 21
