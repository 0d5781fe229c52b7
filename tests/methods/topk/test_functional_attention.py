import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graftwork.errors import ConfigError
from graftwork.methods.topk import reference
from graftwork.methods.topk.functional import topk_attention, topk_attention_statistics
from graftwork.surgery.masks import LazyMask, PositionBias

EXAMPLE = json.loads(Path(__file__).with_name("test_reference_example.json").read_text())
ACTIVATIONS = ["softmax", "relu", "gelu", "gelu_tanh", "silu", "softplus", "quick_gelu", "identity"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: on tiny tensors, waking threads dominates the run time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def inputs(
    batch: int = 2,
    heads: int = 3,
    groups: int = 3,
    queries: int = 33,
    keys: int = 47,
    width: int = 5,
    value_width: int = 7,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Return query, key, value and upstream gradient.

    Args:
        batch: Batch elements.
        heads: Heads.
        groups: Key and value heads.
        queries: Queries.
        keys: Keys.
        width: Width of a query.
        value_width: Width of a value.
        dtype: Data type.
    """
    torch.manual_seed(queries * 1000 + keys)
    shapes = (
        (heads, queries, width),
        (groups, keys, width),
        (groups, keys, value_width),
        (heads, queries, value_width),
    )
    tensors = [torch.randn(batch, *shape, dtype=dtype) for shape in shapes]
    return [tensor.requires_grad_() for tensor in tensors[:3]] + tensors[3:]


def dense(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Dense attention.

    Args:
        query: Queries [batch heads queries width].
        key: Keys [batch heads keys width].
        value: Values [batch heads keys value_width].
        allowed: Mask, broadcastable to [batch heads queries keys].
    """
    scores = 0.3 * query @ key.mT
    return torch.softmax(scores if allowed is None else scores.masked_fill(~allowed, -torch.inf), dim=-1) @ value


def assert_same(found: Tensor, expected: Tensor, leaves: list[Tensor], upstream: Tensor, atol: float = 1e-10) -> None:
    """Compare outputs and the gradients of all leaves.

    Args:
        found: Output under test [batch heads queries value_width].
        expected: Expected output [batch heads queries value_width].
        leaves: Tensors to differentiate by.
        upstream: Upstream gradient [batch heads queries value_width].
        atol: Absolute tolerance.
    """
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)
    pairs = zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    )
    for own, wanted in pairs:
        torch.testing.assert_close(own, wanted, atol=atol, rtol=0)


