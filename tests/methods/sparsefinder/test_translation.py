"""Translation models: encoder, decoder and cross-attention along graphs, and a toy pair of languages."""

from __future__ import annotations

import json
import random

import pytest
import torch
from transformers import M2M100Config, M2M100ForConditionalGeneration, MarianConfig, MarianMTModel

import graftwork as gw
from graftwork.cli.app import run as command
from graftwork.methods.sparsefinder.modules import sparsefinder_modules
from tiny_models import BOS, EOS, PAD, VOCABULARY, word_tokenizer
from tokenizer_layouts import nllb_tokenizer

GRAPHS = [
    {"grouping": "distance", "threshold": 3.0},
    {"grouping": "kmeans", "num_clusters": 3},
    {"grouping": "mean_pooled", "block_size": 2, "block_budget": 0.5},
    {"grouping": "gate", "block_size": 2, "block_budget": 0.4},
]


def translator(name, width=16, layers=1):
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCABULARY,
        "d_model": width,
        "encoder_layers": layers,
        "decoder_layers": layers,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 2 * width,
        "decoder_ffn_dim": 2 * width,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "bos_token_id": BOS,
        "decoder_start_token_id": BOS,
        "forced_eos_token_id": None,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "init_std": 0.3,
    }
    if name == "marian":
        return MarianMTModel(MarianConfig(**shape, decoder_vocab_size=VOCABULARY)).eval()
    return M2M100ForConditionalGeneration(M2M100Config(**shape, encoder_layerdrop=0.0, decoder_layerdrop=0.0)).eval()


def switch_on(model):
    generator = torch.Generator().manual_seed(0)
    for graft in sparsefinder_modules(model).values():
        for name, buffer in graft.named_buffers():
            if name == "active":
                buffer.fill_(True)
            elif buffer.dtype.is_floating_point:
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return model


def batch(rows=2, tokens=9):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, 6:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask, "labels": ids[:, :7].contiguous()}


@pytest.mark.parametrize("name", ["marian", "m2m_100"])
@pytest.mark.parametrize("settings", GRAPHS, ids=lambda settings: settings["grouping"])
def test_all_three_kinds_of_attention_follow_graphs_with_and_without_a_cache(name, settings):
    model = switch_on(gw.convert(translator(name), gw.Sparsefinder(**settings)).model)
    grafts = sparsefinder_modules(model)
    assert sorted((graft.cross, graft.causal) for graft in grafts.values()) == [
        (False, False),
        (False, True),
        (True, False),
    ]
    measured = gw.Sparsefinder(**settings).measure(model, batch())
    cross = next(path for path, graft in grafts.items() if graft.cross)
    assert 0 < measured[f"sparsity/{cross}"] < 1
    inputs = {key: value for key, value in batch().items() if key != "labels"}
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, use_cache=False, **options))


@pytest.mark.parametrize("name", ["marian", "m2m_100"])
def test_graphs_with_every_gold_pair_change_nothing(name):
    expected = gw.convert(translator(name), gw.Sparsefinder()).model(**batch()).loss
    for settings in ({"grouping": "gold"}, {"grouping": "gate", "block_size": 2, "block_budget": 1.0}):
        model = switch_on(gw.convert(translator(name), gw.Sparsefinder(**settings)).model)
        torch.testing.assert_close(model(**batch()).loss, expected, rtol=0, atol=1e-5)


