"""Traces of one example are refused: their padding, lengths and tiles would become constants."""

import io

import pytest
import torch
from torch import nn

import graftwork as gw
from graftwork.errors import UnsupportedModelError
from graftwork.surgery.tracing import refuse_trace, tracing
from tiny_models import padded_batch, tiny_model

# torch deprecates its traces
pytestmark = pytest.mark.filterwarnings("ignore")

METHODS = {
    "attention": gw.TopK(attention_k=3),
    "feed-forward": gw.TopK(feed_forward_k=3),
    "sparsefinder": gw.Sparsefinder(alpha=1.5),
    "cald": gw.Cald(rank=4),
}


class Logits(nn.Module):
    """Model with positional tensor arguments and one output."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def converted(method):
    model, batch = tiny_model("bert", dtype=torch.float32), padded_batch("bert")
    gw.convert(model, METHODS[method])
    return Logits(model), (batch["input_ids"], batch["attention_mask"])


@pytest.mark.parametrize("method", METHODS)
def test_a_trace_of_a_converted_model_is_refused(method):
    model, inputs = converted(method)
    with pytest.raises(UnsupportedModelError, match=r"torch\.jit\.trace"):
        torch.jit.trace(model, inputs, check_trace=False)


@pytest.mark.parametrize("method", ["attention", "feed-forward"])
def test_the_torchscript_exporter_of_onnx_is_refused(method):
    model, inputs = converted(method)
    with pytest.raises(UnsupportedModelError, match=r"torch\.onnx\.export with dynamo=False"):
        torch.onnx.export(model, inputs, io.BytesIO(), dynamo=False)


def test_a_restored_model_can_be_traced():
    model, inputs = converted("attention")
    gw.restore(model.model)
    torch.testing.assert_close(torch.jit.trace(model, inputs, check_trace=False)(*inputs), model(*inputs))


def test_values_are_unknown_under_compile_and_in_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    seen = []

    def run(x):
        seen.append(tracing())
        return x + 1 if tracing() else x

    assert torch.equal(torch.compile(run, backend="eager", fullgraph=True)(torch.zeros(1)), torch.ones(1))
    assert torch.equal(run(torch.zeros(1)), torch.zeros(1))
    with FakeTensorMode():
        fake = torch.zeros(2)
    assert tracing(None, fake)
    assert not tracing(None, torch.zeros(2))


def test_nothing_is_refused_outside_a_trace():
    refuse_trace("layers")