@pytest.mark.parametrize("activation", ["softmax", "relu"])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, None])
def test_the_worked_example_and_its_gradients(activation: str, chunk_size: int | None) -> None:
    tensors = [torch.tensor(part, dtype=torch.float64)[None, None] for part in EXAMPLE["attention"].values()]
    query, key, value = (tensor.requires_grad_() for tensor in tensors[:3])
    output = topk_attention(query, key, value, k=2, scale=1.0, activation=activation, chunk_size=chunk_size)
    output.backward(tensors[3])
    found = {"output": output, "query": query.grad, "key": key.grad, "value": value.grad}
    for name, expected in EXAMPLE[activation].items():
        torch.testing.assert_close(found[name][0, 0], torch.tensor(expected).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("k", [47, 1000, None])
def test_keeping_all_keys_is_dense_attention(k: int | None) -> None:
    query, key, value, upstream = inputs()
    found = topk_attention(query, key, value, k=k, scale=0.3, chunk_size=7)
    assert_same(found, dense(query, key, value), [query, key, value], upstream)


@pytest.mark.parametrize("chunk_size", [1, 5, 7, 32, 33, 64, None])
@pytest.mark.parametrize(("k", "causal"), [(1, False), (8, False), (46, False), (1, True), (8, True), (32, True)])
def test_output_and_gradients_equal_the_definition_for_every_chunk_size(
    k: int, causal: bool, chunk_size: int | None
) -> None:
    query, key, value, upstream = inputs(keys=33 if causal else 47)
    mask = LazyMask(2, 33, 33, causal=True) if causal else None
    found = topk_attention(query, key, value, k=k, scale=0.3, mask=mask, chunk_size=chunk_size)
    allowed = None if mask is None else mask.dense()
    expected = reference.attention(query, key, value, topk=k, scale=0.3, allowed=allowed)
    assert_same(found, expected, [query, key, value], upstream)


@pytest.mark.parametrize("k", [2, 20, None])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_equals_the_definition_under_a_mask(activation: str, k: int | None) -> None:
    query, key, value, upstream = inputs()
    allowed = torch.rand(2, 1, 33, 47) < 0.5
    allowed[0, :, 3] = False
    allowed[:, :, 4, 2:] = False
    found = topk_attention(query, key, value, k=k, scale=0.3, mask=allowed, activation=activation, chunk_size=9)
    expected = reference.attention(query, key, value, topk=k or 47, scale=0.3, allowed=allowed, activation=activation)
    assert_same(found, expected, [query, key, value], upstream)


@pytest.mark.parametrize("k", [3, 9, None])
@pytest.mark.parametrize("activation", ["softmax", "relu", "gelu", "silu"])
def test_finite_differences_agree_for_inputs_and_bias(activation: str, k: int | None) -> None:
    query, key, value, _ = inputs(1, 2, 1, 4, 25, 3, 2)
    bias = torch.randn(1, 2, 1, 25, dtype=torch.float64, requires_grad=True)

    def run(*leaves: Tensor) -> Tensor:
        return topk_attention(*leaves[:3], k=k, scale=0.7, bias=leaves[3], activation=activation, chunk_size=3)

    assert torch.autograd.gradcheck(run, (query, key, value, bias), fast_mode=True)


def test_causal_rows_with_fewer_than_k_keys_distribute_all_weight_over_them() -> None:
    query, key, _, _ = inputs(1, 2, 2, 16, 16)
    value = torch.eye(16, dtype=torch.float64).expand(1, 2, 16, 16).clone().requires_grad_()
    mask = LazyMask(1, 16, 16, causal=True)
    weights = topk_attention(query, key, value, k=8, scale=0.3, mask=mask, chunk_size=5)
    assert weights.triu(1).eq(0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 16, dtype=torch.float64))
    torch.testing.assert_close(weights[:, :, :8], dense(query, key, value, mask.dense())[:, :, :8], atol=1e-12, rtol=0)
    gradients = torch.autograd.grad(weights[:, :, 3].pow(2).sum(), (query, key, value))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[1][:, :, 4:].eq(0).all()
    assert gradients[2][:, :, 4:].eq(0).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("form", ["lazy", "bool", "float"])
@pytest.mark.parametrize("k", [5, None])
def test_padding_is_masked_and_a_fully_padded_element_is_zero(
    form: str, dtype: torch.dtype, tolerance: float, k: int | None
) -> None:
    query, key, value, upstream = inputs(2, 3, 3, 6, 47, dtype=dtype)
    padding = torch.zeros(2, 47, dtype=torch.bool)
    padding[0, [4, 17, 40]] = True
    mask: LazyMask | Tensor = LazyMask(2, 6, 47, padding=padding)
    if form != "lazy":
        mask = padding[:, None, None, :]
    if form == "float":
        mask = torch.zeros(2, 1, 1, 47, dtype=dtype).masked_fill(~padding[:, None, None, :], torch.finfo(dtype).min)
    found = topk_attention(query, key, value, k=k, scale=0.3, mask=mask)
    short = [part.detach()[:1, :, [4, 17, 40]].double() for part in (key, value)]
    torch.testing.assert_close(found[:1].double(), dense(query[:1].double(), *short), atol=tolerance * 3, rtol=0)
    assert found[1].eq(0).all()
    for gradient in torch.autograd.grad(found, (query, key, value), upstream):
        assert gradient.isfinite().all()
        assert gradient[1].eq(0).all()
        assert gradient[0].ne(0).any()


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("k", [3, None])
def test_a_cached_causal_call_equals_the_last_rows_of_the_uncached_one(queries: int, k: int | None) -> None:
    query, key, value, _ = inputs(queries=20, keys=20)
    whole = topk_attention(query, key, value, k=k, scale=0.3, mask=LazyMask(2, 20, 20, causal=True))
    mask = LazyMask(2, queries, 20, causal=True, query_offset=20 - queries)
    part = topk_attention(query[:, :, -queries:], key, value, k=k, scale=0.3, mask=mask)
    torch.testing.assert_close(part, whole[:, :, -queries:], atol=1e-12, rtol=0)


