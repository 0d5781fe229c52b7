"""Stored queries and keys: α of every head, lengths and checks of dumps, padding of decoder labels."""

from dataclasses import replace

import entmax as package
import pytest
import torch

from graftwork.errors import ConfigError, DataError
from graftwork.grafting.conversion import convert
from graftwork.methods.sparsefinder import Sparsefinder
from graftwork.methods.sparsefinder.extraction import extract, module_scales, record
from graftwork.methods.sparsefinder.graph_report.comparison import Comparison
from graftwork.methods.sparsefinder.legacy import import_dump, read_projections
from graftwork.methods.sparsefinder.modules import sparsefinder_modules
from graftwork.methods.sparsefinder.phases import gold_and_allowed
from graftwork.methods.sparsefinder.stored import QueriesKeys, SiteData, pad_heads
from graftwork.training.encoding import PadBatch
from tiny_models import VOCABULARY, tiny_model

LENGTHS = [10, 7, 4, 10]


def dump(path, lengths=LENGTHS, **changes):
    """Dump of four sentences with three layers, two heads of width 4, padded to ten positions."""
    generator = torch.Generator().manual_seed(0)
    parts = {name: [torch.randn(3, 2, 10, 4, generator=generator) for _ in LENGTHS] for name in "qk"}
    for tensors in parts.values():
        for tensor, length in zip(tensors, LENGTHS, strict=True):
            tensor[:, :, length:] = 0
    parts = {**parts, "length_src": torch.tensor(lengths), **changes}
    torch.save(parts, path)
    return parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_padding_of_a_dump_is_removed_by_its_lengths(tmp_path, dtype):
    parts = dump(tmp_path / "d.pt", length_src=torch.tensor(LENGTHS, dtype=dtype))
    stored = import_dump(tmp_path / "d.pt", tmp_path / "kept")
    assert [row["queries"] for row in stored.sentences] == LENGTHS
    for number, length in enumerate(LENGTHS):
        for layer in range(3):
            query, key = stored.read(number, layer)
            assert torch.equal(query, parts["q"][number][layer, :, :length])
            assert torch.equal(key, parts["k"][number][layer, :, :length])


def with_one(tensors, change, number=2):
    return [change(tensor) if index == number else tensor for index, tensor in enumerate(tensors)]


