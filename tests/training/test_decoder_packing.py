"""Packed rows of decoders without an encoder: logits, losses, and what is refused."""

import pytest
import torch

from graftwork.core.example import Example
from graftwork.errors import ConfigError
from graftwork.methods.wt5.phases import FinetuneExplanations
from graftwork.training.encoding import EncodedExamples, PadBatch
from graftwork.training.packing import SEGMENTS, PackBatch, PackedExamples, check_packing, forward
from graftwork.training.phases import Finetune
from tiny_models import PAD, tiny_model, word_tokenizer

PACKS = [(0, 1, 2), (3,)]
KINDS = ("llama", "qwen2", "gpt2")
# norms and the softmax of eager attention are computed in float32
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def data():
    texts = [("w4 w5 w6", "w7 w8"), ("w9 w10 w11 w12 w13", "w14"), ("w15", "w16 w17 w18"), ("w20 w21", "w22 w23")]
    rows = [Example(str(number), source, target) for number, (source, target) in enumerate(texts)]
    return EncodedExamples(rows, word_tokenizer(), encoder_decoder=False, max_input_tokens=32, max_target_tokens=32)


def packs(data):
    return PackBatch(PAD)([PackedExamples(data, None)[pack] for pack in PACKS])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_packed_and_single_examples_are_equal(data, kind, attention):
    model = tiny_model(kind, attention=attention).eval()
    check_packing(model, 64)
    batch = packs(data)
    logits = forward(model, batch).logits
    for row, pack in enumerate(PACKS):
        for number, index in enumerate(pack, start=1):
            alone = model(input_ids=torch.tensor([data[index]["input_ids"]])).logits[0]
            torch.testing.assert_close(logits[row][batch[SEGMENTS][row] == number], alone, **CLOSE)


@pytest.mark.parametrize("phase", [Finetune(), FinetuneExplanations(2.0), FinetuneExplanations(2.0, reason_first=True)])
def test_losses_and_gradients_are_those_of_padded_rows(data, phase):
    model = tiny_model("llama").eval()
    if isinstance(phase, FinetuneExplanations):
        # a word of the targets stands for the separator
        phase.separator = tuple(data.tokenizer("w17", add_special_tokens=False)["input_ids"])
    single = phase.step(model, PadBatch(PAD)([data[index] for index in range(4)]))
    found = phase.step(model, packs(data))
    assert single.keys() == found.keys()
    for name, value in single.items():
        torch.testing.assert_close(found[name], value, **CLOSE)
    parameters = list(model.parameters())
    for one, other in zip(
        torch.autograd.grad(found["loss"], parameters),
        torch.autograd.grad(single["loss"], parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other, **CLOSE)


def test_the_first_token_of_an_example_is_not_predicted_from_the_one_before(data):
    row = PackedExamples(data, None)[(0, 1)]
    first = len(data[0]["input_ids"])
    assert row["labels"][first] == -100
    assert row["position_ids"][first] == 0
    assert sum(label != -100 for label in row["labels"]) == sum(
        label != -100 for index in (0, 1) for label in data[index]["labels"]
    )


def test_a_sliding_window_and_other_logits_are_refused():
    model = tiny_model("mistral")
    model.config.sliding_window = 16
    check_packing(model, 16)
    with pytest.raises(ConfigError, match="rows of 64 tokens and a sliding window of 16"):
        check_packing(model, 64)
    model = tiny_model("gpt2")
    check_packing(model, 64)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "position_ids": None}), with_kwargs=True
    )
    with pytest.raises(ConfigError, match="whose logits in a packed row differ from those of its examples"):
        check_packing(model, 64)
