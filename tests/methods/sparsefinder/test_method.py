"""Acceptance cases 16 to 18, 27 and 29: whole models with and without a cache, and files of the authors."""

import pickle

import pytest
import torch

from graftwork.core import faults
from graftwork.errors import ConfigError, DataError, DiskFullError, UnsupportedModelError
from graftwork.grafting.conversion import convert
from graftwork.methods.sparsefinder import Sparsefinder
from graftwork.methods.sparsefinder.extraction import QueriesKeys, extract
from graftwork.methods.sparsefinder.legacy import import_dump, load_into, read_centroids, read_projections
from graftwork.methods.sparsefinder.modules import AttentionCall, observe_calls, sparsefinder_modules
from graftwork.training.encoding import PadBatch
from tiny_models import VOCABULARY, padded_batch, real_logits, tiny_model

ONE_GROUP = [
    {"grouping": "distance", "threshold": float("inf")},
    {"grouping": "kmeans", "num_clusters": 1},
    {"grouping": "quantize", "bucket_size": 64, "num_clusters": 1},
    {"grouping": "window", "window_size": 100},
    {"grouping": "mean_pooled", "block_size": 4, "block_budget": 1.0},
    {"grouping": "gate", "block_size": 4, "block_budget": 1.0},
]
ONE_EDGE = {"grouping": "window", "window_size": 1}
PAIRWISE = [
    {"grouping": "distance", "threshold": 3.0, "window_size": 3, "add_cls_mask": True},
    {"grouping": "kmeans", "num_clusters": 3, "add_cls_mask": True},
    {"grouping": "quantize", "num_clusters": 4, "window_size": 2},
    {"grouping": "window", "window_size": 4},
    {"grouping": "openai_sparse", "baseline_size": 4},
    {"grouping": "mean_pooled", "block_size": 3, "block_budget": 0.4, "window_size": 2},
    {"grouping": "pages", "block_size": 4, "block_budget": 0.5, "add_cls_mask": True},
    {"grouping": "gate", "block_size": 2, "block_budget": 0.3},
]


def switch_on(model, seed=0):
    """Fill the buffers of the cluster phase with reproducible values, and activate the graphs."""
    generator = torch.Generator().manual_seed(seed)
    for graft in sparsefinder_modules(model).values():
        for name, buffer in graft.named_buffers():
            if name == "active":
                buffer.fill_(True)
            elif buffer.dtype.is_floating_point:
                buffer.copy_(torch.randn(buffer.shape, generator=generator).sort(-1).values)
    return model


def converted(name, **settings):
    return switch_on(convert(tiny_model(name), Sparsefinder(**settings)).model)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("settings", ONE_GROUP, ids=lambda settings: settings["grouping"])
def test_one_group_is_dense_entmax(name, settings):
    batch = padded_batch(name)
    dense = real_logits(convert(tiny_model(name), Sparsefinder()).model, name, batch)
    model = converted(name, **settings)
    torch.testing.assert_close(real_logits(model, name, batch), dense, rtol=0, atol=1e-5)
    measured = Sparsefinder(**settings).measure(model, batch)
    assert {value for key, value in measured.items() if key.startswith("sparsity/")} == {0.0}
    assert {value for key, value in measured.items() if key.startswith(("recall/", "exact/"))} == {1.0}


@pytest.mark.parametrize("executor", ["dense", "blocks"])
def test_a_graph_that_holds_the_gold_graph_is_exact(executor):
    batch = padded_batch("bert")
    dense = convert(tiny_model("bert"), Sparsefinder()).model
    model = convert(tiny_model("bert"), Sparsefinder(**ONE_EDGE, executor=executor)).model
    for graft in sparsefinder_modules(model).values():
        follow_gold(graft, extra=executor == "blocks")
    torch.testing.assert_close(real_logits(model, "bert", batch), real_logits(dense, "bert", batch), rtol=0, atol=1e-5)


def follow_gold(graft, extra):
    """Replace the graph of a module by its gold graph, optionally with additional edges."""
    from dataclasses import replace

    from graftwork.methods.sparsefinder.graphs import Graph, gold_edges

    graft.config = replace(graft.config, attention_block_size=4)

    def graph(query, key, mask, query_real=None):
        edges = gold_edges(query, key, mask, scale=query.shape[-1] ** -0.5)
        if extra:
            edges = edges | (torch.rand(edges.shape, generator=torch.Generator().manual_seed(0)) < 0.3)
        return Graph(query.shape[1], mask, edges=edges)

    graft.graph = graph


