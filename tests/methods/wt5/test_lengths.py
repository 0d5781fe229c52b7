"""Lengths that tasks declare: a perfect copy of the target scores 100 by default, and what is cut is counted."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer, ByT5Tokenizer

from graftwork.methods.wt5.grammar import grammar_of
from graftwork.methods.wt5.reading import read_answer
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.lengths import Lengths
from graftwork.settings.training import TrainingSettings
from graftwork.tasks import TASKS, get_task
from graftwork.tasks.lengths import declared_lengths, evaluation_lengths, training_lengths
from graftwork.tasks.offsets import visible_end
from graftwork.tasks.sources import Record
from graftwork.training.cuts import count_cuts
from graftwork.training.encoding import EncodedExamples

SHARED = Path(__file__).parents[3].parent / "shared"
MANY = 1 << 30


@pytest.mark.parametrize(
    ("name", "split", "score"),
    [
        pytest.param("movie_rationales_eval_v010", "validation", "token_f1", marks=pytest.mark.long),
        pytest.param("eraser_multi_rc_eval_v011", "validation", "token_f1", marks=pytest.mark.long),
        pytest.param("esnli_eval_v010", "validation", "bleu", marks=pytest.mark.long),
        ("cos_e_eval_v001", "validation", "bleu"),
    ],
)
def test_the_gold_target_cut_by_the_defaults_scores_at_least_99(name, split, score):
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no real data in {SHARED}")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "t5-tokenizer")
    task = get_task(name)
    examples = task.load(SHARED / "data", split)
    settings = evaluation_lengths(EvaluationSettings(), task, None, positions=MANY)
    encoded = EncodedExamples(
        examples.rows,
        tokenizer,
        encoder_decoder=True,
        max_input_tokens=settings.input_limit,
        max_target_tokens=settings.answer_limit,
    )
    located, texts = [], []
    for index, row in enumerate(examples.rows):
        ids = encoded[index]["labels"]
        located.append(read_answer(tokenizer, grammar_of(tokenizer, row), row, ids))
        texts.append(tokenizer.decode(ids, skip_special_tokens=True))
    scores = task.evaluate(texts, examples, located=located)
    assert scores["accuracy"] == 100
    assert scores[score] >= 99


def test_every_explained_task_declares_the_lengths_of_its_data_set():
    found = {name: get_task(name).lengths for name in TASKS if "/" not in name and get_task(name).new_tokens is None}
    assert found["cos_e_eval_v001_like_esnli"] == Lengths(128, 96)
    assert found["esnli_labels_skip100_v010"] == found["mnli_v002"] == Lengths(512, 256)
    assert found["eraser_multi_rc_eval_v011"] == Lengths(1024, 512)
    assert found["imdb_reviews_eval_v100"] == found["movie_rationales_v010"] == Lengths(2048, 512)
    assert len(found) >= 163


def test_given_lengths_precede_the_training_and_the_training_precedes_the_task():
    task = get_task("movie_rationales_eval_v010")

    def resolved(settings, trained=None, own=task, **room):
        found = evaluation_lengths(settings, own, trained, **{"positions": MANY, **room})
        return found.max_input_tokens, found.max_new_tokens

    trained = TrainingSettings(max_input_tokens=64, max_target_tokens=32)
    assert resolved(EvaluationSettings()) == (2048, 512)
    assert resolved(EvaluationSettings(), trained) == (64, 32)
    assert resolved(EvaluationSettings(max_input_tokens=512), trained) == (512, 32)
    assert resolved(EvaluationSettings(lengths="cos_e", max_new_tokens=19), trained) == (128, 19)
    assert resolved(EvaluationSettings(), positions=1024, causal=True) == (511, 512)
    assert resolved(EvaluationSettings(), own=None) == (512, 19)
    assert resolved(EvaluationSettings(), trained, own=None) == (64, 32)
    # the published tables of UnifiedQA have 19 new tokens whatever the training was
    assert resolved(EvaluationSettings(), TrainingSettings(max_target_tokens=100), own=get_task("unifiedqa/boolq")) == (
        512,
        19,
    )


def test_a_training_has_the_largest_lengths_of_its_tasks_up_to_the_models_positions():
    declared = declared_lengths([get_task("mnli_v002"), get_task("movie_rationales_v010")])
    assert declared == Lengths(2048, 512)

    def resolved(settings, **room):
        found = training_lengths(settings, declared, **{"positions": MANY, **room})
        return found.max_input_tokens, found.max_target_tokens

    assert resolved(TrainingSettings()) == (2048, 512)
    assert resolved(TrainingSettings(max_input_tokens=512)) == (512, 512)
    assert resolved(TrainingSettings(), positions=1024) == (1024, 512)
    assert resolved(TrainingSettings(), positions=512, causal=True) == (255, 256)


def movie(text, spans):
    return get_task("movie_rationales_v010").format(
        Record("a", {"review": text, "label": 1, "span_offsets": tuple(spans)})
    )


def test_an_explanation_beyond_the_cut_input_is_left_out_of_the_target_and_counted():
    tokenizer = ByT5Tokenizer()
    text = "good film . " * 10
    row = movie(text, [(0, 9), (24, 33), (108, 117)])
    start = row.metadata["source_start"]
    # ByT5 has one token for each byte, and one for the end of the text
    limit = start + 34 + 1
    options = {"encoder_decoder": True, "max_target_tokens": 512}
    labels = EncodedExamples([row], tokenizer, max_input_tokens=limit, **options)[0]["labels"]
    assert (
        tokenizer.decode(labels, skip_special_tokens=True) == "positive explanation: good film explanation: good film"
    )
    cuts = count_cuts([row], tokenizer, encoder_decoder=True, input_limit=limit, target_limit=20)
    assert (cuts.inputs, cuts.targets, cuts.explanations, cuts.size) == (1, 1, 1, 1)
    assert cuts.line("movies") == (
        f"movies: 1 of 1 inputs cut after {limit} tokens (the longest has {len(row.input) + 1}); 1 of 1 targets cut "
        f"after 20 tokens (the longest has {len(row.target) + 1}); 1 explanations beyond a cut left out of the targets"
    )
    whole = count_cuts([row], tokenizer, encoder_decoder=True, input_limit=2048, target_limit=512)
    assert whole.line("movies") is None
    plain = replace(row, metadata={**row.metadata, "target_parts": ()})
    assert EncodedExamples([plain], tokenizer, max_input_tokens=2048, **options)[0]["labels"]


@pytest.mark.parametrize("name", ["t5-tokenizer", "gpt2-tokenizer", "bert-base-uncased-tokenizer"])
def test_the_visible_end_is_that_of_the_last_token(name):
    if not (SHARED / "models" / name).is_dir():
        pytest.skip(f"no {name} in {SHARED}")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / name)
    text = "one two three four five"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for kept in range(1, len(ids) + 1):
        end = visible_end(tokenizer, text, kept, automatic=False)
        assert tokenizer(text[:end], add_special_tokens=False)["input_ids"] == ids[:kept]
