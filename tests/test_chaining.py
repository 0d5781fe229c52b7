"""Two methods on one model: combined if they change different modules, refused if they overlap."""

from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoTokenizer

from graftwork.demo import shipped_model
from graftwork.errors import NothingConvertedError, OverlappingMethodsError
from graftwork.grafting.conversion import convert, restore
from graftwork.grafting.converted import Converted, save
from graftwork.grafting.method import Change, Method, Paper
from graftwork.methods.cald import Cald
from graftwork.methods.regrad import ReGrad
from graftwork.methods.regrad.encoding.gradients import passage_gradients
from graftwork.methods.regrad.meta_training.learning import twice_differentiable
from graftwork.methods.regrad.modules import adapters, updated
from graftwork.methods.topk import TopK
from graftwork.pipeline.loading import load
from graftwork.surgery.attention import graft_attention
from graftwork.surgery.attention_proof import MaterialisedAttention
from graftwork.surgery.modules import override, undo, undo_steps
from graftwork.surgery.sites import attention_sites, feed_forward_sites
from tiny_models import anatomy, padded_batch, real_logits, tiny_model


@dataclass(frozen=True)
class FirstKeyConfig:
    """Settings of the test method."""

    layers: int = 2
    """Number of encoder layers whose self-attention changes."""


class FirstKeyAttention(nn.Module):
    """Attention whose output is the value of the first key for every query."""

    def forward(self, owner, query, key, value, mask, **options):
        """See `graft_attention`; every query gets `value[:, :, 0]`."""
        return value[:, :, :1].repeat_interleave(query.shape[1] // value.shape[1], 1).expand_as(query)


class FirstKey(Method[FirstKeyConfig]):
    """Method that attends to the first key only."""

    name = "firstkey"
    title = "First key"
    paper = Paper("None", "none", 2000, "none")
    config_class = FirstKeyConfig
    families = frozenset({"t5"})

    def apply(self, model):
        sites = [site for site in attention_sites(model) if site.stack == "encoder"][: self.config.layers]
        graft_attention(model, self.name, {site.path: FirstKeyAttention() for site in sites})
        return [Change(site.path, "T5Attention", "FirstKeyAttention") for site in sites]


def logits(*methods):
    model = tiny_model("t5")
    for method in methods:
        convert(model, method)
    return real_logits(model, "t5", padded_batch("t5"))


@pytest.mark.parametrize("first", ["topk", "firstkey"])
def test_overlapping_methods_are_refused_by_module_name_and_leave_the_model_unchanged(first):
    methods = {"topk": TopK(attention_k=2), "firstkey": FirstKey()}
    second = methods["firstkey" if first == "topk" else "topk"]
    model, batch = tiny_model("t5"), padded_batch("t5")
    before = convert(model, methods[first])
    tree, expected = anatomy(model), real_logits(model, "t5", batch)
    with pytest.raises(OverlappingMethodsError, match=r"both change encoder\.block\.0\.layer\.0\.SelfAttention"):
        convert(before, second)
    assert anatomy(model) == tree
    assert torch.equal(real_logits(model, "t5", batch), expected)
    assert all(step.method != second.name for step in undo_steps(model))


def test_an_overlap_is_detected_through_a_wrapper():
    model = tiny_model("t5")
    convert(model, TopK(attention_k=2))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["wi"]))
    with pytest.raises(OverlappingMethodsError, match="SelfAttention"):
        convert(wrapped, FirstKey())


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    "topk", [{"feed_forward_k": 5}, {"attention_k": 2, "stacks": ("decoder",)}], ids=["feed-forward", "attention"]
)
def test_methods_on_different_modules_combine_and_can_be_undone_separately(order, topk):
    one, other = [TopK(**topk), FirstKey()][::order]
    model, batch = tiny_model("t5"), padded_batch("t5")
    dense = real_logits(model, "t5", batch)
    converted = convert(convert(model, one), other)
    assert [method.name for method in converted.methods] == [one.name, other.name]
    assert len({change.path for change in converted.changes}) == len(converted.changes)
    both = real_logits(model, "t5", batch)
    assert torch.equal(both, logits(other, one))
    assert undo(model, [one.name]) > 0
    assert torch.equal(real_logits(model, "t5", batch), logits(other))
    assert not torch.equal(both, logits(other))
    restore(model)
    assert torch.equal(real_logits(model, "t5", batch), dense)


def test_restore_removes_every_method():
    model, batch = tiny_model("t5"), padded_batch("t5")
    tree, dense = anatomy(model), real_logits(model, "t5", batch)
    restore(convert(convert(model, TopK(feed_forward_k=5)), FirstKey()))
    assert anatomy(model) == tree
    assert torch.equal(real_logits(model, "t5", batch), dense)


def test_a_failed_conversion_keeps_the_earlier_settings():
    model, batch = tiny_model("t5"), padded_batch("t5")
    convert(model, TopK(attention_k=2, feed_forward_k=5))
    expected = real_logits(model, "t5", batch)
    with pytest.raises(NothingConvertedError, match="topk would change nothing"):
        convert(model, TopK())
    assert torch.equal(real_logits(model, "t5", batch), expected)
    assert any(step.method == "topk" for step in undo_steps(model))


def test_a_copy_can_be_converted_instead_of_the_model():
    model, batch = tiny_model("t5"), padded_batch("t5")
    dense = real_logits(model, "t5", batch)
    converted = convert(model, TopK(feed_forward_k=5), copy=True)
    assert converted.model is not model
    assert not undo_steps(model)
    assert torch.equal(real_logits(model, "t5", batch), dense)
    assert not torch.equal(real_logits(converted.model, "t5", batch), dense)


