"""Perplexity along graphs: exact for every graph with all gold pairs, and independent of the batches."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from graftwork.core.example import Example
from graftwork.evaluation.language_modelling import MASK_SEED, score_chunks
from graftwork.grafting.conversion import convert
from graftwork.methods.sparsefinder import Sparsefinder
from graftwork.methods.sparsefinder.config import SparsefinderConfig
from graftwork.methods.sparsefinder.modules import Rule, override_rules, sparsefinder_modules
from graftwork.methods.sparsefinder.predictor import Learned
from graftwork.training.running_text import text_data
from tiny_models import VOCABULARY, tiny_model, word_tokenizer

CHUNKS = 11
BASE = SparsefinderConfig(grouping="distance", threshold=3.0)
GRAPHS = {
    "all scores": replace(BASE, grouping=None),
    "gold": replace(BASE, grouping="gold"),
    "gold and window 5": replace(BASE, grouping="gold", window_size=5),
    "empty": replace(BASE, grouping="random", threshold=0.0),
    "predicted": BASE,
    "blocks": replace(BASE, grouping="mean_pooled", block_size=4, block_budget=0.4),
}


@pytest.mark.parametrize("family", ["roberta", "llama"])
def test_perplexity_is_that_of_the_graph_in_batches_of_any_size_and_order(family):
    draw = random.Random(0)
    tokenizer = word_tokenizer()
    if family == "roberta":
        tokenizer.add_special_tokens({"mask_token": "<unk>"})
    converted = convert(tiny_model(family), Sparsefinder(grouping="distance", threshold=3.0), tokenizer=tokenizer)
    for graft in sparsefinder_modules(converted.model).values():
        graft.active.fill_(True)
    # the last chunk is shorter, so that batches have padding
    words = [f"w{draw.randrange(4, VOCABULARY)}" for _ in range(12 * CHUNKS + 5)]
    rows = [Example("0", " ".join(words), "")]
    chunks, collate = text_data(rows, converted.model, tokenizer, max_tokens=14)
    collate = replace(collate, seed=MASK_SEED)
    order = list(range(len(chunks)))
    shuffled = order[:]
    draw.shuffle(shuffled)
    found = {}
    for name, config in GRAPHS.items():
        rules = {path: Rule(config, Learned()) for path in sparsefinder_modules(converted.model)}
        with override_rules(converted.model, rules), torch.no_grad():
            scores = [
                score_chunks(converted, chunks, collate, numbers, batch_size=size)["perplexity"]
                for numbers, size in ((order, 1), (order, 3), (order, 7), (shuffled, 7))
            ]
        # transformers computes losses in float32
        assert scores == pytest.approx([scores[0]] * 4, rel=2e-6), name
        found[name] = scores[0]
    assert found["gold"] == pytest.approx(found["all scores"], rel=2e-6)
    assert found["gold and window 5"] == pytest.approx(found["all scores"], rel=2e-6)
    others = [found[name] for name in ("all scores", "empty", "predicted", "blocks")]
    assert all(abs(a - b) > 1e-4 * a for n, a in enumerate(others) for b in others[n + 1 :])
