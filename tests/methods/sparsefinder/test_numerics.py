"""Numerics: half precision beside SDPA, large and shifted scores, every α with its gradients, second derivatives."""

import math
import warnings

import entmax as package
import pytest
import torch
from torch.nn import functional as F

from graftwork.errors import ConfigError
from graftwork.grafting.conversion import convert
from graftwork.methods.sparsefinder import Sparsefinder
from graftwork.methods.sparsefinder.buckets import distances
from graftwork.methods.sparsefinder.entmax import entmax, entmax15_threshold, support15
from graftwork.methods.sparsefinder.executors import gathered_attention, masked_attention, sparse_attention
from graftwork.methods.sparsefinder.graphs import Graph, Pattern, gold_edges
from graftwork.surgery.masks import LazyMask
from tiny_models import tiny_model

ALPHAS = [1.0, 1.01, 1.1, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def exact(scores, alpha):
    """Probabilities in float64 by the package, independent of the solver here."""
    precise = scores.double()
    if alpha == 1.0:
        return torch.softmax(precise, -1)
    if alpha == 1.5:
        # float64 sort of shifted rows
        return package.entmax15(precise - precise.amax(-1, keepdim=True), dim=-1)
    return package.entmax_bisect(precise - precise.amax(-1, keepdim=True), alpha, dim=-1, n_iter=100)


def at_level(level, dtype, seed=0):
    """Queries, keys and values [1 4 70 64] whose scores, scaled by 1/8, are about `level`."""
    query, key, value = (normal(1, 4, 70, 64, seed=seed + number) for number in range(3))
    query[..., 0] = key[..., 0] = math.sqrt(level * 8)
    return [x.to(dtype) for x in (query, key, value)]


ALL_PAIRS = Graph(4, LazyMask(1, 70, 70), pattern=Pattern(window=139))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("level", [0.0, 30.0, 300.0, 3000.0])
def test_half_precision_is_as_near_to_float64_as_sdpa(dtype, level):
    query, key, value = at_level(level, dtype)
    scores = (query.double() @ key.double().mT) / 8
    softmax = torch.softmax(scores, -1) @ value.double()
    fused = float((F.scaled_dot_product_attention(query, key, value) - softmax).abs().max())
    for alpha in (1.0, 1.5, 2.0):
        expected = exact(scores, alpha) @ value.double()
        # the error of the exact result in this type: entmax outputs are larger than softmax outputs
        rounding = float((expected.to(dtype).double() - expected).abs().max())
        for executor in ("dense", "blocks") if alpha == 2.0 else ("dense", "blocks", "flex"):
            with torch.no_grad():
                found = sparse_attention(
                    query, key, value, ALL_PAIRS, scale=0.125, alpha=alpha, executor=executor, block_size=16
                )
            assert found.dtype == dtype
            error = float((found.double() - expected).abs().max())
            assert error <= 2 * (fused if alpha == 1.0 else max(fused, rounding)), (executor, alpha, error, fused)


def test_half_precision_gradients_are_rounded_once():
    query, key, value = at_level(300.0, torch.bfloat16)
    upstream = normal(1, 4, 70, 64, seed=9)
    gradients = []
    for dtype, run in (
        (torch.float64, lambda *given: masked_attention(*given, ALL_PAIRS, scale=0.125)),
        (torch.bfloat16, lambda *given: masked_attention(*given, ALL_PAIRS, scale=0.125)),
        (torch.bfloat16, lambda *given: gathered_attention(*given, ALL_PAIRS, scale=0.125, size=16)),
    ):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (query, key, value)]
        run(*leaves).backward(upstream.bfloat16().to(dtype))
        gradients.append([leaf.grad.double() for leaf in leaves])
    for found in gradients[1:]:
        for one, expected in zip(found, gradients[0], strict=True):
            assert float((one - expected).abs().max()) <= 2**-7 * float(expected.abs().max())


