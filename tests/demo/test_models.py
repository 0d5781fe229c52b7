"""The shipped tiny models match their cards."""

import json
import shlex
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LlamaForCausalLM,
    RobertaForMaskedLM,
    T5ForConditionalGeneration,
)

from graftwork.demo.pretraining.decoder import decoder_scores, prompt
from graftwork.demo.pretraining.encoder import LONG, encoder_scores
from graftwork.demo.pretraining.encoder_decoder import HELD_OUT, exact_match, pretraining_rows
from graftwork.demo.pretraining.pretrain import MODELS, build_parser, main
from graftwork.demo.pretraining.tokens import decoder_tokenizer, encoder_decoder_tokenizer, encoder_tokenizer
from graftwork.demo.world.passages import multihop_questions, passages, unseen_questions
from graftwork.demo.world.questions import UNIFIEDQA
from graftwork.demo.world.world import build_world

FOLDERS = Path(str(files("graftwork"))) / "demo" / "models"
LARGEST = 3_000_000
TOLERANCE = 1.5
"""Tolerance in points of exact match, for rounding differences between processors."""
AUTO = {
    "encoder_decoder": (AutoModelForSeq2SeqLM, T5ForConditionalGeneration, encoder_decoder_tokenizer),
    "encoder": (AutoModelForMaskedLM, RobertaForMaskedLM, encoder_tokenizer),
    "decoder": (AutoModelForCausalLM, LlamaForCausalLM, decoder_tokenizer),
}
TEXTS = (
    "where does somebody live? (a) a mill, (b) the north-east",
    "it's 12 o'clock; they don't know <why>",
    "explain sentiment review: the music was truly lovely , in the end .",
    "explain nli hypothesis: a baker feeds a bird . premise: a young baker feeds a duck in the hall .",
)


@pytest.fixture(scope="module")
def world():
    return build_world(0)


@pytest.fixture(scope="module")
def cards():
    return {name: json.loads((FOLDERS / name / "card.json").read_text(encoding="utf-8")) for name in MODELS}


@pytest.fixture(scope="module")
def tokenizers():
    return {name: AutoTokenizer.from_pretrained(FOLDERS / name) for name in MODELS}


@pytest.fixture(scope="module")
def models():
    return {name: AUTO[name][0].from_pretrained(FOLDERS / name, dtype=torch.float32).eval() for name in MODELS}


def test_every_model_of_the_command_line_is_shipped():
    assert set(MODELS) == set(AUTO) == {folder.name for folder in FOLDERS.iterdir()}


