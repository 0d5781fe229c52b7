"""Sampled tokens have the probabilities of transformers, and rows of a batch are independent."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from scipy.stats import chisquare
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from graftwork.errors import ConfigError
from graftwork.evaluation.sampling import Sampling, TokenSampler, derive_seed, top_k_filter, top_p_filter
from graftwork.methods.regrad import ReGrad
from graftwork.methods.regrad.answering.answerer import Answerer
from graftwork.methods.regrad.text.requests import Question
from regrad_engine import adapted_decoder


@pytest.fixture(scope="module")
def answerer():
    converted = adapted_decoder()
    config = converted.methods[-1].config
    return Answerer(converted.model, converted.tokenizer, config=config)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8), (1.0, 0.3)])
def test_samples_have_the_probabilities_of_transformers(temperature, top_p):
    scores = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 2
    warped = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(temperature)(None, scores))  # type: ignore[arg-type]
    expected = warped.softmax(-1)[0]
    count = 20_000
    sampler = TokenSampler([Sampling(temperature, top_p, seed=1)])
    found = Counter(int(sampler(scores, scores).argmax()) for _ in range(count))
    possible = expected.nonzero().flatten().tolist()
    assert set(found) <= set(possible)
    if len(possible) > 1:
        frequencies = expected[possible].double() / expected[possible].double().sum() * count
        assert chisquare([found[token] for token in possible], frequencies.numpy()).pvalue > 1e-3


def test_top_p_filter_equals_transformers():
    for seed in range(50):
        draw = torch.Generator().manual_seed(seed)
        logits, share = torch.randn(40, generator=draw), float(torch.rand((), generator=draw).clamp_min(1e-3))
        expected = TopPLogitsWarper(share)(None, logits[None])[0]  # type: ignore[arg-type]
        assert torch.equal(top_p_filter(logits, share), expected)


def test_top_k_filter_equals_transformers_and_keeps_k_of_equal_logits():
    for seed, k in enumerate([1, 2, 7, 40, 50]):
        logits = torch.randn(40, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(top_k_filter(logits, k), TopKLogitsWarper(k)(None, logits[None])[0])  # type: ignore[arg-type]
    assert top_k_filter(torch.zeros(5), 2).isfinite().tolist() == [True, True, False, False, False]


def test_sampled_tokens_are_among_the_top_k():
    scores = torch.arange(6.0)[None]
    sampler = TokenSampler([Sampling(5.0, seed=1, top_k=2)])
    assert {int(sampler(scores, scores).argmax()) for _ in range(60)} == {4, 5}


def test_sampled_rows_are_independent_of_the_batch(answerer):
    questions = [
        Question(
            "who is the baker ?" + " now" * (number % 3),
            (),
            strength=0.0,
            sampling=None if number % 4 == 0 else Sampling(1.0 + number % 3, seed=number % 5),
        )
        for number in range(24)
    ]
    together = answerer.answer(questions, max_new_tokens=8)
    alone = [answerer.answer([one], max_new_tokens=8)[0] for one in questions]
    assert [one.generated for one in together] == [one.generated for one in alone]
    assert [one.seed for one in together] == [None if one.sampling is None else one.sampling.seed for one in questions]
    assert len({one.generated for one in together[1:4]}) == 3


def test_derived_seeds_depend_on_seed_and_name():
    assert derive_seed(0, "a") == derive_seed(0, "a") != derive_seed(0, "b") != derive_seed(1, "b")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": 1.0, "seed": -1}, "seed is -1"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0"),
    ],
)
def test_invalid_sampling_raises(settings, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize(
    ("settings", "message"), [({"temperature": -1.0}, "temperature is -1"), ({"top_p": 2.0}, "top_p")]
)
def test_invalid_sampling_settings_raise(settings, message):
    with pytest.raises(ConfigError, match=message):
        ReGrad(**settings)