class Doubled:
    """Callable that doubles the output of a projection."""

    def __init__(self, projection):
        self.projection = projection

    def __call__(self, hidden):
        return 2 * type(self.projection).forward(self.projection, hidden)


class DoubledProjections(FirstKey):
    """Method that changes the projections inside feed-forward layers, like an adapter."""

    name = "doubled"
    families = frozenset({"t5", "llama", "roberta"})

    def apply(self, model):
        changes = []
        for site in feed_forward_sites(model):
            path = f"{site.path}.{site.layout.output}"
            projection = model.get_submodule(path)
            override(model, self.name, projection, "forward", Doubled(projection))
            changes.append(Change(path, type(projection).__name__, "doubled"))
        return changes


@pytest.mark.parametrize("family", ["t5", "llama", "roberta"])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("left", ["topk", "doubled"])
def test_projections_inside_a_converted_layer_can_be_converted_too(family, order, left):
    methods = {"topk": TopK(feed_forward_k=5), "doubled": DoubledProjections()}
    model, expected, alone = (tiny_model(family) for _ in range(3))
    batch, tree = padded_batch(family), anatomy(model)
    dense = real_logits(model, family, batch)
    for method in list(methods.values())[::order]:
        convert(model, method)
    for site in feed_forward_sites(expected):
        for parameter in site.module.get_submodule(site.layout.output).parameters():
            parameter.data.mul_(2)
    convert(expected, methods["topk"])
    torch.testing.assert_close(real_logits(model, family, batch), real_logits(expected, family, batch))
    undo(model, [name for name in methods if name != left])
    convert(alone, methods[left])
    assert torch.equal(real_logits(model, family, batch), real_logits(alone, family, batch))
    restore(model)
    assert anatomy(model) == tree
    assert torch.equal(real_logits(model, family, batch), dense)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra"])
@pytest.mark.parametrize("order", [1, -1])
def test_linear_attention_and_sparse_feed_forward_layers_combine_in_an_encoder(family, order, tmp_path):
    model, batch = tiny_model(family), padded_batch(family)
    converted = model
    for method in [TopK(feed_forward_k=5), Cald(rank=4, positions=16)][::order]:
        converted = convert(converted, method)
    both = real_logits(model, family, batch)
    for method in (TopK(feed_forward_k=5), Cald(rank=4, positions=16)):
        alone = tiny_model(family)
        convert(alone, method)
        assert not torch.equal(real_logits(alone, family, batch), both)
    save(converted, tmp_path / "run")
    again = load(tmp_path / "run")
    assert {method.name for method in again.methods} == {"topk", "cald"}
    assert torch.equal(real_logits(again.model, family, batch), both)


def test_two_methods_on_attention_are_refused():
    model = tiny_model("roberta")
    convert(model, Cald(rank=4, positions=16))
    with pytest.raises(OverlappingMethodsError, match=r"both change roberta\.encoder\.layer\.0\.attention\.self"):
        convert(model, TopK(attention_k=2, feed_forward_k=5))


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_gradients_and_updates_are_those_of_the_model_with_sparse_layers(order, chunk_size, tmp_path):
    model, batch = tiny_model("llama"), padded_batch("llama")
    inputs = batch["input_ids"][:, :9], torch.ones_like(batch["attention_mask"][:, :9])
    sparse = TopK(feed_forward_k=5, feed_forward_chunk_size=chunk_size)
    converted = Converted(model, tokenizer=AutoTokenizer.from_pretrained(shipped_model("decoder")))
    for method in [sparse, ReGrad(rank=2, b_std=0.1)][::order]:
        converted = convert(converted, method)
    before = real_logits(model, "llama", batch)
    gradients, _ = passage_gradients(model, *inputs)
    learned = [part for adapter in adapters(model).values() for part in (adapter.lora_A, adapter.lora_B)]
    for row, ids in enumerate(inputs[0]):
        loss = model(input_ids=ids[None], labels=ids[None]).loss
        expected = torch.cat([part.flatten() for part in torch.autograd.grad(loss, learned)])
        torch.testing.assert_close(gradients[row], expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        with updated(model, -0.5 * gradients):
            together = model(input_ids=inputs[0]).logits
        for row, ids in enumerate(inputs[0]):
            with updated(model, -0.5 * gradients[row : row + 1]):
                torch.testing.assert_close(model(input_ids=ids[None]).logits[0], together[row], rtol=1e-4, atol=1e-5)
    assert torch.equal(real_logits(model, "llama", batch), before)
    save(converted, tmp_path / "run")
    again = load(tmp_path / "run")
    assert torch.equal(real_logits(again.model, "llama", batch), before)
    assert torch.equal(passage_gradients(again.model, *inputs)[0], gradients)


def test_layers_beside_converted_attention_are_differentiated_twice():
    def second(model):
        parameter = model.model.embed_tokens.weight
        # the row without padding
        batch = {name: value[:1] for name, value in padded_batch("llama").items()}
        with twice_differentiable(model):
            loss = model(**batch).loss
            (first,) = torch.autograd.grad(loss, parameter, create_graph=True)
            return torch.autograd.grad(first.square().sum(), parameter)[0]

    expected = second(tiny_model("llama", dtype=torch.float32, attention="eager"))
    model = tiny_model("llama", dtype=torch.float32)
    graft_attention(model, "dense", {attention_sites(model)[0].path: MaterialisedAttention()})
    torch.testing.assert_close(second(model), expected, rtol=1e-3, atol=1e-4)
