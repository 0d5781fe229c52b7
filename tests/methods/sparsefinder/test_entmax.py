"""Acceptance cases 1 to 3: values of 1.5-entmax, empty rows, sparse consistency, the gold graph by hand."""

import entmax as package
import pytest
import torch

from graftwork.methods.sparsefinder import reference
from graftwork.methods.sparsefinder.entmax import entmax
from graftwork.methods.sparsefinder.graphs import gold_edges
from graftwork.surgery.masks import LazyMask

# section 3.1 of the specification
VALUES = [
    ((-2.0, 0.0, 0.5), (0.0, 0.326007, 0.673993)),
    ((1.3, 20.0, 19.5, 1.0), (0.0, 0.673993, 0.326007, 0.0)),
    ((2.0, 1.0, 0.0), (0.830719, 0.169281, 0.0)),
]


@pytest.mark.parametrize("solver", ["sort", "newton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("scores", "expected"), VALUES)
def test_values_are_those_of_the_specification(scores, expected, dtype, solver):
    found = entmax(torch.tensor(scores, dtype=dtype), solver=solver)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=dtype), rtol=0, atol=1e-6)


@pytest.mark.parametrize("gap", [0.0, 0.5, 1.9, 2.0, 3.0])
def test_two_scores_share_as_the_closed_form_says(gap):
    smaller = (((2 - gap**2 / 4) ** 0.5 - gap / 2) / 2) ** 2 if gap < 2 else 0.0
    assert float(entmax(torch.tensor([gap, 0.0], dtype=torch.float64))[1]) == pytest.approx(smaller, abs=1e-12)


@pytest.mark.parametrize("solver", ["newton", "partial"])
@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0, 3.0])
def test_solvers_agree_with_the_package_on_long_rows(scale, solver):
    scores = torch.randn(16, 2048, generator=torch.Generator().manual_seed(0)) * scale
    expected = package.entmax15(scores.double(), -1)
    torch.testing.assert_close(entmax(scores, solver=solver).double(), expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_every_alpha_agrees_with_the_reference_and_empty_rows_are_zero(alpha):
    scores = torch.randn(4, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scores[1, 3:] = -torch.inf
    scores[2] = -torch.inf
    scores.requires_grad_()
    found = entmax(scores, alpha)
    expected = torch.stack([reference.entmax(row, alpha) for row in scores.detach()])
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-7)
    assert not found[2].any()
    found.square().sum().backward()
    assert scores.grad.isfinite().all()
    assert not scores.grad[2].any()


def test_a_learned_alpha_has_the_gradient_of_finite_differences():
    scores = torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    alpha = torch.tensor([[1.3], [1.5], [1.8]], dtype=torch.float64, requires_grad=True)
    weights = torch.arange(6, dtype=torch.float64)
    (entmax(scores, alpha) @ weights).sum().backward()
    step = 1e-5
    for row in range(3):
        value = float(alpha.detach()[row])
        high, low = (reference.entmax(scores[row], value + sign * step) @ weights for sign in (1, -1))
        assert float(alpha.grad[row]) == pytest.approx(float(high - low) / (2 * step), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("solver", ["sort", "newton"])
def test_gradients_are_those_of_finite_differences(solver):
    scores = 3 * torch.randn(3, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: entmax(z, solver=solver), scores.requires_grad_())


@pytest.mark.parametrize(("solver", "keys"), [("sort", 20), ("newton", 20), ("partial", 80)])
def test_removing_scores_outside_the_support_changes_no_bit(solver, keys):
    generator = torch.Generator().manual_seed(4)
    scores = 3 * torch.randn(500, keys, generator=generator)
    whole = entmax(scores, solver=solver)
    kept = (whole > 0) | (torch.rand(500, keys, generator=generator) < 0.3)
    assert torch.equal(entmax(scores.masked_fill(~kept, -torch.inf), solver=solver), whole)


def test_gold_graph_by_hand():
    tokens = torch.tensor([[2.0, 0.0], [0.0, 2.0]])[None, None]
    mask = LazyMask(1, 2, 2)
    identity = torch.eye(2, dtype=torch.bool)[None, None]
    assert torch.equal(gold_edges(tokens, tokens, mask, scale=2**-0.5), identity)
    assert gold_edges(tokens, tokens / 2, mask, scale=2**-0.5).all()
    weights = entmax((tokens @ (tokens / 2).mT) * 2**-0.5)[0, 0, 0]
    torch.testing.assert_close(weights, torch.tensor([0.933013, 0.066987]), rtol=0, atol=1e-6)
    # queries divided by √width, as fairseq stores them, and multiplied back
    assert torch.equal(gold_edges(tokens / 2**0.5 * 2**0.5, tokens, mask, scale=2**-0.5), identity)