def test_gold_edges_of_half_precision_are_those_of_float64():
    query, key, _ = at_level(300.0, torch.bfloat16)
    expected = exact((query.double() @ key.double().mT) / 8, 1.5)
    found = gold_edges(query, key, ALL_PAIRS.mask, scale=0.125)
    assert not ((found != (expected > 0)) & (expected - 1e-8 > 0)).any()
    assert torch.equal(found, entmax((query.float() @ (key.float() - key.float().mean(2, keepdim=True)).mT) / 8) > 0)


def test_distances_of_near_vectors_survive_half_precision():
    query = (10 + normal(1, 1, 6, 4)).bfloat16()
    found = distances(query, query, "l2")
    expected = torch.cdist(query.double(), query.double()).square()
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("keys", [8, 64, 2048, 8192])
def test_rows_sum_to_one_with_the_support_of_float64_at_any_offset_and_scale(keys):
    for offset in (0.0, 1e2, 1e4, 1e6):
        for scale in (1e-6, 0.01, 1.0, 3.0, 100.0, 1e10):
            scores = normal(8 if keys == 8192 else 32, keys) * scale + offset
            found, expected = entmax(scores).double(), exact(scores, 1.5)
            assert float((found.sum(-1) - 1).abs().max()) < 1e-6
            torch.testing.assert_close(found, expected, rtol=0, atol=5e-7)
            assert not ((found > 0) != (expected > 0))[(expected - 1e-12).abs() > 1e-12].any()
            assert torch.equal(support15(scores), found > 0)


