"""Soft-capped scores, sinks, and keys that are always kept equal the reference, and the models that use them."""

import pytest
import torch
import transformers

import graftwork as gw
from graftwork.errors import ConfigError, UnsupportedModelError
from graftwork.methods.topk import functional, reference
from graftwork.methods.topk.functional import topk_attention
from graftwork.methods.topk.modules import TopKAttention
from graftwork.surgery.attention import graft_attention
from graftwork.surgery.families import FAMILIES, Family
from graftwork.surgery.masks import LazyMask

PADDING = torch.ones(2, 33, dtype=torch.bool)
PADDING[1, :7] = False
CAUSAL = LazyMask(2, 33, 33, causal=True, padding=PADDING)
ALLOWED = torch.ones(33, 33, dtype=torch.bool).tril() & PADDING[:, None, None, :]


def inputs(heads=4, groups=2, queries=33, keys=33):
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, heads, queries, 5), (2, groups, keys, 5), (2, groups, keys, 7), (heads,))
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def assert_equal(found, expected, leaves):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(4))
    ours = torch.autograd.grad(found, leaves, upstream)
    theirs = torch.autograd.grad(expected, leaves, upstream)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def always(first, recent):
    """First real keys and recent keys of every query [2 1 33 33], one entry at a time."""
    found = torch.zeros(2, 1, 33, 33, dtype=torch.bool)
    for row, start in ((0, 0), (1, 7)):
        for query in range(33):
            for key in range(33):
                found[row, 0, query, key] = start <= key < start + first or query - recent < key <= query
    return found


@pytest.mark.parametrize("k", [2, 12, None])
@pytest.mark.parametrize("chunk", [None, 6])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_softcap_and_sinks_equal_the_reference_with_all_gradients(k, chunk, softcap, with_sinks):
    query, key, value, sinks = inputs()
    bias = torch.randn(4, 33, 33, dtype=torch.float64, requires_grad=True)
    options = {"softcap": softcap, "sinks": sinks if with_sinks else None}
    found = topk_attention(query, key, value, k=k, scale=0.7, mask=CAUSAL, bias=bias, chunk_size=chunk, **options)
    expected = reference.attention(query, key, value, topk=k or 33, scale=0.7, allowed=ALLOWED, bias=bias, **options)
    assert_equal(found, expected, [query, key, value, bias, *([sinks] if with_sinks else [])])


@pytest.mark.parametrize("k", [1, 3, 12, 30])
@pytest.mark.parametrize(("first", "recent"), [(2, 0), (0, 3), (2, 3), (10, 20)])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_first_and_recent_keys_are_kept_beside_the_k_best(k, first, recent, with_sinks):
    query, key, value, sinks = inputs()
    options = {"softcap": 2.0, "sinks": sinks} if with_sinks else {}
    found = topk_attention(
        query, key, value, k=k, scale=0.7, mask=CAUSAL, first=first, recent=recent, chunk_size=7, **options
    )
    expected = reference.attention(
        query, key, value, topk=k, scale=0.7, allowed=ALLOWED, always=always(first, recent), **options
    )
    assert_equal(found, expected, [query, key, value, *([sinks] if with_sinks else [])])


@pytest.mark.parametrize("chunk", [None, 5])
def test_first_keys_outside_a_sliding_window_do_not_give_their_places_to_others(chunk):
    query, key, value, sinks = inputs()
    mask = LazyMask(2, 33, 33, causal=True, predicate=lambda batch, head, query, key: key > query - 8)
    options = {"k": 1, "scale": 0.7, "first": 3, "recent": 2, "sinks": sinks}
    found = topk_attention(query, key, value, mask=mask, chunk_size=chunk, **options)
    held = always(3, 2)
    held[1] = held[0]
    allowed = torch.ones(33, 33, dtype=torch.bool).tril().triu(-7)
    expected = reference.attention(query, key, value, topk=1, scale=0.7, allowed=allowed, always=held, sinks=sinks)
    assert_equal(found, expected, [query, key, value, sinks])
    indices = functional.topk_attention_statistics(query, key, mask=mask, **options).indices
    assert ((indices >= 0).sum(-1)[:, :, 20:] == 3).all()