@pytest.mark.parametrize("name", MODELS)
def test_folders_are_small_and_store_bfloat16(name):
    assert sum(file.stat().st_size for file in (FOLDERS / name).iterdir()) <= LARGEST
    with safe_open(FOLDERS / name / "model.safetensors", framework="pt") as tensors:
        assert {tensors.get_tensor(key).dtype for key in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118


@pytest.mark.parametrize("name", MODELS)
def test_models_load_with_the_auto_classes(name, models, cards):
    assert type(models[name]) is AUTO[name][1]
    assert models[name].num_parameters() == cards[name]["parameters"]


def test_the_encoder_decoder_has_ungated_relu_layers(models):
    assert not models["encoder_decoder"].config.is_gated_act
    assert models["encoder_decoder"].config.dense_act_fn == "relu"


@pytest.mark.parametrize("name", MODELS)
def test_cards_contain_the_training_command(name, cards):
    words = shlex.split(cards[name]["command"])
    assert words[:3] == ["python", "-m", "graftwork.demo.pretraining.pretrain"]
    options = build_parser().parse_args(words[3:])
    assert (options.model, options.steps, options.seed) == (name, cards[name]["steps"], cards[name]["seed"])
    assert cards[name]["seconds"] > 0
    assert set(cards[name]["versions"]) == {"torch", "transformers"}


@pytest.mark.parametrize("name", MODELS)
def test_tokenizers_are_reproducible_from_the_seed(name, tokenizers, world):
    assert tokenizers[name].get_vocab() == AUTO[name][2](world).get_vocab()


@pytest.mark.parametrize("name", MODELS)
def test_tokenizers_round_trip_text(name, tokenizers, world):
    texts = [*TEXTS, *(q.text for q in unseen_questions(world, "dev")[:50]), *(p.text for p in passages(world)[:50])]
    texts += [q.text for q in multihop_questions(world, "dev")[:50]]
    texts += [row.input for rows_of in UNIFIEDQA.values() for row in rows_of(world, "dev")[:20]]
    for text in texts:
        ids = tokenizers[name](text)["input_ids"]
        assert tokenizers[name].unk_token_id not in ids
        assert tokenizers[name].decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("name", MODELS)
def test_every_word_of_the_world_is_one_token(name, tokenizers, offline_world):
    """Every lower-case word of every file is one token, apart from column names and numbers."""
    paths = ["esnli/esnli_dev.csv", "glue/SST-2/dev.tsv", "wikitext/wiki.valid.raw", "dpr/psgs_w100.tsv"]
    paths += ["questions/test.json", *(f"eraser_movies/docs/{path.name}" for path in docs(offline_world))]
    words = {word for path in paths for word in (offline_world / path).read_text(encoding="utf-8").split()}
    words = {word for word in words if word.isalpha() and word.islower()} - {"pairID", "label", "text", "title", "id"}
    assert len(words) > 500
    assert [word for word in words if len(tokenizers[name].tokenize(f"{word}")) > 1] == []


def docs(world_folder: Path) -> list[Path]:
    return sorted((world_folder / "eraser_movies" / "docs").iterdir())[::10]


def test_the_decoder_tokenizer_keeps_line_breaks_and_adds_one_start_token(tokenizers):
    tokenizer = tokenizers["decoder"]
    text = prompt("Where is it?") + " vanda\n"
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert (
        ids
        == tokenizer(prompt("Where is it?"))["input_ids"] + tokenizer(" vanda\n", add_special_tokens=False).input_ids
    )
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.lower()


def test_the_encoder_accepts_512_tokens(models, tokenizers):
    ids = torch.tensor([tokenizers["encoder"]("the " * LONG, truncation=True)["input_ids"]])
    assert ids.shape == (1, LONG)
    with torch.no_grad():
        assert models["encoder"](input_ids=ids).logits.isfinite().all()


@pytest.mark.parametrize("name", UNIFIEDQA)
def test_the_encoder_decoder_reproduces_the_scores_of_its_card(name, models, tokenizers, cards, world):
    """See `exact_match`; the card contains the expected score."""
    rows = UNIFIEDQA[name](world, "dev")
    reached = exact_match(models["encoder_decoder"], tokenizers["encoder_decoder"], rows)
    assert reached == pytest.approx(cards["encoder_decoder"]["exact_match"][name]["dev"], abs=TOLERANCE)


@pytest.mark.parametrize("name", ["facts", "choice"])
def test_the_encoder_decoder_answers_known_facts(name, cards):
    assert cards["encoder_decoder"]["exact_match"][name]["dev"] >= 85


@pytest.mark.parametrize("name", HELD_OUT)
def test_held_out_question_formats_are_not_in_pretraining(name, cards, world):
    shown = {row.input for rows in pretraining_rows(world) for row in rows}
    assert not shown & {row.input for row in UNIFIEDQA[name](world, "train")}
    assert cards["encoder_decoder"]["exact_match"][name]["dev"] < 30


def test_the_encoder_reproduces_the_scores_of_its_card(models, tokenizers, cards, world):
    reached = encoder_scores(models["encoder"], tokenizers["encoder"], world)["masked"]
    for length, expected in cards["encoder"]["masked"].items():
        assert reached[length]["accuracy"] == pytest.approx(expected["accuracy"], abs=TOLERANCE)
        assert reached[length]["perplexity"] == pytest.approx(expected["perplexity"], rel=0.03)


def test_the_encoder_predicts_most_masked_tokens_at_both_lengths(cards):
    assert cards["encoder"]["masked"]["64"]["accuracy"] >= 60
    assert cards["encoder"]["masked"]["512"]["accuracy"] >= 50


def test_the_decoder_reproduces_the_scores_of_its_card(models, tokenizers, cards, world):
    reached = decoder_scores(models["decoder"], tokenizers["decoder"], world)["exact_match"]
    assert reached == pytest.approx(cards["decoder"]["exact_match"], abs=TOLERANCE)


def test_the_decoder_answers_known_facts_and_guesses_unseen_ones(cards, world):
    reached = cards["decoder"]["exact_match"]
    assert reached["known"] >= 85
    # baseline: always answer the most frequent value of the relation
    questions = unseen_questions(world, "test")
    by_relation: dict[str, list[str]] = {}
    for question in questions:
        by_relation.setdefault(question.fact.relation, []).append(question.fact.value)
    best_guess = sum(max(map(values.count, values)) for values in by_relation.values()) / len(questions)
    assert reached["told"] <= 100 * best_guess


def test_the_command_line_writes_a_folder_that_loads(tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        assert main(["encoder", "-o", str(tmp_path / "made"), "--steps", "5"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert json.loads(capsys.readouterr().out)["steps"] == 5
    assert type(AutoModelForMaskedLM.from_pretrained(tmp_path / "made")) is RobertaForMaskedLM
