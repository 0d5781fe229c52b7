"""Precision and size of stored gradients, compared with torch and the published models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graftwork.errors import ConfigError
from graftwork.methods.regrad.bank.layout import Layout, decode, encode, stride

GRADIENT = np.random.default_rng(0).standard_t(3, 8496).astype(np.float32) * 1e-6


@pytest.mark.parametrize(("precision", "bound"), [("float32", 0.0), ("bfloat16", 3e-3), ("int8", 2e-2)])
def test_round_trip_error_is_bounded(precision, bound):
    data, scale = encode(GRADIENT, precision)
    assert len(data) == stride(GRADIENT.size, precision)
    error = np.linalg.norm(decode(data, GRADIENT.size, precision, scale) - GRADIENT) / np.linalg.norm(GRADIENT)
    assert error <= bound


def test_bfloat16_rounding_equals_torch():
    odd = np.array([0.0, -0.0, 1.00390625, 1.01171875, 3.4e38, 1e-40, np.inf, -np.inf], np.float32)
    values = np.concatenate([odd, GRADIENT])
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    data, scale = encode(values, "bfloat16")
    assert np.array_equal(decode(data, values.size, "bfloat16", scale), expected)
    assert np.isnan(decode(encode(np.array([np.nan], np.float32), "bfloat16")[0], 1, "bfloat16", 1.0))


def test_int8_handles_zeros_and_blocks_of_different_magnitude():
    values = np.zeros(300, np.float32)
    assert np.array_equal(decode(*_with_size(values)), values)
    values[:128], values[128:] = 1e-9, 1e-6
    back = decode(*_with_size(values))
    assert np.allclose(back, values, rtol=1e-2)


def _with_size(values):
    data, scale = encode(values, "int8")
    return data, values.size, "int8", scale


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        ((2048, 8192, 8, 16), (15_728_640, 7_864_320, 3_993_600)),
        ((3072, 8192, 14, 8), (15_138_816, 7_569_408, 3_843_840)),
        ((4096, 14336, 16, 4), (14_155_776, 7_077_888, 3_594_240)),
    ],
    ids=["1B", "3B", "8B"],
)
def test_record_sizes_of_the_published_models(model, sizes):
    hidden, intermediate, layers, rank = model
    shapes = []
    for layer in range(layers):
        for name, inner, outer in (
            ("gate", hidden, intermediate),
            ("up", hidden, intermediate),
            ("down", intermediate, hidden),
        ):
            shapes += [(f"{layer}.{name}.A", (rank, inner)), (f"{layer}.{name}.B", (outer, rank))]
    size = Layout.of(shapes).size
    assert tuple(stride(size, precision) for precision in ("float32", "bfloat16", "int8")) == sizes


def test_layout_orders_and_validates_tensors():
    layout = Layout.of([("a", (2, 3)), ("b", (4,))])
    tensors = {"b": np.arange(6, 10), "a": np.arange(6).reshape(2, 3)}
    flat = layout.flatten(tensors)
    assert flat.tolist() == list(range(10))
    views = layout.split(torch.from_numpy(np.stack([flat, flat])))
    assert views["a"].shape == (2, 2, 3)
    assert views["b"][1].tolist() == [6, 7, 8, 9]
    for wrong, message in (
        ({"a": tensors["a"]}, "no tensor 'b'"),
        ({**tensors, "c": tensors["b"]}, "unknown tensor 'c'"),
        ({**tensors, "b": np.zeros(3)}, r"shape \(3,\); expected \(4,\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            layout.flatten(wrong)
