"""Both forms of Linformer attention against the reference implementation and the numbers of the specification."""

import itertools

import pytest
import torch

from graftwork.errors import ConfigError
from graftwork.methods.cald import reference
from graftwork.methods.cald.functional import (
    SlotRule,
    compressed_attention,
    feature_map_attention,
    projected_attention,
)

HIDDEN, HEADS, POSITIONS, RANK = 6, 2, 9, 4
ROWS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
E = torch.tensor([[1.0, 0], [0, 1], [1, 1], [5, 5]])
F = torch.tensor([[1.0, 0], [0, 2], [1, -1], [5, 5]])
KEY_BIAS, VALUE_BIAS = torch.tensor([0.5, -0.5]), torch.tensor([1.0, 2.0])
MASK = torch.tensor([[True, True, False]])
ZERO = torch.zeros(2)
# acceptance cases 1 and 2 of the specification
GOLDEN = {
    "plain": (None, ZERO, ZERO, [(0.463037, 0.577350), (0.114313, 0.577350), (0.288675, 0.577350)]),
    "padded": (MASK, ZERO, ZERO, [(0.440145, 0.533923), (0.266962, 0.880290), (0.353553, 0.707107)]),
    "biased": (
        None,
        KEY_BIAS,
        VALUE_BIAS,
        [(1.387183, 2.425642), (0.922218, 2.193160), (1.154701, 2.309401)],
    ),
    "both": (
        MASK,
        KEY_BIAS,
        VALUE_BIAS,
        [(1.414214, 2.482060), (1.414214, 3.174794), (1.414214, 2.828427)],
    ),
}


def attend(form, h, weights, matrices, heads, **options):
    """Run one form of the attention.

    Args:
        form: "projected" or "compressed".
        h: Input of the layer [batch tokens hidden].
        weights: "query", "key" and "value" to (matrix, bias).
        matrices: Compression matrices of keys and values.
        heads: Number of heads.
        options: Further arguments of the attention function.
    """
    split = lambda x: x.unflatten(-1, (heads, -1)).transpose(1, 2)  # noqa: E731
    project = {name: h @ matrix.T + bias for name, (matrix, bias) in weights.items()}
    scale = split(project["query"]).shape[-1] ** -0.5
    if form == "projected":
        output = projected_attention(*map(split, project.values()), *matrices, scale=scale, **options)
    else:
        parts = [lambda x, pair=weights[name]: (x @ pair[0].T, pair[1]) for name in ("key", "value")]
        output = compressed_attention(split(project["query"]), h, *parts, *matrices, scale=scale, **options)
    return output.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("form", ["projected", "compressed"])
@pytest.mark.parametrize("name", GOLDEN)
def test_both_forms_reproduce_the_numbers_of_the_specification(form, name):
    padding, key_bias, value_bias, expected = GOLDEN[name]
    eye = torch.eye(2)
    weights = {"query": (eye, ZERO), "key": (eye, key_bias), "value": (eye, value_bias)}
    found = attend(form, ROWS[None], weights, (E, F), 1, padding=padding)[0]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)
    mask = torch.ones(3, dtype=torch.bool) if padding is None else padding[0]
    literal = reference.attention(ROWS, weights, E, F, mask, 1)
    torch.testing.assert_close(literal, torch.tensor(expected), rtol=0, atol=1e-6)


def random_weights(generator):
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return {name: (draw(HIDDEN, HIDDEN) / 2, draw(HIDDEN)) for name in ("query", "key", "value")}


PADDINGS = {
    "none": None,
    "right": [[1] * 7, [1] * 4 + [0] * 3, [1, 0, 0, 0, 0, 0, 0]],
    "left": [[0] * 2 + [1] * 5, [1] * 7, [0] * 6 + [1]],
    "holes": [[1, 0, 1, 1, 0, 0, 1], [0, 1, 0, 1, 1, 0, 0], [1] * 7],
    "an empty row": [[1] * 7, [0] * 7, [1, 1, 0, 0, 0, 0, 0]],
}
SHARES = ["none", "kv", "head"]
RULES = ["inv_sqrt", "none", "slot_mean"]