WRONG = {
    "heads": ("k", lambda x: x[:, :1], r"sentence 2, k: found \[3, 1, 4, 4\]"),
    "layers": ("q", lambda x: x[:1], r"sentence 2, q: found \[1, 2, 4, 4\]"),
    "width": ("k", lambda x: x[..., :3], r"sentence 2, k: found \[3, 2, 4, 3\]"),
    "no head": ("k", lambda x: x[:, :0], r"sentence 2, k: found a tensor \[3, 0, 10, 4\]"),
    "positions": ("k", lambda x: x[:, :, :6], "sentence 2: found 10 positions in q and 6 in k"),
    "nan": ("q", lambda x: x * torch.nan, "sentence 2, q: found NaN"),
    "whole numbers": ("q", lambda x: x.long(), "sentence 2, q: found a tensor .* real tensor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_sentence_and_its_field_are_named(tmp_path, name):
    field, change, match = WRONG[name]
    parts = dump(tmp_path / "d.pt")
    dump(tmp_path / "d.pt", **{field: with_one(parts[field], change)})
    with pytest.raises(DataError, match=match):
        import_dump(tmp_path / "d.pt", tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("length", [0, 11, -1, 3.5, float("nan")])
def test_a_wrong_length_is_named(tmp_path, length):
    dump(tmp_path / "d.pt", [10, 7, length, 10])
    with pytest.raises(DataError, match="sentence 2, length_src: found"):
        import_dump(tmp_path / "d.pt", tmp_path / "kept")


def test_a_dump_of_another_model_is_refused_and_takes_the_alpha_of_its_own(tmp_path):
    dump(tmp_path / "d.pt")
    model = convert(tiny_model("bert"), Sparsefinder(alpha=1.7)).model
    with pytest.raises(DataError, match=r"found 3 layers with 2 heads of width 4.*2 layers with 2 heads of width 8"):
        import_dump(tmp_path / "d.pt", tmp_path / "kept", grafts=list(sparsefinder_modules(model).values()))
    tensors = [torch.randn(2, 2, 5, 8)]
    torch.save({"q": tensors, "k": tensors, "length_src": [5]}, tmp_path / "own.pt")
    grafts = list(sparsefinder_modules(model).values())
    stored = import_dump(tmp_path / "own.pt", tmp_path / "kept", grafts=grafts)
    assert [site.alpha for site in stored.sites] == [1.7, 1.7]


def test_projections_that_are_not_finite_are_named(tmp_path):
    good = {"w": torch.randn(2, 8, 4), "b": torch.zeros(2, 1, 4)}
    bad = {**good, "b": torch.full((2, 1, 4), torch.inf)}
    torch.save([{"q": good, "k": good}, {"q": good, "k": bad}], tmp_path / "p.pt")
    with pytest.raises(DataError, match="layer 1, b: found NaN or infinite"):
        read_projections(tmp_path / "p.pt", 2)


def rows(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (count,), generator=generator).tolist()
    every = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in every]


def by_package(data, alpha, head):
    """Gold graph of one head [batch queries keys] by the package, in float64."""
    key = data.key.repeat_interleave(data.query.shape[1] // data.key.shape[1], 1)
    scale = data.site.scale[head] if isinstance(data.site.scale, tuple) else data.site.scale
    scores = (data.query[:, head].double() * scale) @ key[:, head].double().mT
    scores = scores.masked_fill(~data.allowed[:, 0], -1e4)
    return (package.entmax_bisect(scores, alpha, dim=-1, n_iter=100) > 0) & data.allowed[:, 0]


@pytest.mark.parametrize("alpha", [1.2, 1.5, 2.0, "learned"])
def test_gold_graphs_of_every_part_use_the_alpha_of_the_module(tmp_path, alpha):
    settings = {"learnable_alpha": True} if alpha == "learned" else {"alpha": alpha}
    method = Sparsefinder(grouping="distance", threshold=1.0, **settings)
    model = convert(tiny_model("bert"), method).model
    for name, weight in model.named_parameters():
        if name.endswith("query.weight"):
            # scores with zeros for every α
            weight.data *= 8
    grafts = sparsefinder_modules(model)
    if alpha == "learned":
        for number, graft in enumerate(grafts.values()):
            torch.nn.init.constant_(graft.alpha_logit, 3.0)
            with torch.no_grad():
                graft.alpha_logit[0] = -1.5 - number
    stored = extract(model, rows(6), PadBatch(0), tmp_path / "kept", samples=6)
    stored = QueriesKeys(tmp_path / "kept")
    comparison = Comparison(grafts, stored, stored, tune=range(3), test=range(3, 6))
    densities = []
    for site, graft in enumerate(grafts.values()):
        data = stored.batch(range(3, 6), site)
        now = graft.current_alpha()
        now = now.detach() if isinstance(now, torch.Tensor) else now
        for head in range(2):
            own = float(now[head]) if isinstance(now, torch.Tensor) else now
            expected = by_package(data, own, head)
            assert torch.equal(gold_and_allowed(graft, data)[0][:, head], expected)
            assert torch.equal(comparison.gold_of("test", site, 0)[:, head], expected)
            densities.append(float(expected.sum() / data.allowed.sum()))
    assert max(densities) < 1.0
    if alpha == "learned":
        # heads of different α
        assert isinstance(stored.sites[0].alpha, tuple)
        assert densities[0] > densities[1]


def test_an_extraction_with_another_alpha_is_not_reused(tmp_path):
    model = convert(tiny_model("bert"), Sparsefinder(grouping="distance", threshold=1.0)).model
    extract(model, rows(3), PadBatch(0), tmp_path / "kept", samples=3)
    again = convert(tiny_model("bert"), Sparsefinder(grouping="distance", threshold=1.0, alpha=2.0)).model
    with pytest.raises(ConfigError, match="another model or text"):
        extract(again, rows(3), PadBatch(0), tmp_path / "kept", samples=3)


def test_softmax_modules_have_the_gold_graph_of_entmax():
    data = pad_heads([(torch.randn(2, 9, 4) * 2, torch.randn(2, 9, 4) * 2)], SiteData("x", 2, 0.5, False, False, 1.0))
    usual = replace(data, site=replace(data.site, alpha=1.5))
    assert torch.equal(data.gold(), usual.gold())
    assert not data.gold().all()


def test_padded_labels_of_a_decoder_are_not_stored():
    model = convert(tiny_model("bart"), Sparsefinder()).model
    labels = torch.tensor([[5, 6, 7, 8, 9, 10, -100, -100, -100], [5, 6, 7, 8, 9, 10, 11, 12, 13]])
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 0], [9, 10, 11, 12, 13]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
        "labels": labels,
    }
    records, sites = record(model, batch)
    for row, (source, target) in enumerate(((4, 6), (5, 9))):
        for (query, key), site in zip(records[row], sites, strict=True):
            decoder = site.path.startswith("model.decoder") or ".decoder." in site.path
            assert query.shape[1] == (target if decoder else source), site
            assert key.shape[1] == (target if decoder and not site.cross else source), site


def test_prompts_of_a_decoder_alone_are_stored_although_they_have_no_label():
    model = convert(tiny_model("opt"), Sparsefinder()).model
    ids = torch.arange(5, 14)[None]
    labels = ids.masked_fill(torch.arange(9) < 4, -100)
    records, _ = record(model, {"input_ids": ids, "labels": labels})
    assert {tensor.shape[1] for pair in records[0] for tensor in pair} == {9}


def scaled(kind):
    """Tiny model whose factor on query·key is not 1/√width, with the factors of its heads by module."""
    if kind == "multiplier":
        model = tiny_model("llama", attention="eager")
        # query_pre_attn_scalar and attention_multiplier are constants of the configuration
        factors = [(0.9, 0.9)] * 2
    else:
        # a factor per layer, or per layer and head as of a logit scale
        model = tiny_model("bert", attention="eager")
        factors = [(0.9, 0.9), (0.1, 0.1)] if kind == "layer" else [(0.9, 0.1), (0.2, 1.3)]
    modules = [module for module in model.modules() if isinstance(getattr(module, "scaling", None), float)]
    for module, own in zip(modules, factors, strict=True):
        module.scaling = torch.tensor(own).view(1, 2, 1, 1) if kind == "head" else own[0]
    for name, weight in model.named_parameters():
        if name.endswith(("query.weight", "q_proj.weight")):
            weight.data *= 4
    return model, factors


@pytest.mark.parametrize("kind", ["multiplier", "layer", "head"])
def test_the_scale_of_every_head_is_stored_and_decides_gold_graphs(tmp_path, kind):
    model, factors = scaled(kind)
    model.to(torch.float64)
    batch = {"input_ids": torch.arange(5, 16)[None]}
    expected = model(**batch).logits
    softmax = convert(model, Sparsefinder(alpha=1.0), copy=True).model
    torch.testing.assert_close(softmax(**batch).logits, expected, rtol=0, atol=1e-5)
    # gathered blocks give the masked scores
    outputs = []
    for executor in ("dense", "blocks"):
        method = Sparsefinder(grouping="window", window_size=4, executor=executor)
        outputs.append(convert(model, method, copy=True).model(**batch).logits)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-9)
    model = convert(model, Sparsefinder(grouping="distance", threshold=1.0)).model
    grafts = sparsefinder_modules(model)
    stored = extract(model, rows(6), PadBatch(0), tmp_path / "kept", samples=6)
    stored = QueriesKeys(tmp_path / "kept")
    found = [site.scale if isinstance(site.scale, tuple) else (site.scale,) * 2 for site in stored.sites]
    assert [pytest.approx(own) for own in found] == factors
    comparison = Comparison(grafts, stored, stored, tune=range(3), test=range(3, 6))
    for site, graft in enumerate(grafts.values()):
        data = stored.batch(range(3, 6), site)
        usual = replace(data, site=replace(data.site, scale=8**-0.5))
        for head in range(2):
            expected = by_package(data, 1.5, head)
            assert torch.equal(gold_and_allowed(graft, data)[0][:, head], expected)
            assert torch.equal(comparison.gold_of("test", site, 0)[:, head], expected)
        assert not torch.equal(usual.gold(), data.gold()), "the scale decides the gold graph"
    measured = Sparsefinder(grouping="gold").measure(model, PadBatch(0)(rows(6)))
    assert {value for name, value in measured.items() if name.startswith("recall")} <= {1.0}