def test_first_and_recent_keys_of_a_tensor_mask_are_those_of_the_lazy_mask():
    query, key, value, _ = inputs()
    lazy = topk_attention(query, key, value, k=2, scale=0.7, mask=CAUSAL, first=2, recent=3)
    tensor = topk_attention(query, key, value, k=2, scale=0.7, mask=ALLOWED, first=2, recent=3)
    torch.testing.assert_close(tensor, lazy)


def test_other_activations_drop_the_surplus_of_keys_that_are_always_kept():
    query, key, value, _ = inputs()
    found = topk_attention(query, key, value, k=3, scale=0.7, mask=CAUSAL, first=2, recent=3, activation="relu")
    expected = reference.attention(
        query, key, value, topk=3, scale=0.7, allowed=ALLOWED, always=always(2, 3), activation="relu"
    )
    assert_equal(found, expected, [query, key, value])


@pytest.mark.parametrize("past", [0, 5, 30])
def test_one_cached_query_keeps_what_it_keeps_in_the_whole_sequence(past):
    query, key, value, sinks = inputs()
    options = {"k": 2, "scale": 0.7, "first": 2, "recent": 3, "sinks": sinks}
    whole = topk_attention(query, key, value, mask=CAUSAL, **options)
    padding = PADDING[:, : past + 1]
    mask = LazyMask(2, 1, past + 1, causal=True, query_offset=past, padding=padding)
    seen = (part[:, :, : past + 1] for part in (key, value))
    one = topk_attention(query[:, :, past : past + 1], *seen, mask=mask, **options)
    torch.testing.assert_close(one, whole[:, :, past : past + 1])


@pytest.mark.parametrize("number", [-1e4, -1e9, -65504.0, torch.finfo(torch.float64).min, -torch.inf])
def test_additive_masks_with_any_large_number_forbid(number):
    query, key, value, _ = inputs()
    mask = torch.zeros(ALLOWED.shape, dtype=torch.float64).masked_fill(~ALLOWED, number)
    found = topk_attention(query, key, value, k=40, scale=0.7, mask=mask)
    expected = topk_attention(query, key, value, k=40, scale=0.7, mask=ALLOWED)
    torch.testing.assert_close(found, expected)
    assert not found[1, :, 0].any()


def test_a_query_without_any_allowed_key_gives_zeros_and_no_gradient():
    query, key, value, sinks = inputs()
    allowed = torch.zeros(33, 33, dtype=torch.bool)
    allowed[1:, 0] = True
    found = topk_attention(query, key, value, k=3, scale=0.7, mask=allowed, sinks=sinks)
    assert not found[:, :, 0].any()
    found[:, :, 0].sum().backward()
    assert all(not leaf.grad.any() for leaf in (query, key, value, sinks))


@pytest.mark.parametrize("k", [3, None])
def test_gradients_are_those_of_finite_differences(k):
    query, key, value, sinks = (part[:, :, :6] if part.ndim == 4 else part for part in inputs())
    query, key, value, sinks = (part.detach().requires_grad_() for part in (query, key, value, sinks))

    def run(query, key, value, sinks):
        return topk_attention(query, key, value, k=k, scale=0.7, softcap=1.5, sinks=sinks, first=1)

    assert torch.autograd.gradcheck(run, (query, key, value, sinks))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sinks_get_the_gradient_of_float64(dtype):
    query, key, value, sinks = (part.detach().to(dtype) for part in inputs())
    sinks = sinks.requires_grad_()
    exact = [part.detach().double() for part in (query, key, value)]
    exact_sinks = sinks.detach().double().requires_grad_()
    topk_attention(query, key, value, k=20, scale=3.0, mask=CAUSAL, sinks=sinks).sum().backward()
    expected = reference.attention(*exact, topk=20, scale=3.0, allowed=ALLOWED, sinks=exact_sinks)
    expected.sum().backward()
    torch.testing.assert_close(sinks.grad.double(), exact_sinks.grad, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("k", [4, None])
def test_compiled_options_equal_the_eager_ones(k):
    torch._dynamo.reset()

    def run(query, key, value, sinks):
        mask = LazyMask(2, 33, 33, causal=True, padding=PADDING)
        return topk_attention(query, key, value, k=k, scale=0.7, mask=mask, softcap=1.5, sinks=sinks, first=2, recent=3)

    leaves = inputs()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(*leaves), run(*leaves), leaves)