def test_a_rolling_cache_uses_the_key_offset() -> None:
    query, key, value, upstream = inputs(queries=6, keys=9)
    mask = LazyMask(2, 6, 9, causal=True, query_offset=10, key_offset=7)
    found = topk_attention(query, key, value, k=4, scale=0.3, mask=mask, chunk_size=2)
    # query 10 + r attends to keys 7 + j up to its own position
    allowed = torch.arange(9)[None, :] + 7 <= torch.arange(6)[:, None] + 10
    expected = reference.attention(query, key, value, topk=4, scale=0.3, allowed=allowed)
    assert_same(found, expected, [query, key, value], upstream)


@pytest.mark.parametrize("k", [4, None])
def test_queries_before_the_first_key_yield_zeros(k: int | None) -> None:
    query, key, value, upstream = inputs(queries=6, keys=9)
    mask = LazyMask(2, 6, 9, causal=True, key_offset=3)
    found = topk_attention(query, key, value, k=k, scale=0.3, mask=mask, chunk_size=2)
    allowed = torch.arange(9)[None, :] + 3 <= torch.arange(6)[:, None]
    expected = reference.attention(query, key, value, topk=k or 9, scale=0.3, allowed=allowed)
    assert found[:, :, :3].eq(0).all()
    assert_same(found, expected, [query, key, value], upstream)


@pytest.mark.parametrize("k", [2, 12, None])
@pytest.mark.parametrize("vectorised", [False, True])
def test_a_sliding_window_with_padding_equals_its_dense_mask(k: int | None, vectorised: bool) -> None:
    query, key, value, upstream = inputs(queries=33, keys=33)

    def window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key > query - 6) & (batch >= 0) & (head >= 0)

    padding = torch.ones(2, 33, dtype=torch.bool)
    padding[1, :5] = False
    mask = LazyMask(2, 33, 33, causal=True, padding=padding, predicate=window, vectorised=vectorised)
    found = topk_attention(query, key, value, k=k, scale=0.3, mask=mask, chunk_size=8)
    allowed = torch.ones(33, 33, dtype=torch.bool).tril().triu(-5) & padding[:, None, None, :]
    expected = reference.attention(query, key, value, topk=k or 33, scale=0.3, allowed=allowed)
    assert_same(found, expected, [query, key, value], upstream)


@pytest.mark.parametrize("k", [2, 20, None])
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads_equal_repeated_keys(k: int | None, causal: bool) -> None:
    query, key, value, upstream = inputs(2, 8, 2, 33, 47)
    mask = LazyMask(2, 33, 47, causal=True, query_offset=14) if causal else None
    repeated = [part.detach().repeat_interleave(4, dim=1).requires_grad_() for part in (key, value)]
    found = topk_attention(query, key, value, k=k, scale=0.3, mask=mask, chunk_size=10)
    expected = topk_attention(query, *repeated, k=k, scale=0.3, mask=mask)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    own = torch.autograd.grad(found, (query, key, value), upstream)
    wanted = torch.autograd.grad(expected, (query, *repeated), upstream)
    torch.testing.assert_close(own[0], wanted[0], atol=1e-12, rtol=0)
    for grouped, spread in zip(own[1:], wanted[1:], strict=True):
        assert grouped.shape[1] == 2
        torch.testing.assert_close(grouped, spread.unflatten(1, (2, 4)).sum(2), atol=1e-12, rtol=0)


def buckets(distance: Tensor) -> Tensor:
    """Signed logarithmic buckets like those of T5, 16 in total, for `distance` [queries keys]."""
    return torch.log2(distance.abs().double() + 1).long().clamp(max=7) + 8 * (distance > 0)


