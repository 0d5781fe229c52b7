"""Causal linear attention on tensors: chunked and recurrent forms against the literal definition."""

import itertools

import pytest
import torch

from graftwork.methods.cald import reference
from graftwork.methods.cald.causal import FeatureMaps, causal_attention

HEADS, GROUPS, TOKENS, WIDTH = 4, 2, 11, 6
KINDS = ("elu", "softmax", "gated")
SCALE = 0.4


def inputs(dtype=torch.float64, seed=0, tokens=TOKENS):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, HEADS, tokens, WIDTH), (2, GROUPS, tokens, WIDTH), (2, GROUPS, tokens, WIDTH))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def feature_maps(kind, window, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        return 0.7 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    learned = kind != "elu"
    return FeatureMaps(
        draw(HEADS, WIDTH, WIDTH) if learned else None,
        draw(GROUPS, WIDTH, WIDTH) if learned else None,
        draw(GROUPS, WIDTH) if kind == "gated" else None,
        draw(GROUPS) + 1 if kind == "gated" else None,
        draw(HEADS) if window else None,
    )


def expected(query, key, value, real, maps, window):
    """The literal definition, one row and head after another."""

    def one(row, head):
        group = head * GROUPS // HEADS
        return reference.linear_attention(
            query[row, head],
            key[row, group],
            value[row, group],
            real[row],
            scale=SCALE,
            window=window or 0,
            w_q=None if maps.query is None else maps.query[head],
            w_k=None if maps.key is None else maps.key[group],
            gate=None if maps.gate is None else (maps.gate[group], maps.gate_bias[group]),
            balance=None if maps.balance is None else maps.balance[head],
        )

    return torch.stack([torch.stack([one(row, head) for head in range(HEADS)]) for row in range(len(query))])


def with_holes():
    real = torch.ones(2, TOKENS, dtype=torch.bool)
    real[0, :3] = False
    real[1, 5] = real[1, 9:] = False
    return real


@pytest.mark.parametrize(("kind", "window"), list(itertools.product(KINDS, (None, 1, 3, 20))))
def test_every_chunk_size_and_the_recurrent_form_equal_the_definition(kind, window):
    query, key, value = inputs()
    real, maps = with_holes(), feature_maps(kind, window)
    wanted = expected(query, key, value, real, maps, window)
    options = {"scale": SCALE, "window": window}
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        q, k, v = (each.to(dtype) for each in (query, key, value))
        own = feature_maps(kind, window, dtype)
        for chunk in (1, 2, 5, 64):
            found, _ = causal_attention(q, k, v, own, padding=real, chunk=chunk, **options)
            found = found * real[:, None, :, None]
            torch.testing.assert_close(found, wanted.to(dtype), rtol=tolerance, atol=tolerance)
        state, parts = None, []
        for start, stop in ((0, 4), (4, 5), (5, 6), (6, 11)):
            part = slice(start, stop)
            part_real = real[:, part]
            found, state = causal_attention(
                q[:, :, part], k[:, :, part], v[:, :, part], own, padding=part_real, state=state, **options
            )
            parts.append(found * part_real[:, None, :, None])
        torch.testing.assert_close(torch.cat(parts, 2), wanted.to(dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_the_definition(kind):
    real, window = with_holes(), 3
    maps = feature_maps(kind, window)
    learned = [each for each in (maps.query, maps.key, maps.gate, maps.gate_bias, maps.balance) if each is not None]
    leaves = [each.requires_grad_() for each in (*inputs(), *learned)]
    weight = torch.randn(2, HEADS, TOKENS, WIDTH, dtype=torch.float64) * real[:, None, :, None]
    wanted = torch.autograd.grad((expected(*leaves[:3], real, maps, window) * weight).sum(), leaves)
    found, _ = causal_attention(*leaves[:3], maps, scale=SCALE, window=window, padding=real, chunk=4)
    for mine, theirs in zip(torch.autograd.grad((found * weight).sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("kind", "window"), list(itertools.product(KINDS, (None, 3))))
def test_packed_sequences_equal_separate_ones(kind, window):
    query, key, value = inputs()
    maps, whole = feature_maps(kind, window), torch.ones(2, TOKENS, dtype=torch.bool)
    bounds = ((0, 5), (5, 7), (7, TOKENS))
    segments = torch.tensor([[0] * 5 + [1] * 2 + [2] * 4] * 2)
    separate = [
        expected(*(each[:, :, start:stop] for each in (query, key, value)), whole[:, start:stop], maps, window)
        for start, stop in bounds
    ]
    for chunk in (1, 3, 4, 64):
        found, _ = causal_attention(query, key, value, maps, scale=SCALE, window=window, segments=segments, chunk=chunk)
        torch.testing.assert_close(found, torch.cat(separate, 2), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_has_the_error_of_its_inputs_only(kind):
    # large scores, and sums over many tokens
    query, key, value = (each.to(torch.bfloat16) for each in inputs(tokens=700))
    query = query * 20
    maps = feature_maps(kind, 8, torch.float32)
    names = ("query", "key", "gate", "gate_bias", "balance")
    wide = {name: None if (each := getattr(maps, name)) is None else each.double() for name in names}
    exact, _ = causal_attention(
        query.double(), key.double(), value.double(), FeatureMaps(**wide), scale=SCALE, window=8
    )
    found, state = causal_attention(query, key, value, maps, scale=SCALE, window=8)
    assert found.dtype == torch.bfloat16
    assert state.sums.dtype == torch.float32
    # one rounding to bfloat16, of 8 bits
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=2e-3)


def test_the_state_has_the_same_size_after_every_number_of_tokens():
    maps, sizes = feature_maps("softmax", 4), set()
    for tokens in (1, 3, 50):
        _, state = causal_attention(*inputs(tokens=tokens), maps, scale=SCALE, window=4)
        sizes.add(tuple(each.shape for each in state.tensors()))
    assert sizes == {((2, GROUPS, 2 * WIDTH, WIDTH), (2, GROUPS, 2 * WIDTH), *[(2, GROUPS, 3, WIDTH)] * 2, (2, 3))}


def test_a_window_as_long_as_the_text_is_softmax_attention():
    query, key, value = inputs()
    found, _ = causal_attention(query, key, value, feature_maps("softmax", TOKENS), scale=SCALE, window=TOKENS)
    dense = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=SCALE, enable_gqa=True
    )
    torch.testing.assert_close(found, dense, rtol=1e-10, atol=1e-10)