def toy_pair(path, count, seed):
    """Sentences of one language, and of another one that has a word for each of its words, in reverse order."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = [draw.randrange(4, 20) for _ in range(draw.randrange(3, 7))]
        rows.append(
            {
                "source": " ".join(f"w{word}" for word in words),
                "target": " ".join(f"w{word + 20}" for word in reversed(words)),
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def nllb(folder, target="deu_Latn"):
    """Model and tokenizer of NLLB's layout: </s> starts the decoder, language tokens follow the vocabulary."""
    tokenizer = nllb_tokenizer([f"w{number}" for number in range(4, 44)], "fra_Latn", target)
    torch.manual_seed(0)
    config = M2M100Config(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=64,
        decoder_start_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        init_std=0.3,
    )
    M2M100ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_nllb_reads_its_source_language_and_is_forced_into_its_target_language(tmp_path, monkeypatch):
    tokenizer = nllb(tmp_path / "nllb")
    toy_pair(tmp_path / "train.jsonl", 12, 0)
    toy_pair(tmp_path / "dev.jsonl", 4, 1)
    task = ["--task", "translation/source_target", "--data", str(tmp_path)]
    run = str(tmp_path / "run")
    graph = ["--grouping", "mean_pooled", "--block-size", "2", "--block-budget", "0.5"]
    assert command(["convert", "sparsefinder", str(tmp_path / "nllb"), "-o", run, *graph]) == 0
    trained, generated = [], []
    forward, generate = M2M100ForConditionalGeneration.forward, M2M100ForConditionalGeneration.generate

    def recorded(self, **batch):
        trained.append((batch["input_ids"], batch["labels"]) if "labels" in batch else None)
        return forward(self, **batch)

    def answers(self, *inputs, **options):
        generated.append(generate(self, *inputs, **options))
        return generated[-1]

    monkeypatch.setattr(M2M100ForConditionalGeneration, "forward", recorded)
    assert command(["train", run, *task, "--max-steps", "1", "--per-device-train-batch-size", "12"]) == 0
    monkeypatch.setattr(M2M100ForConditionalGeneration, "forward", forward)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    # the encoding of transformers itself: language, text, </s> on both sides
    expected = {
        (tuple(tokenizer(row["source"])["input_ids"]), tuple(tokenizer(text_target=row["target"])["input_ids"]))
        for row in rows
    }
    ids, labels = next(pair for pair in trained if pair is not None)
    found = {
        (tuple(a[a != tokenizer.pad_token_id].tolist()), tuple(b[b != -100].tolist()))
        for a, b in zip(ids, labels, strict=True)
    }
    assert found == expected
    assert ids[0, 0] == tokenizer.convert_tokens_to_ids("fra_Latn")
    monkeypatch.setattr(M2M100ForConditionalGeneration, "generate", answers)
    assert command(["evaluate", run, *task, "--split", "dev", "--max-new-tokens", "6"]) == 0
    starts = {tuple(row[:2].tolist()) for output in generated for row in output}
    assert starts == {(tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("deu_Latn"))}


@pytest.mark.parametrize(("target", "match"), [(None, "no target language"), ("xyz_Latn", "language 'xyz_Latn'")])
def test_a_missing_or_unknown_target_language_is_refused(tmp_path, capsys, target, match):
    nllb(tmp_path / "nllb", target)
    toy_pair(tmp_path / "train.jsonl", 4, 0)
    task = ["--task", "translation/source_target", "--data", str(tmp_path), "--split", "train"]
    assert command(["convert", "sparsefinder", str(tmp_path / "nllb"), "-o", str(tmp_path / "run")]) == 0
    for words in (["train"], ["evaluate"]):
        capsys.readouterr()
        assert command([*words, str(tmp_path / "run"), *task]) == 2
        error = capsys.readouterr().err
        assert match in error
        assert "src_lang=" in error


@pytest.mark.long
def test_a_toy_pair_of_languages_is_translated_along_learned_graphs(tmp_path, capsys):
    toy_pair(tmp_path / "train.jsonl", 2000, 0)
    toy_pair(tmp_path / "dev.jsonl", 60, 1)
    torch.manual_seed(0)
    model = translator("marian", width=64, layers=2)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
    method = gw.Sparsefinder(
        grouping="distance", target_sparsity=0.4, samples=200, loss="logistic", projection_epochs=4
    )
    gw.convert(model, method, tokenizer=word_tokenizer()).save(tmp_path / "run")
    task = ["--task", "translation/source_target", "--data", str(tmp_path)]
    words = ["train", str(tmp_path / "run"), *task, "--max-steps", "1000", "--learning-rate", "0.002"]
    assert command([*words, "--per-device-train-batch-size", "32", "--save-steps", "1000"]) == 0
    capsys.readouterr()
    assert (
        command(["evaluate", str(tmp_path / "run"), *task, "--split", "dev", "--max-new-tokens", "10", "--json"]) == 0
    )
    (row,) = json.loads(capsys.readouterr().out)
    measures = gw.evaluate(
        gw.load(tmp_path / "run"),
        ["translation/source_target"],
        data=tmp_path,
        settings=gw.EvaluationSettings(split="dev", max_new_tokens=10, limit=16),
    ).measures["converted"]
    cross = [value for key, value in measures.items() if key.startswith("sparsity/") and "encoder_attn" in key]
    # copies of the source, in any order, score 0
    assert row["bleu"] > 30
    assert len(cross) == 2
    assert all(value > 0.2 for value in cross)
