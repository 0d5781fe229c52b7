"""A training at a learning rate of 1e30 writes no model, whatever the method."""

from __future__ import annotations

import pytest
import torch
import transformers

from graftwork.core.example import Example, Examples
from graftwork.errors import NonFiniteError
from graftwork.grafting.conversion import convert
from graftwork.grafting.converted import save
from graftwork.methods import NAMES
from graftwork.methods.cald import Cald
from graftwork.methods.sparsefinder import Sparsefinder
from graftwork.methods.topk import TopK
from graftwork.methods.wt5 import WT5
from graftwork.pipeline import training
from graftwork.pipeline.loading import load
from graftwork.settings.training import TrainingSettings
from graftwork.tasks.loading import TrainingData
from regrad_toy import examples as toy_examples
from regrad_toy import toy_method, toy_model, toy_tokenizer
from tiny_models import tiny_model, word_tokenizer

LABELS = ("w6", "w7")
ROWS = tuple(Example(str(n), f"w{n + 4} w{n + 5}", LABELS[n % 2], (LABELS[n % 2],)) for n in range(8))


def classifier():
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        pad_token_id=0,
        id2label=dict(enumerate(LABELS)),
        label2id={label: number for number, label in enumerate(LABELS)},
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).eval()


def started(name, folder):
    """A converted model of a method, and training examples."""
    if name == "regrad":
        converted = convert(toy_model(0), toy_method(folder), tokenizer=toy_tokenizer())
        return converted, tuple(toy_examples(range(8), passages=1, seed=0))
    method = {
        "topk": TopK(feed_forward_k=6),
        "wt5": WT5(),
        "cald": Cald(rank=4, positions=16, guide="trajectory"),
        "sparsefinder": Sparsefinder(alpha=1.5),
    }[name]
    models = {"cald": classifier, "sparsefinder": lambda: tiny_model("llama", dtype=torch.float32)}
    model = models.get(name, lambda: tiny_model("t5", dtype=torch.float32))()
    return convert(model, method, tokenizer=word_tokenizer()), ROWS


@pytest.mark.parametrize("steps", [1, pytest.param(3, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_learning_rate_of_1e30_ends_in_an_error_and_leaves_the_model_as_it_was(name, steps, tmp_path, monkeypatch):
    converted, rows = started(name, tmp_path)
    save(converted, tmp_path / "run")
    before = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    part = Examples("rows", "train", rows, len(rows), 0, "here")
    monkeypatch.setattr(training, "load_training", lambda *given: TrainingData((part,)))
    settings = TrainingSettings(
        tasks=("rows",),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e30,
        lr_scheduler_type="constant",
        max_input_tokens=16,
    )
    with pytest.raises(NonFiniteError, match=r"The model is not saved"):
        training.train(load(tmp_path / "run"), settings)
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == before
    assert not list((tmp_path / "run" / "train").rglob("checkpoint-*"))
    assert not list((tmp_path / "run" / "train").rglob("finished.json"))
