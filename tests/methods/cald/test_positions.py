"""Conversion for inputs longer than those of the pretraining."""

import pytest
import torch
import transformers

from graftwork.core.example import Example, Examples
from graftwork.core.run_folder import RunFolder
from graftwork.errors import ConfigError, UnsupportedModelError
from graftwork.grafting.conversion import convert, restore
from graftwork.grafting.converted import write_model
from graftwork.methods.cald import Cald
from graftwork.methods.cald.guides import dense_copy
from graftwork.methods.cald.positions import position_table
from graftwork.pipeline.loading import load
from graftwork.training.running_text import positions_of
from methods.cald.runs import LABELS, model, train, values
from methods.cald.test_edges import roberta
from tiny_models import word_tokenizer

LONG = 40
IDENTITY = {"rank": LONG, "initialization": "identity", "positions": LONG}


def ids(tokens):
    return torch.randint(4, 64, (2, tokens), generator=torch.Generator().manual_seed(tokens))


@torch.no_grad()
def logits(found, tokens):
    return found(input_ids=ids(tokens)).logits


def longer_dense(table):
    """The dense model with another position table, built by transformers."""
    config = model().config
    config.max_position_embeddings = len(table)
    found = transformers.BertForSequenceClassification(config).eval()
    state = model().state_dict()
    name = next(name for name in state if name.endswith("position_embeddings.weight"))
    found.load_state_dict({**state, name: table})
    return found


@pytest.mark.parametrize("extension", ["tile", "interpolate"])
def test_a_longer_model_is_the_dense_one_with_the_extended_table(extension):
    table = position_table(model()).weight.detach()
    if extension == "tile":
        expected = torch.cat([table, table, table])[:LONG]
    else:
        stretched = torch.nn.functional.interpolate(table.T[None], size=LONG, mode="linear", align_corners=True)
        expected = stretched[0].T
    found = model()
    dense = logits(found, 16)
    converted = convert(found, Cald(**IDENTITY, extend_positions=extension), tokenizer=word_tokenizer())
    torch.testing.assert_close(position_table(found).weight, expected)
    torch.testing.assert_close(logits(found, LONG), logits(longer_dense(expected), LONG), rtol=1e-4, atol=1e-5)
    # with tiling, short inputs are computed as before
    same = torch.allclose(logits(found, 16), dense, atol=1e-5)
    assert same == (extension == "tile")
    assert positions_of(found) == LONG <= converted.tokenizer.model_max_length
    assert f"{extension}" in converted.changes[0].after
    copied = dense_copy(found)
    torch.testing.assert_close(logits(copied, LONG), logits(found, LONG), rtol=1e-4, atol=1e-5)
    restore(found)
    assert positions_of(found) == 16
    assert torch.equal(logits(found, 16), dense)


def test_roberta_keeps_the_rows_before_its_first_position():
    found = roberta()
    before = position_table(found).weight.detach().clone()
    convert(found, Cald(rank=4, positions=70))
    table = position_table(found).weight
    assert positions_of(found) == 70
    # one row of padding, then 32 positions, repeated
    torch.testing.assert_close(table, torch.cat([before, before[1:], before[1:]])[:71])
    assert logits(found, 70).isfinite().all()


def test_a_saved_model_reopens_with_its_length_and_is_guided_by_a_short_teacher(dense, tmp_path):
    texts = [" ".join(f"w{4 + (i * j) % 60}" for j in range(1, 31)) for i in range(1, 5)]
    rows = tuple(Example(str(i), text, LABELS[i % 2], (LABELS[i % 2],)) for i, text in enumerate(texts))
    settings = {"rank": 4, "positions": LONG, "extend_positions": "interpolate"}
    converted = convert(model(), Cald(guide="target", teacher=str(dense), **settings), tokenizer=word_tokenizer())
    trained = train(
        converted,
        tmp_path / "run",
        values(max_steps=2, max_input_tokens=LONG),
        Examples("w", "train", rows, 4, 0, "here"),
    )
    write_model(converted, RunFolder(tmp_path / "run"))
    expected = logits(trained.eval(), LONG)
    again = load(tmp_path / "run")
    assert again.changes == converted.changes
    assert torch.equal(logits(again.model, LONG), expected)
    assert (positions_of(again.model), again.tokenizer.model_max_length >= LONG) == (LONG, True)
    folder = tmp_path / "run" / "model"
    opened = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert torch.equal(logits(opened, LONG), expected)


def test_what_cannot_be_extended_is_refused():
    found = model()
    with pytest.raises(ConfigError, match="not above the 16 of Bert"):
        convert(found, Cald(rank=4, extend_positions="tile"))
    config = transformers.EuroBertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        pad_token_id=0,
    )
    rotary = transformers.EuroBertForMaskedLM(config).eval()
    with pytest.raises(UnsupportedModelError, match="positions is 40, and EuroBertForMaskedLM has 16 without a table"):
        convert(rotary, Cald(rank=4, positions=40))
    assert logits(rotary, 16).isfinite().all()