@pytest.mark.parametrize("k", [8, 64, None])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("offset", [0, 5])
def test_a_position_bias_affects_selection_and_its_table_gets_a_gradient(
    k: int | None, heads: int, offset: int
) -> None:
    query, key, value, upstream = inputs(2, 3, 3, 64 - offset, 64)
    table = torch.randn(16, heads, dtype=torch.float64, requires_grad=True)
    mask = LazyMask(2, 64 - offset, 64, causal=True, query_offset=offset)
    rows = 64 - offset
    bias = PositionBias(table[buckets(torch.arange(rows + 63) - (rows - 1) - offset)].t(), queries=rows)
    found = topk_attention(query, key, value, k=k, scale=0.3, bias=bias, mask=mask, chunk_size=11)
    distance = torch.arange(64)[None, :] - torch.arange(offset, 64)[:, None]
    expected = reference.attention(
        query,
        key,
        value,
        topk=k or 64,
        scale=0.3,
        bias=table[buckets(distance)].permute(2, 0, 1),
        allowed=distance <= 0,
    )
    assert_same(found, expected, [query, key, value, table], upstream)


@pytest.mark.parametrize("k", [3, 20, None])
@pytest.mark.parametrize(
    "shape", [(2, 3, 33, 47), (1, 3, 33, 47), (33, 47), (2, 1, 1, 47), (3, 33, 1), (47,), (1, 1, 1, 1)]
)
def test_the_gradient_of_a_dense_bias_is_summed_over_broadcast_axes(shape: tuple[int, ...], k: int | None) -> None:
    query, key, value, upstream = inputs()
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found = topk_attention(query, key, value, k=k, scale=0.3, bias=bias, chunk_size=7)
    expected = reference.attention(query, key, value, topk=k or 47, scale=0.3, bias=bias)
    assert_same(found, expected, [query, key, value, bias], upstream)


@pytest.mark.parametrize("k", [4, None])
def test_lazy_mask_bias_and_tensor_mask_combine(k: int | None) -> None:
    query, key, value, upstream = inputs(queries=33, keys=33)
    bias = torch.randn(3, 33, 33, dtype=torch.float64, requires_grad=True)
    added = torch.randn(33, 33).masked_fill(torch.rand(33, 33) < 0.3, torch.finfo(torch.float32).min)
    found = topk_attention(query, key, value, k=k, scale=0.3, mask=added, bias=bias, chunk_size=7)
    forbidden = added == torch.finfo(torch.float32).min
    expected = reference.attention(
        query, key, value, topk=k or 33, scale=0.3, bias=bias + added.masked_fill(forbidden, 0), allowed=~forbidden
    )
    assert_same(found, expected, [query, key, value, bias], upstream)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [64, None])
def test_half_precision_is_as_accurate_as_the_library_kernel(dtype: torch.dtype, k: int | None) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 4, 256, 64).to(dtype) for _ in range(3))
    if k is not None:
        # 64 dominant keys, so that dense attention is the expected result for k = 64
        key[:, :, 64:] = 0
        query[:], key[:, :, :64] = query.abs(), key[:, :, :64].abs()
    wide = [part.float() for part in (query, key, value)]
    exact = reference.attention(*wide, topk=k or 256, scale=0.125)
    found = (topk_attention(query, key, value, k=k, scale=0.125).float() - exact).abs().max()
    library = F.scaled_dot_product_attention(query, key, value, scale=0.125).float()
    library_error = (library - F.scaled_dot_product_attention(*wide, scale=0.125)).abs().max()
    assert found <= 1.5 * library_error


@pytest.mark.parametrize("k", [5, 64, None])
def test_scores_beyond_half_precision_stay_finite(k: int | None) -> None:
    query = torch.full((1, 1, 8, 64), 40.0, dtype=torch.float16)
    key, value = query.expand(1, 1, 8, 64).repeat(1, 1, 8, 1), torch.randn(1, 1, 64, 64, dtype=torch.float16)
    found = topk_attention(query, key, value, k=k, scale=0.125)
    assert found.isfinite().all()
    if k != 5:
        torch.testing.assert_close(
            found.float(), value.float().mean(2, keepdim=True).expand(1, 1, 8, 64), atol=4e-3, rtol=0
        )


