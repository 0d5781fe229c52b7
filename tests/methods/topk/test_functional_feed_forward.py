import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from graftwork.errors import ConfigError
from graftwork.methods.topk import reference
from graftwork.methods.topk.functional import (
    select_topk,
    topk_feed_forward,
    topk_feed_forward_statistics,
    topk_gated_feed_forward,
    topk_gated_feed_forward_statistics,
)

EXAMPLE = json.loads(Path(__file__).with_name("test_reference_example.json").read_text())
PLAIN, GATED = ("score", "abs_act"), ("gate", "abs_act", "product")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: on tiny tensors, waking threads dominates the run time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(
    hidden: int = 9, units: int = 47, out: int = 5, tokens: int = 33, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Return input, weights and biases of a plain or a gated layer, scaled like a trained layer.

    Args:
        hidden: Width of a token.
        units: Hidden units.
        out: Width of the output.
        tokens: Tokens.
        dtype: Data type.
    """
    torch.manual_seed(tokens * 1000 + units)
    shapes = {
        "x": (tokens, hidden),
        "w_in": (units, hidden),
        "w_up": (units, hidden),
        "w_out": (out, units),
        "b_in": (units,),
        "b_up": (units,),
        "b_out": (out,),
    }
    return {
        name: (torch.randn(shape, dtype=torch.float64) / shape[-1] ** (0.5 * (len(shape) == 2 and name != "x")))
        .to(dtype)
        .requires_grad_()
        for name, shape in shapes.items()
    }


def run_plain(given: dict[str, Tensor], **settings: object) -> Tensor:
    return topk_feed_forward(*(given[name] for name in ("x", "w_in", "w_out", "b_in", "b_out")), **settings)


def run_gated(given: dict[str, Tensor], **settings: object) -> Tensor:
    names = ("x", "w_in", "w_up", "w_out", "b_in", "b_up", "b_out")
    return topk_gated_feed_forward(*(given[name] for name in names), **settings)


def dense_plain(given: dict[str, Tensor], activation: Callable[[Tensor], Tensor] = F.relu) -> Tensor:
    return F.linear(activation(F.linear(given["x"], given["w_in"], given["b_in"])), given["w_out"], given["b_out"])


def assert_same(found: Tensor, expected: Tensor, leaves: list[Tensor], atol: float = 1e-10) -> None:
    """Compare `found` and `expected` [*tokens out] and the gradients of all leaves, relative to their maxima."""
    upstream = torch.randn_like(expected)
    pairs = [(found, expected)]
    pairs += zip(
        torch.autograd.grad(found, leaves, upstream.to(found.dtype)),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    )
    for own, wanted in pairs:
        largest = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
        torch.testing.assert_close(own, wanted, atol=atol * largest, rtol=0)


@pytest.mark.parametrize("case", EXAMPLE["gated_output"])
@pytest.mark.parametrize("chunk_size", [1, None])
def test_the_gated_worked_example(case: str, chunk_size: int | None) -> None:
    selection, k = case.split()
    tensors = {name: torch.tensor(part, dtype=torch.float64) for name, part in EXAMPLE["gated"].items()}
    found = topk_gated_feed_forward(**tensors, k=int(k), activation="silu", selection=selection, chunk_size=chunk_size)
    torch.testing.assert_close(found, torch.tensor(EXAMPLE["gated_output"][case]).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 33, 64, None])
@pytest.mark.parametrize("k", [1, 5, 20, 46, 47, 1000, None])
@pytest.mark.parametrize("selection", PLAIN)
def test_a_plain_layer_equals_the_definition_for_every_chunk_size(
    selection: str, k: int | None, chunk_size: int | None
) -> None:
    given = weights()
    settings = {"activation": "gelu", "selection": selection}
    found = run_plain(given, k=k, chunk_size=chunk_size, **settings)
    names = ["x", "w_in", "w_out", "b_in", "b_out"]
    expected = reference.feed_forward(*(given[name] for name in names), k=k or 47, **settings)
    assert_same(found, expected, [given[name] for name in names])


@pytest.mark.parametrize("chunk_size", [1, 5, None])
@pytest.mark.parametrize("k", [1, 5, 20, 46, 1000, None])
@pytest.mark.parametrize("selection", GATED)
def test_a_gated_layer_equals_the_definition_for_every_chunk_size(
    selection: str, k: int | None, chunk_size: int | None
) -> None:
    given = weights()
    names = ["x", "w_in", "w_up", "w_out"]
    settings = {"activation": "silu", "selection": selection}
    leaves = [given[name] for name in names]
    found = topk_gated_feed_forward(*leaves, k=k, chunk_size=chunk_size, **settings)
    assert_same(found, reference.gated_feed_forward(*leaves, k=k or 47, **settings), leaves)


@pytest.mark.parametrize("k", [3, 20, 47])
@pytest.mark.parametrize("selection", GATED)
def test_gated_layers_apply_their_biases(selection: str, k: int) -> None:
    given = weights()
    found = run_gated(given, k=k, activation="gelu_new", selection=selection, chunk_size=10)
    # a bias equals the weight of a constant input of 1
    ones = torch.ones(33, 1, dtype=torch.float64)
    wide = [
        torch.cat([given[weight], given[bias][:, None]], 1) for weight, bias in (("w_in", "b_in"), ("w_up", "b_up"))
    ]
    expected = reference.gated_feed_forward(
        torch.cat([given["x"], ones], 1), *wide, given["w_out"], k=k, activation="gelu_tanh", selection=selection
    )
    assert_same(found, expected + given["b_out"], list(given.values()))


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "swish", "quick_gelu"])
@pytest.mark.parametrize("k", [4, None])
def test_activations_equal_those_of_transformers(activation: str, k: int | None) -> None:
    from transformers.activations import ACT2FN

    given = weights()
    found = run_plain(given, k=k, activation=activation)
    h = F.linear(given["x"], given["w_in"], given["b_in"])
    kept = h >= h.topk(k or 47).values[:, -1:]
    expected = F.linear(ACT2FN[activation](h) * kept, given["w_out"], given["b_out"])
    names = ["x", "w_in", "w_out", "b_in", "b_out"]
    assert_same(found, expected, [given[name] for name in names])


@pytest.mark.parametrize("k", [4, 20, None])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_finite_differences_agree_for_all_weights(activation: str, k: int | None) -> None:
    given = weights(tokens=4)

    def plain(*leaves: Tensor) -> Tensor:
        return topk_feed_forward(*leaves, k=k, activation=activation, chunk_size=3)

    def gated(*leaves: Tensor) -> Tensor:
        return topk_gated_feed_forward(*leaves, k=k, activation=activation, selection="gate", chunk_size=3)

    names = ("x", "w_in", "w_out", "b_in", "b_out")
    assert torch.autograd.gradcheck(plain, tuple(given[name] for name in names), fast_mode=True)
    names = ("x", "w_in", "w_up", "w_out", "b_in", "b_up", "b_out")
    assert torch.autograd.gradcheck(gated, tuple(given[name] for name in names), fast_mode=True)


def test_a_relu_layer_that_keeps_all_positive_scores_equals_the_dense_one() -> None:
    given = weights(units=200, dtype=torch.float32)
    with torch.no_grad():
        # a strong negative bias leaves a few positive units, as in trained T5 layers
        given["b_in"].fill_(-1.8)
    positive = (F.linear(given["x"], given["w_in"], given["b_in"]) > 0).sum(-1)
    assert 0 < positive.max() <= 24
    names = ["x", "w_in", "w_out", "b_in", "b_out"]
    assert_same(
        run_plain(given, k=24, activation="relu"), dense_plain(given), [given[name] for name in names], atol=1e-6
    )


@pytest.mark.parametrize("k", [3, 20, None])
def test_negative_scores_under_relu_give_zeros(k: int | None) -> None:
    given = weights()
    with torch.no_grad():
        given["b_in"].fill_(-1e3)
        given["b_out"].zero_()
    found = run_plain(given, k=k, activation="relu")
    assert found.eq(0).all()
    found.sum().backward()
    assert given["x"].grad.eq(0).all()
    assert given["w_out"].grad.eq(0).all()


def test_ties_keep_any_k_distinct_units() -> None:
    # one token, equal scores of 1, distinct powers of two as values, so that the sum identifies the kept units
    w_out = torch.tensor([[2.0**unit for unit in range(40)]], dtype=torch.float64)
    found = topk_feed_forward(
        torch.ones(1, 1, dtype=torch.float64), torch.ones(40, 1, dtype=torch.float64), w_out, k=3, activation="relu"
    )
    assert bin(int(found.item())).count("1") == 3


@pytest.mark.parametrize("tokens", [0, 1, 10, 15, 16, 17])
@pytest.mark.parametrize("chunk_size", [1, 4, 8, 1024])
@pytest.mark.parametrize("k", [3, None])
def test_any_number_of_tokens_and_leading_axes_is_accepted(tokens: int, chunk_size: int, k: int | None) -> None:
    given = weights(tokens=tokens)
    x = given["x"].reshape(1, tokens, 9).transpose(0, 1)
    leaves = [given["w_in"], given["w_out"]]
    found = topk_feed_forward(x, *leaves, k=k, activation="silu", chunk_size=chunk_size)
    assert found.shape == (tokens, 1, 5)
    expected = reference.feed_forward(given["x"], *leaves, k=k or 47, activation="silu")
    assert_same(found, expected[:, None], [given["x"], *leaves])


@pytest.mark.parametrize(("k", "chunk_size"), list(itertools.product([16, 4, None], [None, 16, 5])))
@pytest.mark.parametrize("run", [run_plain, run_gated])
def test_dropout_gradients_use_the_mask_of_the_forward_pass(
    run: Callable[..., Tensor], k: int | None, chunk_size: int | None
) -> None:
    given = weights(tokens=64)
    leaves = list(given.values())
    upstream = torch.randn(64, 5, dtype=torch.float64)

    def seeded(values: list[Tensor]) -> Tensor:
        torch.manual_seed(5)
        return run(dict(zip(given, values, strict=True)), k=k, activation="silu", dropout=0.5, chunk_size=chunk_size)

    gradients = torch.autograd.grad(seeded(leaves), leaves, upstream, allow_unused=True)
    direction = [torch.randn_like(leaf) for leaf in leaves]
    # small enough that the ranking of units, and with it the dropout mask, does not change
    step = 1e-7
    ahead, behind = (
        seeded([leaf.detach() + sign * step * way for leaf, way in zip(leaves, direction, strict=True)])
        for sign in (1, -1)
    )
    numeric = ((ahead - behind) * upstream).sum() / (2 * step)
    pairs = zip(gradients, direction, strict=True)
    analytic = sum((gradient * way).sum() for gradient, way in pairs if gradient is not None)
    torch.testing.assert_close(analytic, numeric, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("k", [16, None])
def test_dropout_rate(k: int | None) -> None:
    w_in, w_out = torch.randn(40, 8), torch.eye(40)
    torch.manual_seed(0)
    found = topk_feed_forward(torch.randn(64, 8), w_in, w_out, k=k, activation="softplus", dropout=0.5, chunk_size=5)
    count = 64 * (k or 40)
    assert abs(found.count_nonzero().item() / count - 0.5) < 3 * (0.25 / count) ** 0.5


@pytest.mark.parametrize("k", [4, 20, None])
def test_two_forwards_before_a_backward_and_a_retained_graph_are_right(k: int | None) -> None:
    given = weights()
    leaves = list(given.values())

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return run_gated(given, k=k, activation="silu", dropout=0.5, chunk_size=9)

    upstream = torch.randn(33, 5, dtype=torch.float64)
    alone = [torch.autograd.grad(run(seed), leaves, upstream) for seed in (1, 2)]
    first, second = run(1), run(2)
    for output, expected in ((first, alone[0]), (first, alone[0]), (second, alone[1])):
        for own, wanted in zip(torch.autograd.grad(output, leaves, upstream, retain_graph=True), expected, strict=True):
            assert own.equal(wanted)


def test_without_dropout_nothing_is_random_and_the_random_state_is_untouched() -> None:
    given = weights()
    before = torch.get_rng_state()
    first = run_plain(given, k=4, activation="relu")
    assert first.equal(run_plain(given, k=4, activation="relu"))
    assert torch.get_rng_state().equal(before)
    first.sum().backward()


@pytest.mark.parametrize("k", [4, 20, None])
@pytest.mark.parametrize("wanted", [("x",), ("w_in",), ("w_up",), ("w_out",), ("b_in",), ("b_up",), ("x", "w_out")])
def test_only_required_gradients_are_computed(wanted: tuple[str, ...], k: int | None) -> None:
    given = weights()
    settings = {"k": k, "activation": "silu", "selection": "gate"}
    upstream = torch.randn(33, 5, dtype=torch.float64)
    expected = dict(
        zip(given, torch.autograd.grad(run_gated(given, **settings), given.values(), upstream), strict=True)
    )
    leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in given.items()}
    run_gated(leaves, **settings).backward(upstream)
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in wanted)
        if name in wanted:
            torch.testing.assert_close(leaf.grad, expected[name], atol=1e-12, rtol=0)


def test_double_backward_raises_even_under_a_constant_upstream_gradient() -> None:
    given = weights()
    output = run_plain(given, k=4, activation="silu").sum()
    gradient = torch.autograd.grad(output, given["x"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiated twice"):
        (gradient.sum() + given["x"].sum()).backward()


def test_functorch_transforms_raise() -> None:
    w_in, w_out = torch.randn(8, 3), torch.randn(3, 8)

    def run(x: Tensor) -> Tensor:
        return topk_feed_forward(x, w_in, w_out, k=2, activation="relu").sum()

    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(run)(torch.randn(5, 3))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_repeats_the_dropout_mask(reentrant: bool) -> None:
    given = weights()

    def run(x: Tensor) -> Tensor:
        return run_gated(given | {"x": x}, k=4, activation="silu", dropout=0.3)

    gradients = []
    for forward in (run, lambda x: checkpoint(run, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        given["x"].grad = None
        forward(given["x"]).sum().backward()
        gradients.append(given["x"].grad)
    assert gradients[0].equal(gradients[1])


@pytest.mark.parametrize("k", [4, 20, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_float32(dtype: torch.dtype, k: int | None) -> None:
    given = weights(dtype=dtype)
    names = ["x", "w_in", "w_out", "b_in", "b_out"]
    with torch.no_grad():
        # four units far above the rest, so that the selection is unambiguous
        given["b_in"][:4] += 20
    found = run_plain(given, k=k, activation="gelu")
    wide = {name: given[name].detach().float().requires_grad_() for name in names}
    expected = reference.feed_forward(*wide.values(), k=k or 47, activation="gelu")
    if k != 20:
        scale = expected.abs().max().item()
        torch.testing.assert_close(found.float(), expected, atol=2e-2 * scale, rtol=0)
    found.float().sum().backward()
    assert {given[name].grad.dtype for name in names} == {dtype}


@pytest.mark.parametrize("k", [4, 20, None])
def test_output_weights_may_have_a_wider_dtype_than_the_input_as_in_t5(k: int | None) -> None:
    given = weights(dtype=torch.bfloat16)
    w_out = given["w_out"].detach().float().requires_grad_()
    found = topk_feed_forward(given["x"], given["w_in"], w_out, k=k, activation="relu")
    assert found.dtype == torch.float32
    found.sum().backward()
    assert w_out.grad.dtype == torch.float32
    assert given["x"].grad.dtype == torch.bfloat16
    rounded = F.relu(F.linear(given["x"], given["w_in"]))
    if k is None:
        torch.testing.assert_close(found, F.linear(rounded.float(), w_out))


@pytest.mark.parametrize("k", [4, 20, None])
def test_bf16_autocast_gives_float32_gradients(k: int | None) -> None:
    given = weights(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run_gated(given, k=k, activation="silu")
    assert found.dtype == torch.bfloat16
    found.sum().backward()
    assert {leaf.grad.dtype for leaf in given.values()} == {torch.float32}


@pytest.mark.parametrize("k", [4, 20, None])
def test_nan_stays_in_its_row(k: int | None) -> None:
    given = weights()
    plain = run_plain(given, k=k, activation="relu")
    with torch.no_grad():
        given["x"][7, 0] = torch.nan
    found = run_plain(given, k=k, activation="relu")
    assert found[7].isnan().all()
    found[7] = plain[7]
    assert found.equal(plain)


def test_transposed_weights_equal_contiguous_ones() -> None:
    given = weights()
    stored = {name: tensor.detach().t().contiguous().requires_grad_() for name, tensor in given.items() if "w" in name}
    found = topk_feed_forward(given["x"], stored["w_in"].t(), stored["w_out"].t(), k=4, activation="silu")
    expected = topk_feed_forward(given["x"], given["w_in"], given["w_out"], k=4, activation="silu")
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(stored["w_out"].grad.t(), given["w_out"].grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("rows", "keys", "k"), [(5, 4099, 64), (3, 8192, 256), (7, 2048, 1), (4, 50, 7), (2, 9, 20)])
def test_selection_finds_the_same_values_as_a_full_sort(rows: int, keys: int, k: int) -> None:
    torch.manual_seed(keys)
    scores = torch.randn(2, rows, keys)
    values, indices = select_topk(scores, k)
    assert values.sort(-1, descending=True).values.equal(scores.sort(-1, descending=True).values[..., :k])
    assert scores.gather(-1, indices).equal(values)
    assert all(len(set(row)) == min(k, keys) for row in indices.reshape(-1, min(k, keys)).tolist())


def test_selection_handles_ties_infinities_and_nan() -> None:
    scores = torch.zeros(3, 4099)
    scores[0, 4098] = torch.nan
    scores[0, 17] = torch.inf
    scores[1] = -torch.inf
    scores[1, 5] = -1e30
    values, indices = select_topk(scores, 8)
    assert {17, 4098} <= set(indices[0].tolist())
    assert values[0].isnan().sum() == 1
    assert 5 in indices[1].tolist()
    assert all(len(set(row)) == 8 for row in indices.tolist())


@pytest.mark.parametrize("chunk_size", [4, None])
def test_statistics_agree_with_a_dense_layer(chunk_size: int | None) -> None:
    given = weights()
    h = F.relu(F.linear(given["x"], given["w_in"], given["b_in"]))
    plain = topk_feed_forward_statistics(
        given["x"][None], given["w_in"], given["b_in"], k=6, activation="relu", chunk_size=chunk_size
    )
    torch.testing.assert_close(plain.kept_mass, (h.topk(6).values.sum() / h.sum()).float())
    torch.testing.assert_close(plain.active_units, (h > 0).float().sum(-1).mean())
    product = F.silu(F.linear(given["x"], given["w_in"])) * F.linear(given["x"], given["w_up"])
    gated = topk_gated_feed_forward_statistics(
        given["x"], given["w_in"], given["w_up"], k=6, activation="silu", chunk_size=chunk_size
    )
    torch.testing.assert_close(gated.kept_mass, (product.abs().topk(6).values.sum() / product.abs().sum()).float())
    assert gated.active_units == 47


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"k": 0}, "k is 0. Expected a whole number from 1"),
        ({"chunk_size": -1}, "chunk_size is -1"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"activation": "softmax"}, "activation is 'softmax'. Expected one of: gelu, gelu_new"),
        ({"selection": "product"}, "selection is 'product' for a plain .* Expected one of: score, abs_act"),
    ],
)
def test_invalid_settings_are_refused_by_value(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_plain(weights(), **{"k": 4, "activation": "relu", **setting})
    if "selection" not in setting:
        with pytest.raises(ConfigError, match=message):
            run_gated(weights(), **{"k": 4, "activation": "relu", **setting})
