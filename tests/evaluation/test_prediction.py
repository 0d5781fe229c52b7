"""Options that prediction passes to the model and to the tokenizer."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from graftwork.core.example import Example
from graftwork.errors import ConfigError
from graftwork.evaluation.prediction import predict_texts
from graftwork.grafting.converted import Converted
from graftwork.settings.evaluation import EvaluationSettings
from regrad_engine import adapted_decoder
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


TEXTS = [Example(str(number), text, "") for number, text in enumerate(["w5 w6 w7", "w8", "w5 w9 w11 w12", "w8"])]


def sampled(converted, **settings):
    return predict_texts(converted, TEXTS, EvaluationSettings(max_new_tokens=6, **settings))


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_sampled_answers_depend_on_the_seed_and_not_on_the_batch(family):
    converted = Converted(tiny_model(family, dtype=torch.float32), tokenizer=word_tokenizer())
    one = sampled(converted, temperature=1.5, seed=1)
    assert sampled(converted, temperature=1.5, seed=1, batch_size=1) == one
    assert sampled(converted, temperature=1.5, seed=2) != one
    assert one[1] != one[3]  # equal inputs with different ids
    assert sampled(converted, top_k=1) == sampled(converted) == sampled(converted, top_p=1e-6)
    # 0 is the default seed, and 1 the default temperature
    assert sampled(converted, top_p=0.9) == sampled(converted, top_p=0.9, temperature=1.0, seed=0)


def test_answers_with_other_sampling_settings_are_computed_again(tmp_path):
    converted = Converted(tiny_model("t5", dtype=torch.float32), tokenizer=word_tokenizer())
    output = tmp_path / "answers.jsonl"

    def answers(**settings):
        return predict_texts(converted, TEXTS, EvaluationSettings(max_new_tokens=6, **settings), output=output)

    greedy = answers()
    assert "sampling" not in (tmp_path / "answers.settings.json").read_text()
    assert answers(temperature=2.0, seed=1) == sampled(converted, temperature=2.0, seed=1)
    assert answers(temperature=2.0, seed=2) == sampled(converted, temperature=2.0, seed=2)
    assert answers() == greedy


@pytest.mark.parametrize(("settings", "named"), [({"temperature": 0.5}, "temperature is 0.5"), ({"num_beams": 2}, "2")])
def test_settings_of_generation_are_refused_where_nothing_is_generated(settings, named):
    config = BertConfig(vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    classifier = Converted(BertForSequenceClassification(config).eval(), tokenizer=word_tokenizer())
    with pytest.raises(ConfigError, match=f"{named}.*is a classifier"):
        predict_texts(classifier, ROWS, EvaluationSettings(**settings))
    with pytest.raises(ConfigError, match=f"{named}.*regrad answers with its own settings"):
        predict_texts(adapted_decoder(), ROWS, EvaluationSettings(**settings))