@pytest.mark.parametrize(("share", "padding", "rule"), list(itertools.product(SHARES, PADDINGS, RULES)))
def test_both_forms_equal_the_reference_in_values_and_gradients(share, padding, rule):
    generator = torch.Generator().manual_seed(0)
    weights = random_weights(generator)
    h = torch.randn(3, 7, HIDDEN, generator=generator, dtype=torch.float64)
    shape = (HEADS, POSITIONS, RANK) if share == "head" else (POSITIONS, RANK)
    first = torch.randn(shape, generator=generator, dtype=torch.float64)
    second = first if share == "kv" else torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = None if PADDINGS[padding] is None else torch.tensor(PADDINGS[padding]).bool()
    slots = torch.arange(POSITIONS) * RANK // POSITIONS if rule == "slot_mean" else None
    upstream = torch.randn(3, 7, HIDDEN, generator=generator, dtype=torch.float64)

    def run(compute):
        leaves = [h, first, *([] if second is first else [second]), *(t for pair in weights.values() for t in pair)]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        x, a, *rest = leaves
        b = a if second is first else rest.pop(0)
        own = dict(zip(weights, zip(rest[::2], rest[1::2], strict=True), strict=True))
        output = compute(x, own, (a, b))
        (output * upstream).sum().backward()
        return [output.detach(), *(leaf.grad for leaf in leaves)]

    def literal(x, own, matrices):
        masks = torch.ones(3, 7, dtype=torch.bool) if mask is None else mask
        rows = [
            reference.attention(x[i], own, *matrices, masks[i], HEADS, rule, slots, slots is not None) for i in range(3)
        ]
        return torch.stack(rows)

    expected = run(literal)
    options = {"padding": mask, "rule": SlotRule(rule, slots, slots is not None)}
    for form in ("projected",) if share == "head" else ("projected", "compressed"):
        found = run(lambda x, own, matrices, form=form: attend(form, x, own, matrices, HEADS, **options))
        for one, other in zip(found, expected, strict=True):
            assert one.isfinite().all()
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", ["projected", "compressed"])
def test_a_scaled_identity_is_dense_attention_and_the_length_rule_is_applied(form):
    generator = torch.Generator().manual_seed(1)
    weights = random_weights(generator)
    h = torch.randn(2, 12, HIDDEN, generator=generator, dtype=torch.float64)
    split = lambda x: x.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # noqa: E731
    q, k, v = (split(h @ matrix.T + bias) for matrix, bias in weights.values())
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    eye = torch.eye(12, dtype=torch.float64)
    found = attend(form, h, weights, (12**0.5 * eye,) * 2, HEADS)
    torch.testing.assert_close(found, dense, rtol=1e-9, atol=1e-9)
    # with zero queries all slots have equal weights, so a missing √L changes only the values
    still = {**weights, "query": (torch.zeros(HIDDEN, HIDDEN).double(), torch.zeros(HIDDEN).double())}
    mean = (h @ weights["value"][0].T + weights["value"][1]).mean(1, keepdim=True).expand(-1, 12, -1)
    torch.testing.assert_close(attend(form, h, still, (eye, eye), HEADS), mean / 12**0.5, rtol=1e-9, atol=1e-9)


def test_one_slot_gives_every_token_the_same_weighted_sum():
    generator = torch.Generator().manual_seed(2)
    weights = random_weights(generator)
    h = torch.randn(1, 5, HIDDEN, generator=generator, dtype=torch.float64)
    matrix = torch.randn(5, 1, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False, False]])
    value = h @ weights["value"][0].T + weights["value"][1]
    expected = (value[0, :3] * matrix[:3]).sum(0) / 3**0.5
    found = attend("compressed", h, weights, (matrix, matrix), HEADS, padding=mask)
    torch.testing.assert_close(found[0], expected.expand(5, -1), rtol=1e-9, atol=1e-9)


