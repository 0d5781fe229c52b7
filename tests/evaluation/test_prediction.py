"""Options that prediction passes to the model and to the tokenizer."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from graftwork.core.example import Example
from graftwork.evaluation.prediction import predict_texts
from graftwork.grafting.converted import Converted
from graftwork.settings.evaluation import EvaluationSettings
from tiny_models import tiny_model, word_tokenizer

ROWS = [Example(str(number), "w5 w6 w7 w8 w9", "") for number in range(3)]


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_receives_the_settings(monkeypatch, beams):
    model, calls = tiny_model("t5", dtype=torch.float32), []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **options: calls.append(options) or generate(**options))
    settings = EvaluationSettings(num_beams=beams, max_new_tokens=2, max_input_tokens=3, batch_size=2)
    predict_texts(Converted(model, tokenizer=word_tokenizer()), ROWS, settings)
    assert [len(call["input_ids"]) for call in calls] == [2, 1]
    for call in calls:
        assert (call["num_beams"], call["max_new_tokens"], call["do_sample"]) == (beams, 2, False)
        assert call["input_ids"].shape[1] == 3


def test_inputs_of_a_classifier_are_truncated():
    config = BertConfig(
        vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=4, num_labels=2,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    settings = EvaluationSettings(max_input_tokens=4, batch_size=2)
    answers = predict_texts(Converted(model, tokenizer=word_tokenizer()), ROWS, settings)
    assert len(answers) == 3
