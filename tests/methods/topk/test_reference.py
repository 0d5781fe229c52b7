"""The definition against the worked example, whose numbers were computed by hand and by independent code."""

import pytest
import torch

from graftwork.methods.topk import reference

QUERY = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
KEY = [[2.0, 0.5], [1.0, 0.25], [0.0, 3.0], [0.5, -1.0]]
VALUE = [[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [-1.0, 1.0]]
UPSTREAM = [[1.0, 2.0], [1.0, -1.0], [0.5, 1.0]]
EXPECTED = {
    "softmax": {
        "output": [[0.731059, 0.268941], [1.924142, 1.848284], [1.622459, 1.244919]],
        "query": [[-0.196612, -0.049153], [0.140207, -0.175259], [-1.175019, 1.468773]],
        "key": [[-0.784121, -0.517406], [0.196612, 0.0], [0.587509, 0.517406], [0.0, 0.0]],
        "value": [[0.995687, 1.763800], [0.268941, 0.537883], [1.235371, -0.301682], [0.0, 0.0]],
    },
    "relu": {
        "output": [[2.0, 1.0], [6.5, 6.0], [8.5, 6.0]],
        "query": [[4.0, 1.0], [2.0, 0.5], [1.0, 9.25]],
        "key": [[1.5, 1.5], [2.0, 0.0], [3.0, 3.0], [0.0, 0.0]],
        "value": [[3.75, 6.0], [1.0, 2.0], [4.5, 0.0], [0.0, 0.0]],
    },
}

GATED_INPUT = [[1.0, 2.0], [-1.0, 0.5]]
GATE = [[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]]
UP = [[0.5, 0.5], [1.0, -1.0], [2.0, 0.0]]
OUT = [[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]
GATED_EXPECTED = {
    ("gate", 1): [[0.0, -1.761594], [0.0, -0.466844]],
    ("product", 1): [[0.0, -1.761594], [0.547277, 0.547277]],
    ("gate", 3): [[0.558705, -2.299477], [0.614512, 0.080432]],
    ("product", 3): [[0.558705, -2.299477], [0.614512, 0.080432]],
}


def worked_example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = (torch.tensor(part, dtype=torch.float64)[None, None] for part in (QUERY, KEY, VALUE, UPSTREAM))
    query, key, value, upstream = rows
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), upstream


@pytest.mark.parametrize("activation", ["softmax", "relu"])
def test_attention_gives_the_worked_example_with_gradients(activation: str) -> None:
    query, key, value, upstream = worked_example()
    output = reference.attention(query, key, value, topk=2, scale=1.0, activation=activation)
    output.backward(upstream)
    for name, found in (("output", output), ("query", query.grad), ("key", key.grad), ("value", value.grad)):
        torch.testing.assert_close(found[0, 0].float(), torch.tensor(EXPECTED[activation][name]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("selection", "k"), GATED_EXPECTED)
def test_gated_feed_forward_gives_the_worked_example(selection: str, k: int) -> None:
    tensors = [torch.tensor(part, dtype=torch.float64) for part in (GATED_INPUT, GATE, UP, OUT)]
    output = reference.gated_feed_forward(*tensors, k=k, activation="silu", selection=selection)
    torch.testing.assert_close(output.float(), torch.tensor(GATED_EXPECTED[selection, k]), atol=1e-6, rtol=0)


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