@pytest.mark.parametrize("executor", ["dense", "blocks"])
def test_an_empty_graph_gives_exact_zeros_and_is_counted(executor):
    settings = {"grouping": "random", "threshold": 0.0, "executor": executor}
    settings |= {"attention_block_size": 4} if executor == "blocks" else {}
    model, batch = converted("bert", **settings), padded_batch("bert")
    outputs = []
    for graft in sparsefinder_modules(model).values():
        graft.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        model(**batch)
    assert len(outputs) == 2
    assert not any(output.any() for output in outputs)
    measured = Sparsefinder(**settings).measure(model, batch)
    for name, expected in (("sparsity/", 1.0), ("recall/", 0.0), ("empty_rows/", 1.0)):
        assert {value for key, value in measured.items() if key.startswith(name)} == {expected}


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("settings", PAIRWISE, ids=lambda settings: settings["grouping"])
def test_cached_generation_is_the_uncached_one(name, settings):
    model = converted(name, **settings)
    ids = torch.randint(3, VOCABULARY, (1, 5), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("settings", PAIRWISE, ids=lambda settings: settings["grouping"])
def test_no_row_depends_on_a_later_token(settings):
    model = converted("llama", **settings)
    ids = torch.randint(3, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, 7:] = 5
    with torch.no_grad():
        first, second = model(ids).logits, model(other).logits
    torch.testing.assert_close(first[:, :7], second[:, :7], rtol=1e-12, atol=1e-12)
    assert not torch.equal(first[:, 7:], second[:, 7:])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"grouping": "routing"}, "grouping routing"),
        ({"grouping": "bigbird"}, "grouping bigbird"),
        ({"grouping": "window", "window_size": 3, "add_last_mask": True}, "add_last_mask"),
        ({"grouping": "kmeans", "block_size": 4}, "block_size 4"),
    ],
)
def test_decoders_refuse_graphs_that_look_ahead(settings, match):
    model = tiny_model("gpt2")
    with pytest.raises(ConfigError, match=f"{match} cannot be used in .* which decodes"):
        convert(model, Sparsefinder(**settings))
    assert not sparsefinder_modules(model)


def test_unsupported_cross_attention_and_position_biases_are_refused():
    with pytest.raises(ConfigError, match="cross-attention does not have"):
        convert(tiny_model("bart"), Sparsefinder(grouping="openai_sparse"))
    with pytest.raises(ConfigError, match=r"concat_q_and_k cannot be used in .*encoder_attn"):
        convert(tiny_model("bart"), Sparsefinder(grouping="kmeans", concat_q_and_k=True, attention_kinds=("cross",)))
    with pytest.raises(UnsupportedModelError, match="position bias"):
        convert(tiny_model("t5"), Sparsefinder(grouping="kmeans"))
    batch = padded_batch("bart")
    model = converted("bart", grouping="kmeans", num_clusters=3)
    measured = Sparsefinder(grouping="kmeans", num_clusters=3).measure(model, batch)
    cross = [value for key, value in measured.items() if "encoder_attn" in key and key.startswith("recall/")]
    assert len(cross) == 2
    assert all(0 <= value <= 1 for value in cross)


def test_learned_and_annealed_alphas():
    model = convert(tiny_model("bert"), Sparsefinder(learnable_alpha=True)).model
    model.train()
    model(**padded_batch("bert")).loss.backward()
    gradients = [graft.alpha_logit.grad for graft in sparsefinder_modules(model).values()]
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
    softmax = real_logits(tiny_model("bert"), "bert", padded_batch("bert"))
    model = convert(tiny_model("bert"), Sparsefinder(anneal_steps=4)).model
    torch.testing.assert_close(real_logits(model, "bert", padded_batch("bert")), softmax, rtol=1e-9, atol=1e-9)
    (phase,) = Sparsefinder(anneal_steps=4).phases(model)
    model.train()
    alphas = []
    for _ in range(5):
        phase.step(model, padded_batch("bert"))
        alphas.append(next(iter(sparsefinder_modules(model).values())).current_alpha())
    assert alphas == pytest.approx([1.125, 1.25, 1.375, 1.5, 1.5])


def rows():
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()}
        for n in (9, 4, 1, 7, 5, 6, 3, 8, 2, 9)
    ]