def test_a_changed_scale_of_the_configuration_is_another_model(tmp_path):
    method = Sparsefinder(grouping="distance", threshold=1.0)
    model = convert(tiny_model("gpt2"), method).model
    extract(model, rows(3), PadBatch(0), tmp_path / "kept", samples=3)
    again = convert(tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True), method).model
    with pytest.raises(ConfigError, match="another model or text"):
        extract(again, rows(3), PadBatch(0), tmp_path / "kept", samples=3)
    stored = extract(again, rows(3), PadBatch(0), tmp_path / "other", samples=3)
    assert [site.scale for site in stored.sites] == pytest.approx([8**-0.5, 8**-0.5 / 2])


def test_an_imported_dump_has_the_scale_of_its_model(tmp_path):
    model = convert(tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True), Sparsefinder()).model
    tensors = [torch.randn(2, 2, 5, 8)]
    torch.save({"q": tensors, "k": tensors, "length_src": [5]}, tmp_path / "own.pt")
    grafts = list(sparsefinder_modules(model).values())
    scales = [scale for scale, _ in module_scales(model)]
    stored = import_dump(tmp_path / "own.pt", tmp_path / "kept", grafts=grafts, scales=scales)
    assert [site.scale for site in stored.sites] == pytest.approx([8**-0.5, 8**-0.5 / 2])
