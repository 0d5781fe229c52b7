"""Automatic rank, and sweeps over the layers to convert."""

import json
import logging

import pytest
import torch

from graftwork.cli.app import run
from graftwork.core.example import Example
from graftwork.errors import ConfigError
from graftwork.grafting.conversion import convert
from graftwork.methods.cald import Cald
from graftwork.methods.cald.calibration import MULTIPLE
from graftwork.methods.cald.modules import LinformerAttention
from graftwork.pipeline.loading import load
from graftwork.pipeline.runner import run_recipe
from graftwork.settings.recipe import RunConfig
from graftwork.settings.training import TrainingSettings
from graftwork.surgery.modules import GRAFT
from graftwork.surgery.sites import attention_sites
from methods.cald.runs import examples, model
from methods.cald.test_commands import graftwork, place
from tiny_models import word_tokenizer

__all__ = ["place"]


def long_rows(count=32, words=(12, 16)):
    return examples(count, words).rows


def kept(rows, layer, rank):
    """Share of the squared entries of a layer's attention maps that the best compression preserves, by SVD."""
    dense, tokenizer, maps = model(), word_tokenizer(), []
    dense.set_attn_implementation("eager")
    for row in rows:
        ids = torch.tensor([tokenizer(row.input)["input_ids"]])
        with torch.no_grad():
            attention = dense(input_ids=ids, output_attentions=True).attentions[layer].double()
        maps.append(torch.nn.functional.pad(attention.flatten(0, 2), (0, 16 - ids.shape[1])))
    energy = torch.linalg.svd(torch.cat(maps)).S.square()
    return float(energy[:rank].sum() / energy.sum())


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_an_automatic_rank_is_the_smallest_per_layer_that_preserves_the_share(share):
    rows = long_rows()
    calibrated = Cald(rank=f"auto:{share}").calibrate(model(), word_tokenizer(), rows)
    ranks = calibrated.config.ranks
    assert len(ranks) == 2
    for layer, rank in enumerate(ranks):
        assert kept(rows, layer, rank) >= share
        assert rank == MULTIPLE or kept(rows, layer, rank - MULTIPLE) < share
    converted = convert(model(), calibrated)
    assert [getattr(site.module, GRAFT).rank for site in attention_sites(converted.model)] == list(ranks)


def test_layers_that_share_a_matrix_get_the_largest_rank_and_dense_layers_none():
    rows = long_rows()
    each = Cald(rank="auto:0.99").calibrate(model(), word_tokenizer(), rows).config.ranks
    one = Cald(rank="auto:0.99", share="layer").calibrate(model(), word_tokenizer(), rows).config
    assert one.rank == max(each)
    second = Cald(rank="auto:0.99", layers="1").calibrate(model(), word_tokenizer(), rows).config
    assert second.rank == each[1:]


def test_a_rank_of_the_length_of_the_examples_is_capped_with_a_warning(caplog):
    rows = [Example(str(number), f"w{number + 4} w9 w12 w40", "low", ("low",)) for number in range(8)]
    with caplog.at_level(logging.WARNING, logger="graftwork"):
        calibrated = Cald(rank="auto:0.9999").calibrate(model(), word_tokenizer(), rows)
    assert calibrated.config.rank == (4, 4)
    assert "have at most 4 tokens" in caplog.text


@pytest.mark.parametrize("rank", ["auto", "auto:", "auto:0", "auto:1", "auto:x", "often", "16"])
def test_an_invalid_automatic_rank_is_refused(rank):
    with pytest.raises(ConfigError, match=r"such as auto:0\.95"):
        Cald(rank=rank)


def test_an_automatic_rank_without_examples_is_refused():
    untouched = model()
    with pytest.raises(ConfigError, match=r"--task and --data\. Nothing was changed"):
        convert(untouched, Cald(rank="auto:0.95"))
    assert all(GRAFT not in name.split(".") for name, _ in untouched.named_modules())


def test_convert_calibrates_the_rank_and_records_it(place, capsys, tmp_path):
    words = ["convert", "cald", place / "encoder", "-o", tmp_path / "run", "--rank", "auto:0.9"]
    code, _, err = graftwork(capsys, *words)
    assert code == 2
    assert "--task" in err
    code, _, err = graftwork(capsys, *words, "--task", place / "train.csv")
    assert code == 0, err
    ranks = load(tmp_path / "run").methods[0].config.rank
    assert len(ranks) == 2
    assert all(isinstance(rank, int) for rank in ranks)


def test_a_recipe_with_an_automatic_rank_resumes(place, tmp_path):
    config = RunConfig(
        model=str(place / "encoder"),
        method={"name": "cald", "rank": "auto:0.9"},
        train=TrainingSettings(tasks=(str(place / "train.csv"),), max_steps=2, per_device_train_batch_size=4),
    )
    first = run_recipe(config, tmp_path / "run")
    again = run_recipe(config, tmp_path / "run")
    assert again.training == first.training
    assert all(isinstance(rank, int) for rank in load(tmp_path / "run").methods[0].config.rank)
    other = RunConfig(
        model=config.model, method={"name": "cald", "rank": "auto:0.9", "share": "kv"}, train=config.train
    )
    with pytest.raises(ConfigError, match="converted with other settings"):
        run_recipe(other, tmp_path / "run")


@pytest.mark.long
def test_a_sweep_over_layers_scores_the_conversion_of_each(place, capsys, tmp_path):
    recipe = tmp_path / "layers.yaml"
    recipe.write_text(
        f"model: {place / 'encoder'}\n"
        "method: {name: cald, rank: 2}\n"
        f"train: {{tasks: [{place / 'train.csv'}], max_steps: 2, per_device_train_batch_size: 4}}\n"
        f"evaluate: {{tasks: [{place / 'dev.csv'}]}}\n"
    )
    words = ["run", recipe, "-o", tmp_path / "out", "--over", "method.layers='0','1',0-1", "--json"]
    assert run([str(word) for word in words]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["setting"] for row in rows] == ["layers=0", "layers=1", "layers=0-1"]
    for folder, converted in (("layers=0", [0]), ("layers=1", [1]), ("layers=0-1", [0, 1])):
        sites = attention_sites(load(tmp_path / "out" / folder).model)
        assert [
            site.layer for site in sites if isinstance(site.module._modules.get(GRAFT), LinformerAttention)
        ] == converted