@pytest.mark.parametrize("hit", [1, 3, 9])
def test_an_interrupted_extraction_has_the_shards_of_an_uninterrupted_one(tmp_path, hit):
    model = convert(tiny_model("llama", dtype=torch.float32), Sparsefinder()).model
    extract(model, rows(), PadBatch(0), tmp_path / "whole", samples=10)
    with faults.handled_by(faults.Fault("line.appended", "full", hit=hit)), pytest.raises(DiskFullError):
        extract(model, rows(), PadBatch(0), tmp_path / "cut", samples=10)
    extract(model, rows(), PadBatch(0), tmp_path / "cut", samples=10)
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == files
    for name in files:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_extraction_stores_the_inputs_of_attention_and_resumes(tmp_path):
    model = convert(tiny_model("llama", dtype=torch.float32), Sparsefinder()).model
    stored = extract(model, rows(), PadBatch(0), tmp_path / "qk", samples=10)
    assert [(s["queries"], s["keys"]) for s in stored.sentences] == [(len(r["input_ids"]),) * 2 for r in rows()]
    calls: list[AttentionCall] = []
    with observe_calls(model, lambda graft, call: calls.append(call)), torch.no_grad():
        model(torch.tensor([rows()[0]["input_ids"]]))
    for site in range(2):
        query, key = stored.read(0, site)
        torch.testing.assert_close(query, calls[site].query[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(key, calls[site].key[0], rtol=1e-5, atol=1e-5)
        assert stored.sites[site].causal
        assert stored.sites[site].scale == calls[site].scale
    # interrupted after the first shard
    lines = (tmp_path / "qk" / "sentences.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "qk" / "sentences.jsonl").write_text("".join(lines[:8]) + lines[8][:5])
    again = extract(model, rows(), PadBatch(0), tmp_path / "qk", samples=10)
    assert torch.equal(again.read(9, 1)[0], stored.read(9, 1)[0])
    with pytest.raises(ConfigError, match="another model or text"):
        extract(model, rows()[1:], PadBatch(0), tmp_path / "qk", samples=10)


@pytest.mark.parametrize("lengths", [[5, 3], torch.tensor([5, 3]), torch.tensor([5.0, 3.0])])
def test_dumps_of_the_authors_load_with_every_type_of_lengths(tmp_path, lengths):
    tensors = [torch.randn(2, 3, n, 4) for n in (5, 3)]
    path = tmp_path / "mlm_enc-attn.pt"
    torch.save({"length_src": lengths, "q": tensors, "k": [x + 1 for x in tensors]}, path)
    stored = import_dump(path, tmp_path / "qk")
    assert torch.equal(stored.read(1, 0)[0], tensors[1][0])
    assert torch.equal(QueriesKeys(tmp_path / "qk").read(0, 1)[1], tensors[0][1] + 1)
    rescaled = import_dump(path, tmp_path / "qk2", rescale_queries=True)
    torch.testing.assert_close(rescaled.read(0, 0)[0], tensors[0][0] * 2)
    with pytest.raises(ConfigError, match="unscaled"):
        import_dump(path, tmp_path / "qk3", rescale_queries=True, unscaled=True)


def test_projections_and_centroids_of_the_authors_load_into_a_model(tmp_path):
    linear = [{"q": {"w": torch.randn(2, 8, 4), "b": torch.randn(2, 1, 4)}} for _ in range(2)]
    shared = [{"q": entry["q"], "k": entry["q"]} for entry in linear]
    torch.save(shared, tmp_path / "linear.pickle")
    torch.save([torch.randn(2, 1, 3, 4, dtype=torch.float64) for _ in range(2)], tmp_path / "centroids.pickle")
    hidden = {
        "w1": torch.randn(2, 8, 5),
        "b1": torch.randn(2, 1, 5),
        "w2": torch.randn(2, 5, 4),
        "b2": torch.randn(2, 1, 4),
    }
    torch.save([{"q": hidden, "k": hidden}], tmp_path / "mlp.pickle")
    ((query, key),) = read_projections(tmp_path / "mlp.pickle", heads=2)
    assert query is key
    tokens = torch.randn(1, 2, 6, 8)
    expected = torch.tanh(tokens @ hidden["w1"] + hidden["b1"]) @ hidden["w2"] + hidden["b2"]
    torch.testing.assert_close(query(tokens), expected)
    settings = {"grouping": "kmeans", "num_clusters": 3, "share_projectors": True}
    model = convert(tiny_model("bert", dtype=torch.float32), Sparsefinder(**settings)).model
    grafts = list(sparsefinder_modules(model).values())
    load_into(grafts, read_projections(tmp_path / "linear.pickle", 2), read_centroids(tmp_path / "centroids.pickle"))
    assert grafts[1].predicts
    assert torch.equal(grafts[1].query_projection.weights[0], linear[1]["q"]["w"])


class Estimator:
    """Placeholder for a pickled object of an arbitrary class."""


def test_pickled_objects_are_refused_with_a_solution(tmp_path):
    path = tmp_path / "kmeans.pickle"
    path.write_bytes(pickle.dumps([Estimator()]))
    with pytest.raises(DataError, match=r"runs code.*convert_kmeans_to_torch_centroids"):
        read_centroids(path)
    torch.save([Estimator()], path)
    with pytest.raises(DataError, match="Pickled objects are refused"):
        read_centroids(path)
