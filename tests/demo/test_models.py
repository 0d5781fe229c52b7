"""The shipped tiny models are what their cards say."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5ForConditionalGeneration

from graftwork.demo.pretrain import HELD_OUT, build_tokenizer, exact_match, pretraining_rows
from graftwork.demo.questions import UNIFIEDQA
from graftwork.demo.world import build_world

FOLDER = Path(str(files("graftwork"))) / "demo" / "models" / "encoder_decoder"
LARGEST = 3_000_000
TOLERANCE = 1.5
"""Points of exact match; another processor rounds differently, and one question of dev weighs less than one point."""


@pytest.fixture(scope="module")
def card():
    return json.loads((FOLDER / "card.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForSeq2SeqLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_folder_is_small_and_stores_bfloat16():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= LARGEST
    with safe_open(FOLDER / "model.safetensors", framework="pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_model_loads_as_an_ordinary_t5(model, card):
    assert type(model) is T5ForConditionalGeneration
    assert not model.config.is_gated_act
    assert model.config.dense_act_fn == "relu"
    assert model.num_parameters() == card["parameters"]


def test_tokenizer_gives_text_back(tokenizer):
    texts = [
        "where does somebody live? \\n (a) a mill, (b) the north-east",
        "it's 12 o'clock; they don't know <why>",
        *(row.input for name in UNIFIEDQA for row in UNIFIEDQA[name](build_world(0), "dev")[:50]),
    ]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_is_the_one_that_the_seed_makes(tokenizer):
    assert tokenizer.get_vocab() == build_tokenizer(build_world(0)).get_vocab()


def test_card_tells_how_the_model_was_made(card):
    assert card["command"].startswith("python -m graftwork.demo.pretrain encoder_decoder")
    assert card["steps"] > 0
    assert card["seconds"] > 0
    assert set(card["exact_match"]) == set(UNIFIEDQA)
    assert set(card["versions"]) == {"torch", "transformers"}


@pytest.mark.parametrize("name", UNIFIEDQA)
def test_scores_of_the_card_still_hold(name, model, tokenizer, card):
    reached = exact_match(model, tokenizer, UNIFIEDQA[name](build_world(card["seed"]), "dev"))
    assert reached == pytest.approx(card["exact_match"][name]["dev"], abs=TOLERANCE)


@pytest.mark.parametrize("name", ["facts", "choice"])
def test_model_knows_its_world(name, card):
    assert card["exact_match"][name]["dev"] >= 85


@pytest.mark.parametrize("name", HELD_OUT)
def test_forms_that_are_held_out_are_not_in_pretraining(name, card):
    world = build_world(card["seed"])
    assert not {row.input for row in pretraining_rows(world)} & {row.input for row in UNIFIEDQA[name](world, "train")}
    assert card["exact_match"][name]["dev"] < 30
