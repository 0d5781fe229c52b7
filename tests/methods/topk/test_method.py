"""Selection of layers by the settings of top-k, errors, and measurements of the method."""

import pickle
import subprocess
import sys

import pytest
import torch

from graftwork.errors import ConfigError, UnsupportedModelError
from graftwork.grafting.conversion import convert
from graftwork.methods.topk import TopK
from graftwork.methods.topk.modules import TopKFeedForward
from tiny_models import TINY, anatomy, padded_batch, real_logits, tiny_model


def paths(name, **settings):
    return {change.path for change in convert(tiny_model(name), TopK(**settings)).changes}


def ends(found, *marks):
    return {path for path in found if any(mark in path for mark in marks)}


ALL_T5_FEED_FORWARD = {f"encoder.block.{i}.layer.1.DenseReluDense" for i in (0, 1)} | {
    f"decoder.block.{i}.layer.2.DenseReluDense" for i in (0, 1)
}
ALL_T5_ATTENTION = (
    {f"encoder.block.{i}.layer.0.SelfAttention" for i in (0, 1)}
    | {f"decoder.block.{i}.layer.0.SelfAttention" for i in (0, 1)}
    | {f"decoder.block.{i}.layer.1.EncDecAttention" for i in (0, 1)}
)


def test_every_feed_forward_layer_or_every_attention_is_changed():
    assert paths("t5", feed_forward_k=4) == ALL_T5_FEED_FORWARD
    assert paths("t5", attention_k=4) == ALL_T5_ATTENTION
    assert paths("t5", attention_k=4, feed_forward_chunk_size=3) == ALL_T5_FEED_FORWARD | ALL_T5_ATTENTION


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_one_stack_can_be_chosen(name, stack):
    everything = paths(name, attention_k=4)
    assert paths(name, attention_k=4, stacks=(stack,)) == ends(everything, f"{stack}.")
    if name == "t5":
        assert paths(name, feed_forward_k=4, stacks=(stack,)) == ends(ALL_T5_FEED_FORWARD, f"{stack}.")


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_one_kind_of_attention_can_be_chosen(name):
    everything = paths(name, attention_k=4)
    cross = ends(everything, "EncDecAttention", "encoder_attn")
    assert len(cross) == 2
    assert paths(name, attention_k=4, attention_kinds=("cross",)) == cross
    assert paths(name, attention_k=4, attention_kinds=("self",)) == everything - cross


@pytest.mark.parametrize("name", TINY)
def test_layers_can_be_chosen_by_number(name):
    settings = {"attention_k": 4, **({"feed_forward_k": 4} if TINY[name].feed_forward else {})}
    everything = paths(name, **settings)
    second = paths(name, **settings, layers="1")
    assert len(second) * 2 == len(everything)
    assert all(".1." in f".{path}." for path in second)
    assert paths(name, **settings, layers="0-1") == everything
    assert paths(name, **settings, layers="0") == everything - second


def test_settings_that_select_no_layer_are_refused():
    with pytest.raises(UnsupportedModelError, match="layers 7"):
        paths("t5", feed_forward_k=4, layers="7")
    with pytest.raises(UnsupportedModelError, match="stacks encoder"):
        paths("llama", attention_k=4, stacks=("encoder",))
    with pytest.raises(UnsupportedModelError, match="kinds cross"):
        paths("llama", attention_k=4, attention_kinds=("cross",))


@pytest.mark.parametrize("name", ["bart", "opt"])
@pytest.mark.parametrize("settings", [{"feed_forward_chunk_size": 3}, {"feed_forward_dropout": False}])
def test_settings_without_effect_on_layers_that_the_model_computes_are_refused(name, settings):
    model = tiny_model(name)
    before = anatomy(model)
    with pytest.raises(ConfigError, match=f"Found {next(iter(settings))}.*has no effect.*Nothing was changed"):
        convert(model, TopK(feed_forward_k=4, **settings))
    assert anatomy(model) == before