def test_one_large_root_beside_thousands_of_small_ones_sums_to_one():
    scores = torch.full((4, 8192), -1.4)
    scores[:, 0] = 0.0
    scores += torch.arange(4)[:, None] * 0.01 + normal(4, 8192) * 1e-3
    found = entmax(scores).double()
    assert int((found > 0).sum()) > 8192
    assert float((found.sum(-1) - 1).abs().max()) < 1e-6


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_alpha_is_as_accurate_as_the_package(alpha, dtype):
    for keys, scale in ((7, 1.0), (64, 3.0), (512, 1.0), (300, 30.0), (300, 1e10)):
        scores = normal(16, keys) * scale
        scores[3, keys // 2 :] = -torch.inf
        scores[4] = -torch.inf
        scores, full = scores.to(dtype), scores[:3].to(dtype)
        expected, found = exact(full, alpha), entmax(scores, alpha)
        limit = 3e-7 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(found[:3].double(), expected, rtol=0, atol=limit)
        kept = exact(scores[3, : keys // 2], alpha)
        torch.testing.assert_close(found[3, : keys // 2].double(), kept, rtol=0, atol=limit)
        assert not found[3, keys // 2 :].any()
        assert not found[4].any()
        assert float((found.sum(-1).double() - 1)[torch.arange(16) != 4].abs().max()) < 1e-6
        if alpha <= 2:
            by_tensor = entmax(scores, torch.full((16, 1), alpha))
            torch.testing.assert_close(by_tensor.double(), found.double(), rtol=0, atol=4e-7)


@pytest.mark.parametrize("alpha", [0.5, 3.5, float("nan")])
def test_alphas_that_no_type_resolves_are_refused(alpha):
    with pytest.raises(ConfigError, match=r"Expected a number between 1 \(softmax\) and 3"):
        entmax(torch.zeros(2, 3), alpha)


def test_the_threshold_belongs_to_the_weights():
    scores = normal(3, 40) * 3 + 1e4
    scores[2] = -torch.inf
    top, threshold = entmax15_threshold(scores)
    torch.testing.assert_close(
        (scores - top - threshold).relu()[:2].square() / 4, entmax(scores)[:2], rtol=0, atol=1e-6
    )
    assert float(threshold[2]) == math.inf


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_a_learned_alpha_is_finite_at_its_bounds(alpha):
    scores = normal(2, 300) * 10
    scores[0, 5:] = -torch.inf
    bound = torch.full((2, 1), alpha, requires_grad=True)
    scores.requires_grad_()
    found = entmax(scores, bound)
    weights = torch.arange(300.0)
    (found * weights).sum().backward()
    torch.testing.assert_close(found.detach(), entmax(scores.detach(), alpha), rtol=0, atol=2e-7)
    assert scores.grad.isfinite().all()
    # one-sided difference from inside the interval, in float64
    step = 1e-6 if alpha == 1.0 else -1e-6
    ends = [entmax(scores.detach().double(), alpha + move).double() @ weights.double() for move in (0.0, step)]
    difference = (ends[1] - ends[0]) / step
    torch.testing.assert_close(bound.grad[:, 0].double(), difference, rtol=1e-3, atol=1e-3)


def test_a_learned_alpha_of_a_model_is_finite_far_beyond_its_start():
    model = convert(tiny_model("bert"), Sparsefinder(learnable_alpha=True)).model.float().train()
    from graftwork.methods.sparsefinder.modules import sparsefinder_modules

    ids = torch.arange(3, 15)[None]
    for logit in (-1e4, -20.0, 20.0, 1e4):
        for graft in sparsefinder_modules(model).values():
            torch.nn.init.constant_(graft.alpha_logit, logit)
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("alpha", [1.0, 1.2, 1.5, 2.0, 2.5])
def test_second_derivatives_are_those_of_finite_differences(alpha):
    for keys in (9, 20):
        scores = normal(2, keys, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradgradcheck(lambda z: entmax(z, alpha), scores)


def test_second_derivatives_of_a_learned_alpha():
    scores = normal(2, 9, dtype=torch.float64).requires_grad_()
    alpha = torch.tensor([[1.05], [1.7]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(entmax, (scores, alpha))
    assert torch.autograd.gradgradcheck(entmax, (scores, alpha))


@pytest.mark.parametrize("executor", ["dense", "blocks"])
@pytest.mark.parametrize("alpha", [1.3, 1.5])
def test_hessian_vector_products_through_a_model(executor, alpha):
    method = Sparsefinder(
        alpha=alpha, grouping="window", window_size=7, executor=executor, attention_block_size=4, add_cls_mask=True
    )
    model = convert(tiny_model("bert"), method).model
    ids = torch.arange(3, 17)[None]
    weight = next(p for name, p in model.named_parameters() if name.endswith("layer.0.attention.self.query.weight"))
    direction = normal(*weight.shape, dtype=torch.float64)

    def gradient(create_graph=False):
        (found,) = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, weight, create_graph=create_graph)
        return found

    (found,) = torch.autograd.grad((gradient(create_graph=True) * direction).sum(), weight)
    step, ends = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
        ends.append(gradient())
        with torch.no_grad():
            weight -= sign * step * direction
    expected = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_second_derivatives_of_half_precision_scores():
    leaves = [x[:, :1, :9, :8].clone().requires_grad_() for x in at_level(1.0, torch.bfloat16)]
    precise = [x.detach().double().requires_grad_() for x in leaves]
    found = []
    for query, key, value in (leaves, precise):
        output = masked_attention(query, key, value, None, scale=0.3)
        (gradient,) = torch.autograd.grad(output.double().square().sum(), query, create_graph=True)
        found.append(torch.autograd.grad(gradient.double().square().sum(), [key, value]))
    for half, expected in zip(*found, strict=True):
        assert float((half.double() - expected).abs().max()) < 0.05 * float(expected.abs().max())


@pytest.mark.parametrize("alpha", [1.5, *(pytest.param(alpha, marks=pytest.mark.long) for alpha in (1.3, 2.0))])
def test_entmax_compiles_as_one_graph(alpha):
    compiled = torch.compile(lambda z: entmax(z, alpha), fullgraph=True, backend="aot_eager")
    scores = (normal(4, 40) * 3).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = compiled(scores)
        (gradient,) = torch.autograd.grad(found.square().sum(), scores)
    expected = entmax(scores, alpha)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), scores)[0], rtol=0, atol=1e-6)
