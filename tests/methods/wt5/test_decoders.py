"""Decoders, and encoder–decoders beyond T5: probabilities, constrained answers, faithfulness, loss."""

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from graftwork.demo import shipped_model
from graftwork.errors import UnsupportedModelError
from graftwork.evaluation.prediction import predict_records, prompt_ids
from graftwork.grafting.conversion import convert, converted_of
from graftwork.methods.wt5 import WT5
from graftwork.methods.wt5.decoding import label_probabilities
from graftwork.methods.wt5.own_data import OwnFormat
from graftwork.methods.wt5.phases import FinetuneExplanations
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.tasks import get_task
from graftwork.tasks.sources import Record
from graftwork.training.encoding import EncodedExamples, PadBatch
from tiny_models import tiny_model
from tokenizer_layouts import layout

TEXTS = ["the pace drags . the plot drags badly", "a joy to watch , start to end", "Stay home. A lazy sequel."]
SETTINGS = EvaluationSettings(max_input_tokens=96, max_new_tokens=24, batch_size=3)
SMALL = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}
CHATS = ("llama3", "qwen2", "gemma")


def movie(text, key="a"):
    return get_task("movie_rationales_eval_v010").format(
        Record(key, {"review": text, "label": 1, "span_offsets": ((0, 8),)})
    )


def build(kind, tokenizer, **config):
    """Return a random model of a class of transformers with the tokenizer's vocabulary."""
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    tokens = {"pad_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "vocab_size": len(tokenizer)}
    return cls(cls.config_class(**{**tokens, **config})).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(shipped_model("encoder_decoder"))


DECODER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 256,
}
MODELS = {
    "LlamaForCausalLM": DECODER,
    "Qwen2ForCausalLM": DECODER,
    "GemmaForCausalLM": {**DECODER, "head_dim": 8},
    "SmolLM3ForCausalLM": DECODER,
    "GPT2LMHeadModel": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "BartForConditionalGeneration": {**BART, "decoder_start_token_id": 1, "forced_bos_token_id": 0},
    "LEDForConditionalGeneration": {**BART, "attention_window": 8, "decoder_start_token_id": 1},
    "LongT5ForConditionalGeneration": SMALL,
    "UMT5ForConditionalGeneration": SMALL,
}


@pytest.mark.parametrize("kind", MODELS)
def test_constrained_answers_are_labels_and_spans(kind, tokenizer):
    model = build(kind, tokenizer, **MODELS[kind])
    rows = [movie(text, str(number)) for number, text in enumerate(TEXTS)]
    held = convert(converted_of(model, tokenizer), WT5(constrained=True, faithfulness=True))
    found = predict_records(held, rows, SETTINGS, digest="")
    for row, record in zip(rows, found, strict=True):
        answer, source = record["answer"], row.metadata["source"]
        assert answer["label"] in ("negative", "positive")
        assert answer["unmatched"] == 0
        for (start, end), text in zip(answer["spans"], answer["explanations"], strict=True):
            assert source[start:end] == text
    examined = held.methods[-1].examine(model, tokenizer, None, rows, found, SETTINGS)
    assert [row["label"] for row in examined.rows] == [record["answer"]["label"] for record in found]
    assert all(sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-4) for row in examined.rows)
    explained = [row for row in examined.rows if row["characters"]]
    assert examined.scores.get("faithfulness_n", 0) == len(explained)
    assert ("random_sufficiency" in examined.scores) == bool(explained)


def test_label_probabilities_of_a_decoder_are_those_of_each_label_alone(tokenizer):
    model = build("LlamaForCausalLM", tokenizer, **DECODER)
    rows = [movie(text, str(number)) for number, text in enumerate(TEXTS)]
    found = label_probabilities(model, tokenizer, rows, batch_size=3, max_input_tokens=96)
    for row, own in zip(rows, found, strict=True):
        prompt = tokenizer(row.input, add_special_tokens=False)["input_ids"]
        prompt = prompt if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *prompt]
        scores = []
        for label in ("negative", "positive"):
            target = tokenizer(f" {label} explanation:", add_special_tokens=False)["input_ids"]
            ids = torch.tensor([prompt + target])
            logits = model(input_ids=ids).logits.detach()[0].log_softmax(-1)
            scores.append(sum(logits[len(prompt) - 1 + place, token] for place, token in enumerate(target)))
        expected = torch.stack(scores).softmax(0)
        torch.testing.assert_close(torch.tensor(list(own.values())), expected, rtol=1e-4, atol=1e-5)


def chat_row(text="Stay home. A lazy sequel."):
    start = text.index("lazy")
    fields = {"text": text, "label": "negative", "spans": ((start, start + len("lazy sequel")),)}
    return OwnFormat(("negative", "positive"), spans=True, chat=True)(Record("a", fields))


@pytest.mark.parametrize("family", CHATS)
def test_the_target_of_a_conversation_is_read_back_and_constrained(family):
    tokenizer = layout(family)
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=512).float()
    row = chat_row()
    method = WT5(constrained=True)
    encoded = EncodedExamples([row], tokenizer, encoder_decoder=False, max_input_tokens=256, max_target_tokens=64)[0]
    answer = [token for token in encoded["labels"] if token != -100]
    (read,) = method.read(model, tokenizer, [row], [answer])
    assert read["answer"] == {"label": "negative", "explanations": ["lazy sequel"], "spans": [[13, 24]], "unmatched": 0}
    # prompt and training have the same question, whatever the template calls the turn of the answer
    (prompt,), _ = prompt_ids(tokenizer, [row], 256, False)
    question = row.input + tokenizer.decode(prompt).partition(row.input)[2][:8]
    assert question in tokenizer.decode(encoded["input_ids"])
    assert 0 < len(answer) < len(encoded["input_ids"]) - len(row.input.split())
    held = convert(converted_of(model, tokenizer), method)
    (record,) = predict_records(held, [row], SETTINGS, digest="")
    assert record["answer"]["label"] in ("negative", "positive")
    assert record["answer"]["unmatched"] == 0
    probabilities = label_probabilities(model, tokenizer, [row], batch_size=1, max_input_tokens=256)[0]
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)


def test_the_loss_of_a_decoder_is_on_the_answer_and_divided_into_label_and_explanation(tokenizer):
    model = build("LlamaForCausalLM", tokenizer, **DECODER)
    row = movie(TEXTS[0])
    data = EncodedExamples([row], tokenizer, encoder_decoder=False, max_input_tokens=96, max_target_tokens=32)
    batch = PadBatch(0)([data[0]])
    phase = FinetuneExplanations(2.0)
    phase.prepare(model, tokenizer)
    found = phase.step(model, batch)
    labels = batch["labels"]
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    each = [-logits[0, place - 1, token].item() for place, token in enumerate(labels[0].tolist()) if token != -100]
    count = len(tokenizer(" positive", add_special_tokens=False)["input_ids"])
    own, reason = each[:count], each[count:]
    assert found["label_loss"].item() == pytest.approx(sum(own) / len(own), rel=1e-4)
    assert found["explanation_loss"].item() == pytest.approx(sum(reason) / len(reason), rel=1e-4)
    expected = (sum(own) + 2 * sum(reason)) / (len(own) + 2 * len(reason))
    assert found["loss"].item() == pytest.approx(expected, rel=1e-4)


def test_models_that_generate_no_text_are_refused():
    with pytest.raises(UnsupportedModelError, match="BertForMaskedLM: it generates no text"):
        convert(tiny_model("bert"), WT5())
