"""Reference implementation against the worked example."""

import json
from pathlib import Path

import pytest
import torch

from graftwork.methods.topk import reference

EXAMPLE = json.loads(Path(__file__).with_name("test_reference_example.json").read_text())


def worked_example() -> list[torch.Tensor]:
    tensors = [torch.tensor(part, dtype=torch.float64)[None, None] for part in EXAMPLE["attention"].values()]
    return [tensor.requires_grad_() for tensor in tensors[:3]] + tensors[3:]


@pytest.mark.parametrize("activation", ["softmax", "relu"])
def test_attention_reproduces_the_worked_example_and_its_gradients(activation: str) -> None:
    query, key, value, upstream = worked_example()
    output = reference.attention(query, key, value, topk=2, scale=1.0, activation=activation)
    output.backward(upstream)
    found = {"output": output, "query": query.grad, "key": key.grad, "value": value.grad}
    for name, expected in EXAMPLE[activation].items():
        torch.testing.assert_close(found[name][0, 0], torch.tensor(expected).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("case", EXAMPLE["gated_output"])
def test_gated_feed_forward_reproduces_the_worked_example(case: str) -> None:
    selection, k = case.split()
    tensors = {name: torch.tensor(part, dtype=torch.float64) for name, part in EXAMPLE["gated"].items()}
    output = reference.gated_feed_forward(**tensors, k=int(k), activation="silu", selection=selection)
    torch.testing.assert_close(output, torch.tensor(EXAMPLE["gated_output"][case]).double(), atol=1e-6, rtol=0)


def test_a_query_without_any_allowed_key_yields_zeros_and_no_gradient() -> None:
    query, key, value, _ = worked_example()
    allowed = torch.tensor([[True], [False], [True]]).expand(3, 4)
    output = reference.attention(query, key, value, topk=2, scale=1.0, allowed=allowed)
    output.sum().backward()
    assert output[0, 0, 1].eq(0).all()
    assert query.grad[0, 0, 1].eq(0).all()
    assert not key.grad.isnan().any()


def test_ranking_by_magnitude_keeps_a_negative_unit_that_ranking_by_score_drops() -> None:
    # gelu(-0.75) = -0.17 outweighs gelu(0.1) = 0.054
    x, w_in, w_out = torch.tensor([[1.0]]), torch.tensor([[-0.75], [0.1]]), torch.tensor([[1.0, 1.0]])
    by_score = reference.feed_forward(x, w_in, w_out, k=1, activation="gelu")
    by_magnitude = reference.feed_forward(x, w_in, w_out, k=1, activation="gelu", selection="abs_act")
    torch.testing.assert_close(by_score, torch.nn.functional.gelu(torch.tensor([[0.1]])))
    torch.testing.assert_close(by_magnitude, torch.nn.functional.gelu(torch.tensor([[-0.75]])))