def long_call(form, tokens, on_long, padding=None, share="none", rule=None):
    """Run one form on random inputs of any length.

    Args:
        form: "projected" or "compressed".
        tokens: Sequence length.
        on_long: Handling of sequences longer than `POSITIONS`.
        padding: Mask of real tokens [batch tokens].
        share: "none" or "head".
        rule: Length rule.

    Returns:
        The output, and the inputs.
    """
    generator = torch.Generator().manual_seed(3)
    weights = random_weights(generator)
    shape = (HEADS, POSITIONS, RANK) if share == "head" else (POSITIONS, RANK)
    matrices = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    h = torch.randn(2, tokens, HIDDEN, generator=generator, dtype=torch.float64)
    return attend(form, h, weights, matrices, HEADS, padding=padding, on_long=on_long, rule=rule), (
        h,
        weights,
        matrices,
    )


@pytest.mark.parametrize("form", ["projected", "compressed"])
def test_sequences_longer_than_the_positions_are_refused_by_number(form):
    for tokens in (1, POSITIONS):
        assert long_call(form, tokens, "error")[0].isfinite().all()
    with pytest.raises(ConfigError, match=r"sequence of 10 tokens\. Expected at most 9"):
        long_call(form, POSITIONS + 1, "error")


@pytest.mark.parametrize("form", ["projected", "compressed"])
def test_truncation_ignores_the_keys_beyond(form):
    found, (h, weights, matrices) = long_call(form, 12, "truncate")
    mask = torch.arange(12).expand(2, -1) < POSITIONS
    padded = [torch.cat([matrix, torch.zeros(3, RANK).double()]) for matrix in matrices]
    expected = attend(form, h, weights, padded, HEADS, padding=mask)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", [None, SlotRule("slot_mean", torch.arange(POSITIONS) * RANK // POSITIONS, True)])
@pytest.mark.parametrize("share", ["none", "head"])
def test_interpolation_resamples_the_rows_for_each_sequence_length(share, rule):
    mask = torch.arange(12).expand(2, -1) < torch.tensor([[12], [7]])
    form = "projected"
    found, (h, weights, matrices) = long_call(form, 12, "interpolate", mask, share, rule)
    # the short sequence is not interpolated
    short = attend(form, h[1:, :7], weights, matrices, HEADS, rule=rule)
    torch.testing.assert_close(found[1:, :7], short, rtol=1e-9, atol=1e-9)
    if rule is None:
        stretched = [
            torch.nn.functional.interpolate(
                matrix.mT.reshape(-1, 1, POSITIONS), size=12, mode="linear", align_corners=True
            )
            .reshape(*matrix.shape[:-2], RANK, 12)
            .mT
            for matrix in matrices
        ]
        expected = attend(form, h[:1], weights, stretched, HEADS)
        torch.testing.assert_close(found[:1], expected, rtol=1e-9, atol=1e-9)
    if share == "none":
        other, _ = long_call("compressed", 12, "interpolate", mask, share, rule)
        torch.testing.assert_close(other, found, rtol=1e-9, atol=1e-9)


def test_feature_map_attention_equals_explicit_weights():
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, 2, 6, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.tensor([[True] * 6, [True, False, True, True, False, False]])
    scale = 3**-0.5
    phi = lambda x: torch.where(x > 0, x + 1, x.exp())  # noqa: E731
    weight = phi(q * scale**0.5) @ phi(k * scale**0.5).mT * mask[:, None, None]
    expected = weight / weight.sum(-1, keepdim=True) @ v
    found = feature_map_attention(q, k, v, scale=scale, padding=mask)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    empty = feature_map_attention(q, k, v, scale=scale, padding=torch.zeros_like(mask))
    assert torch.equal(empty, torch.zeros_like(empty))
