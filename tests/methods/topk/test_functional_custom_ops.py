from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from graftwork.errors import ConfigError
from graftwork.methods.topk.functional import topk_attention, topk_feed_forward, topk_gated_feed_forward
from graftwork.surgery.masks import LazyMask, PositionBias

# inductor needs a C++ compiler and minutes, and generates no code for custom operators
BACKEND = "aot_eager"

pytestmark = pytest.mark.skipif(
    hasattr(topk_feed_forward, "__wrapped__"), reason="a function wrapped for shape checks cannot be traced"
)


def assert_compiled_equals_eager(function: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=BACKEND)
    expected = function(*leaves)
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    found = compiled(*leaves)
    torch.testing.assert_close(found, expected)
    for own, other in zip(torch.autograd.grad(found, leaves, upstream), wanted, strict=True):
        torch.testing.assert_close(own, other)


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("k", [3, 20, None])
def test_a_compiled_feed_forward_layer_equals_the_eager_one(k: int | None) -> None:
    assert_compiled_equals_eager(
        lambda *given: topk_feed_forward(*given, k=k, activation="gelu", chunk_size=7) * 2,
        leaves((2, 5, 9), (47, 9), (5, 47), (47,), (5,)),
    )


def test_a_compiled_gated_layer_equals_the_eager_one() -> None:
    assert_compiled_equals_eager(
        lambda *given: topk_gated_feed_forward(*given, k=3, activation="silu").sin(),
        leaves((10, 9), (47, 9), (47, 9), (5, 47), (47,), (47,), (5,)),
    )


@pytest.mark.parametrize("k", [3, 20, None])
def test_compiled_attention_equals_the_eager_one_with_mask_and_biases(k: int | None) -> None:
    padding = torch.ones(2, 33, dtype=torch.bool)
    padding[1, :5] = False

    def run(query: Tensor, key: Tensor, value: Tensor, relative: Tensor) -> Tensor:
        mask = LazyMask(2, 13, 33, causal=True, query_offset=20, padding=padding)
        bias = PositionBias(relative, queries=13)
        return topk_attention(query, key, value, k=k, scale=0.3, mask=mask, bias=bias, chunk_size=5) * 2

    assert_compiled_equals_eager(run, leaves((2, 4, 13, 5), (2, 2, 33, 5), (2, 2, 33, 7), (4, 45)))


@pytest.mark.parametrize("k", [3, None])
def test_compiled_attention_with_dense_mask_and_bias_equals_the_eager_one(k: int | None) -> None:
    allowed = torch.rand(2, 1, 13, 33) < 0.7

    def run(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return topk_attention(query, key, value, k=k, scale=0.3, mask=allowed, bias=bias)

    assert_compiled_equals_eager(run, leaves((2, 4, 13, 5), (2, 4, 33, 5), (2, 4, 33, 7), (1, 4, 13, 33)))


@pytest.mark.parametrize("k", [20, None])
def test_the_gradient_of_compiled_dropout_uses_the_mask_of_the_forward_pass(k: int | None) -> None:
    torch._dynamo.reset()

    def run(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        return topk_feed_forward(x, w_in, w_out, k=k, activation="identity", dropout=0.5)

    x, w_in, w_out = leaves((64, 9), (47, 9), (5, 47))
    compiled = torch.compile(run, fullgraph=True, backend=BACKEND)
    first, second = compiled(x, w_in, w_out), compiled(x, w_in, w_out)
    assert not first.equal(second)
    # the layer is linear in its output weights w, so w · ∂L/∂w equals the output
    for output in (first, second):
        gradient = torch.autograd.grad(output.sum(), w_out)[0]
        torch.testing.assert_close((gradient * w_out).sum(), output.sum())


def test_only_required_gradients_are_computed_in_a_graph() -> None:
    torch._dynamo.reset()
    x, w_in, w_out = leaves((6, 9), (47, 9), (5, 47))
    x, w_in = x.detach(), w_in.detach()
    compiled = torch.compile(
        lambda *given: topk_feed_forward(*given, k=3, activation="relu"), fullgraph=True, backend=BACKEND
    )
    compiled(x, w_in, w_out).sum().backward()
    assert w_out.grad is not None
    assert x.grad is None


def test_a_predicate_becomes_a_tensor_under_compile() -> None:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = LazyMask(1, 14, 14, causal=True, predicate=lambda batch, head, query, key: key > query - 5)
        return topk_attention(query, key, value, k=2, scale=1.0, mask=mask)

    assert_compiled_equals_eager(run, leaves((1, 1, 14, 2), (1, 1, 14, 2), (1, 1, 14, 2)))


def test_a_mask_with_a_predicate_of_scalars_is_refused_under_compile() -> None:
    torch._dynamo.reset()
    query, key, value = leaves((1, 1, 4, 2), (1, 1, 4, 2), (1, 1, 4, 2))

    def run(query: Tensor) -> Tensor:
        mask = LazyMask(1, 4, 4, predicate=lambda batch, head, query, key: key >= query, vectorised=True)
        return topk_attention(query, key, value, k=2, scale=1.0, mask=mask)

    with pytest.raises(Exception, match="predicate") as caught:
        torch.compile(run, fullgraph=True, backend=BACKEND)(query)
    assert "mask.dense()" in str(caught.value) or isinstance(caught.value, ConfigError)