def test_statistics_count_the_keys_that_are_always_kept():
    query, key, value, sinks = inputs()
    options = {"k": 2, "scale": 0.7, "mask": CAUSAL, "softcap": 1.5, "sinks": sinks, "first": 2, "recent": 3}
    found = functional.topk_attention_statistics(query, key, **options)
    assert found.indices.shape[-1] == 7
    kept = torch.zeros(2, 4, 33, 34, dtype=torch.bool).scatter(-1, found.indices.long() % 34, True)[..., :33]
    assert (kept | ~(always(2, 3) & ALLOWED)).all()
    dense = torch.zeros(2, 4, 33, 34, dtype=torch.float64).scatter(-1, found.indices.long() % 34, found.weights)
    keys = value.repeat_interleave(2, 1)
    torch.testing.assert_close(dense[..., :33] @ keys, topk_attention(query, key, value, **options))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"softcap": float("nan")}, "softcap is nan"),
        ({"first": -1}, "first is -1"),
        ({"recent": -2}, "recent is -2"),
        ({"sinks": torch.zeros(4), "activation": "relu"}, "activation is 'relu' with sinks"),
    ],
)
def test_impossible_options_are_refused(options, match):
    query, key, value, _ = inputs()
    with pytest.raises(ConfigError, match=match):
        topk_attention(query, key, value, k=2, scale=0.7, **options)


def tiny(name):
    shared = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.5,
        "pad_token_id": 0,
        "sliding_window": 4,
        "attention_dropout": 0.0,
    }
    torch.manual_seed(0)
    if name == "gemma2":
        config = transformers.Gemma2Config(**shared, attn_logit_softcapping=2.0, query_pre_attn_scalar=8)
        model = transformers.Gemma2ForCausalLM(config)
    else:
        config = transformers.GptOssConfig(**shared, num_local_experts=2, num_experts_per_tok=1)
        model = transformers.GptOssForCausalLM(config)
    model.set_attn_implementation("eager")
    return model.eval()


@pytest.fixture
def listed(monkeypatch):
    for name, cls in (("gemma2", "Gemma2Attention"), ("gpt_oss", "GptOssAttention")):
        if name not in FAMILIES:
            monkeypatch.setitem(FAMILIES, name, Family(name, "decoder", attention=(cls,)))
            for method in (gw.TopK, gw.Sparsefinder):
                monkeypatch.setattr(method, "families", method.families | {name})


@pytest.mark.parametrize("layers", [None, "1"])
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
@pytest.mark.usefixtures("listed")
def test_models_with_softcap_and_sinks_equal_the_dense_ones(name, layers):
    model = tiny(name)
    ids = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0

    def run():
        model.zero_grad()
        logits = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        logits.square().sum().backward()
        return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, gradients = run()
    gw.convert(model, gw.TopK(attention_k=64, layers=layers))
    found, ours = run()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert any("sinks" in name for name in gradients) == (name == "gpt_oss")
    for path, gradient in gradients.items():
        torch.testing.assert_close(ours[path], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))


@pytest.mark.parametrize(("name", "feature"), [("gemma2", "soft-capped scores"), ("gpt_oss", "attention sinks")])
@pytest.mark.usefixtures("listed")
def test_methods_without_support_refuse_them_at_conversion(name, feature):
    model = tiny(name)
    with pytest.raises(UnsupportedModelError, match=rf"{feature}.*Nothing was changed"):
        gw.convert(model, gw.Sparsefinder(alpha=1.5))
    assert model.config._attn_implementation == "eager"


@pytest.mark.usefixtures("listed")
def test_a_graft_without_support_is_refused_in_the_call_too():
    model = tiny("gemma2")
    graft_attention(model, "test", {"model.layers.0.self_attn": TopKAttention(2)})
    model.model.layers[0].self_attn.graftwork_attention.supports = frozenset()
    with pytest.raises(UnsupportedModelError, match="softcap"):
        model(torch.ones(1, 3, dtype=torch.long))