@pytest.mark.parametrize("k", [4, None])
def test_bf16_autocast_gives_float32_gradients(k: int | None) -> None:
    query, key, value, upstream = inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = topk_attention(query, key, value, k=k, scale=0.3)
    assert found.dtype == torch.bfloat16
    found.backward(upstream.bfloat16())
    assert {leaf.grad.dtype for leaf in (query, key, value)} == {torch.float32}


@pytest.mark.parametrize(("k", "chunk_size"), list(itertools.product([16, None], [None, 16, 5])))
def test_dropout_gradients_use_the_mask_of_the_forward_pass(k: int | None, chunk_size: int | None) -> None:
    query, key, value, upstream = inputs(1, 2, 2, 64, 40)

    def run(leaves: list[Tensor]) -> Tensor:
        torch.manual_seed(5)
        return topk_attention(*leaves, k=k, scale=0.3, dropout=0.5, chunk_size=chunk_size)

    leaves = [query, key, value]
    gradients = torch.autograd.grad(run(leaves), leaves, upstream)
    direction = [torch.randn_like(leaf) for leaf in leaves]
    step = 1e-6
    ahead, behind = (
        run([leaf.detach() + sign * step * way for leaf, way in zip(leaves, direction, strict=True)])
        for sign in (1, -1)
    )
    numeric = ((ahead - behind) * upstream).sum() / (2 * step)
    analytic = sum((gradient * way).sum() for gradient, way in zip(gradients, direction, strict=True))
    torch.testing.assert_close(analytic, numeric, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("k", [16, None])
def test_dropout_rate_and_scale(k: int | None) -> None:
    query, key, _, _ = inputs(1, 2, 2, 64, 40, dtype=torch.float32)
    value = torch.eye(40).expand(1, 2, 40, 40)
    torch.manual_seed(0)
    dropped = topk_attention(query, key, value, k=k, scale=0.3, dropout=0.5, chunk_size=5)
    whole = topk_attention(query, key, value, k=k, scale=0.3)
    count = 2 * 64 * (k or 40)
    assert abs(dropped.count_nonzero().item() / count - 0.5) < 3 * (0.25 / count) ** 0.5
    torch.testing.assert_close(dropped, torch.where(dropped > 0, 2 * whole, 0.0))


@pytest.mark.parametrize("k", [6, None])
def test_two_forwards_before_a_backward_use_separate_dropout_masks(k: int | None) -> None:
    query, key, value, upstream = inputs()
    leaves = [query, key, value]

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return topk_attention(*leaves, k=k, scale=0.3, dropout=0.5, chunk_size=9)

    alone = [torch.autograd.grad(run(seed), leaves, upstream) for seed in (1, 2)]
    first, second = run(1), run(2)
    for output, expected in ((first, alone[0]), (second, alone[1])):
        for own, wanted in zip(torch.autograd.grad(output, leaves, upstream), expected, strict=True):
            assert own.equal(wanted)


@pytest.mark.parametrize("k", [6, None])
def test_a_retained_graph_gives_the_same_gradient_again(k: int | None) -> None:
    query, key, value, upstream = inputs()
    output = topk_attention(query, key, value, k=k, scale=0.3, dropout=0.3)
    first = torch.autograd.grad(output, (query, key, value), upstream, retain_graph=True)
    second = torch.autograd.grad(output, (query, key, value), upstream)
    assert all(one.equal(other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("k", [6, None])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_required_gradients_are_computed(wanted: tuple[int, ...], k: int | None) -> None:
    query, key, value, upstream = inputs()
    expected = reference.attention(query, key, value, topk=k or 47, scale=0.3)
    leaves = [part.detach().requires_grad_(place in wanted) for place, part in enumerate((query, key, value))]
    topk_attention(*leaves, k=k, scale=0.3).backward(upstream)
    gradients = torch.autograd.grad(expected, (query, key, value), upstream)
    for place, leaf in enumerate(leaves):
        if place in wanted:
            torch.testing.assert_close(leaf.grad, gradients[place], atol=1e-10, rtol=0)
        else:
            assert leaf.grad is None


def test_double_backward_raises() -> None:
    query, key, value, _ = inputs()
    gradient = torch.autograd.grad(topk_attention(query, key, value, k=6, scale=0.3).sum(), query, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiated twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("k", [6, None])
def test_nan_stays_in_its_row(k: int | None) -> None:
    query, key, value, _ = inputs()
    plain = topk_attention(query, key, value, k=k, scale=0.3)
    with torch.no_grad():
        query[1, 2, 7, 0] = torch.nan
    found = topk_attention(query, key, value, k=k, scale=0.3)
    assert found[1, 2, 7].isnan().all()
    found[1, 2, 7] = plain[1, 2, 7]
    assert found.equal(plain)


@pytest.mark.parametrize("k", [7, None])
def test_empty_tensors_are_accepted(k: int | None) -> None:
    for batch, queries in ((0, 3), (2, 0)):
        query, key, value, upstream = inputs(batch, 2, 2, queries, 11)
        found = topk_attention(query, key, value, k=k, scale=0.3)
        assert found.shape == (batch, 2, queries, 7)
        found.backward(upstream)
        assert key.grad.eq(0).all()


def test_ties_and_duplicate_keys_select_any_k_of_them() -> None:
    query, key, value, upstream = inputs()
    with torch.no_grad():
        key[:] = key[:, :, :1]
    statistics = topk_attention_statistics(query, key, k=9, scale=0.3)
    assert all(len(set(row)) == 9 for row in statistics.indices.reshape(-1, 9).tolist())
    found = topk_attention(query, key, value, k=9, scale=0.3)
    found.backward(upstream)
    assert found.isfinite().all()


def test_transposed_inputs_equal_contiguous_ones() -> None:
    query, key, value, upstream = inputs()
    views = [
        part.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for part in (query, key, value)
    ]
    found = topk_attention(*views, k=5, scale=0.3, chunk_size=8)
    expected = topk_attention(query, key, value, k=5, scale=0.3)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    for own, wanted in zip(
        torch.autograd.grad(found, views, upstream),
        torch.autograd.grad(expected, (query, key, value), upstream),
        strict=True,
    ):
        torch.testing.assert_close(own, wanted, atol=1e-12, rtol=0)


def test_statistics_agree_with_a_dense_softmax() -> None:
    query, key, _, _ = inputs(2, 4, 2, 33, 33)
    padding = torch.ones(2, 33, dtype=torch.bool)
    padding[1, :9] = False
    mask = LazyMask(2, 33, 33, causal=True, padding=padding)
    found = topk_attention_statistics(query, key, k=4, scale=0.3, mask=mask, chunk_size=6)
    scores = 0.3 * query @ key.repeat_interleave(2, dim=1).mT
    scores = scores.masked_fill(~mask.dense(), -torch.inf)
    probability = torch.softmax(scores, dim=-1)
    best = probability.topk(4).values.sum(-1)
    seen = mask.dense().any(-1).expand(2, 4, 33)
    expected = torch.stack([best[:, head][seen[:, head]].mean() for head in range(4)])
    torch.testing.assert_close(found.kept_mass, expected)
    torch.testing.assert_close(found.log_normaliser, scores.topk(4).values.logsumexp(-1))
    torch.testing.assert_close(found.weights.sum(-1), seen.double())
    assert found.indices[1, :, 8].eq(-1).all()
    assert sorted(found.indices[0, 1, 2].tolist()) == [-1, 0, 1, 2]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"k": 0}, "k is 0. Expected a whole number from 1"),
        ({"k": -1}, "k is -1. Expected a whole number from 1"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"activation": "tanh"}, "activation is 'tanh'. Expected one of: gelu, .*softmax"),
        ({"mask": LazyMask(2, 5, 47)}, "mask is for 5 queries and 47 keys; query and key have 33 and 47"),
    ],
)
def test_invalid_settings_are_refused_by_value(setting: dict[str, object], message: str) -> None:
    query, key, value, _ = inputs()
    with pytest.raises(ConfigError, match=message):
        topk_attention(query, key, value, **{"k": 4, "scale": 0.3, **setting})