@pytest.mark.parametrize(("name", "share"), [("bart", 0.55), ("opt", 1.05)])
def test_layers_that_the_model_computes_store_one_tensor_of_their_width(name, share):
    def stored(model):
        sizes: dict[int, int] = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        batch = padded_batch(name)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(**batch)
        return sum(sizes.values())

    changes = {"decoder_ffn_dim": 4096, "encoder_ffn_dim": 4096} if name == "bart" else {"ffn_dim": 4096}
    model = tiny_model(name, **changes)
    dense = stored(model)
    sparse = stored(convert(model, TopK(feed_forward_k=4)).model)
    weights = sum(p.nbytes for p in model.parameters())
    # a dense GELU stores its input and its output, a dense ReLU its output only
    assert sparse - weights < share * (dense - weights)


@pytest.mark.parametrize(("share", "units"), [(0.25, 6), (1.0, 24), (0.001, 1), (5, 5), (100, 24)])
def test_k_may_be_a_share_of_the_width(share, units):
    model = convert(tiny_model("gpt2"), TopK(feed_forward_k=share)).model
    assert [module.k for module in model.modules() if isinstance(module, TopKFeedForward)] == [units, units]


def test_a_share_equals_the_corresponding_number():
    batch = padded_batch("llama")
    by_share = real_logits(convert(tiny_model("llama"), TopK(feed_forward_k=0.25)).model, "llama", batch)
    by_number = real_logits(convert(tiny_model("llama"), TopK(feed_forward_k=6)).model, "llama", batch)
    assert torch.equal(by_share, by_number)


@pytest.mark.parametrize(("name", "rule"), [("t5", "gate"), ("t5", "product"), ("llama", "score")])
def test_a_selection_for_the_other_kind_of_layer_is_refused_and_leaves_the_model_unchanged(name, rule):
    model = tiny_model(name)
    before = anatomy(model)
    with pytest.raises(ConfigError, match="Expected one of"):
        convert(model, TopK(feed_forward_k=4, attention_k=4, selection=rule))
    assert anatomy(model) == before


@pytest.mark.parametrize("settings", [{"feed_forward_chunk_size": 3}, {"attention_chunk_size": 3}])
def test_chunking_without_k_does_not_change_the_result(settings):
    model, batch = tiny_model("t5"), padded_batch("t5")
    dense = real_logits(model, "t5", batch)
    convert(model, TopK(**settings))
    torch.testing.assert_close(real_logits(model, "t5", batch), dense, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["t5", "llama", "bert"])
def test_measure_covers_every_layer_and_leaves_the_model_unchanged(name):
    model, batch, method = tiny_model(name), padded_batch(name), TopK(feed_forward_k=6)
    convert(model, method)
    before = real_logits(model, name, batch)
    measured = method.measure(model, batch)
    assert len(measured) == 2 * TINY[name].feed_forward
    assert all(0 < value < 1 for key, value in measured.items() if key.startswith("kept_mass/"))
    assert torch.equal(real_logits(model, name, batch), before)
    whole = TopK(feed_forward_k=24)
    convert(model, whole)
    kept = [value for key, value in whole.measure(model, batch).items() if key.startswith("kept_mass/")]
    assert kept == pytest.approx([1.0] * len(kept))


def test_a_pickled_model_works_in_a_fresh_process(tmp_path):
    ids = torch.arange(3, 12)[None]
    model = convert(tiny_model("llama"), TopK(attention_k=3, feed_forward_k=6)).model
    with torch.no_grad():
        expected = model(ids).logits
    (tmp_path / "model.pickle").write_bytes(pickle.dumps((model, ids, expected)))
    program = (
        "import pickle, sys, torch; model, ids, expected = pickle.load(open(sys.argv[1], 'rb'));"
        "torch.testing.assert_close(model(ids).logits, expected, rtol=1e-9, atol=1e-9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model.pickle")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
