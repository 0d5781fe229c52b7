"""Translation: readers of parallel text, scores of sacrebleu, and tokenizers with another vocabulary for targets."""

import json

import pytest
import sacrebleu

from graftwork.core.example import Example, Examples
from graftwork.errors import DataError
from graftwork.tasks import TASKS
from graftwork.tasks.translation import ParallelText, translation_scores
from graftwork.training.encoding import EncodedExamples, target_language
from tiny_models import word_tokenizer

SENTENCES = [("a house", "ein Haus"), ("two dogs", "zwei Hunde")]


def texts(records):
    return [(row.fields["source"], row.fields["target"]) for row in records.rows]


def test_three_formats_are_read_in_both_directions(tmp_path):
    for name in ("files", "tsv", "jsonl", "hub"):
        (tmp_path / name).mkdir()
    (tmp_path / "files" / "valid.en").write_text("a house\ntwo dogs\n\n")
    (tmp_path / "files" / "valid.de").write_text("ein Haus\nzwei Hunde\n\n")
    (tmp_path / "tsv" / "dev.tsv").write_text("de\ten\nein Haus\ta house\nzwei Hunde\ttwo dogs\n")
    rows = [{"en": source, "de": target} for source, target in SENTENCES]
    (tmp_path / "jsonl" / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "hub" / "dev.jsonl").write_text("".join(json.dumps({"translation": row}) + "\n" for row in rows))
    for name in ("files", "tsv", "jsonl", "hub"):
        assert texts(ParallelText("en", "de")(tmp_path / name, "dev")) == SENTENCES
        assert texts(ParallelText("de", "en")(tmp_path / name, "dev")) == [pair[::-1] for pair in SENTENCES]
    loaded = TASKS.get("translation/en_de").load(tmp_path / "tsv", "dev")
    assert [(row.input, row.target) for row in loaded.rows] == SENTENCES


def test_malformed_files_are_refused(tmp_path):
    read = ParallelText("en", "de")
    with pytest.raises(DataError, match=r"Expected train\.en and train\.de"):
        read(tmp_path, "train")
    (tmp_path / "train.en").write_text("one\ntwo\n")
    (tmp_path / "train.de").write_text("eins\n")
    with pytest.raises(DataError, match=r"has 2 lines and .* has 1"):
        read(tmp_path, "train")
    (tmp_path / "test.jsonl").write_text('{"en": "one", "fr": "un"}\n')
    with pytest.raises(DataError, match=r"line 1: found en, fr\. Expected the texts en and de"):
        read(tmp_path, "test")


def test_scores_are_those_of_sacrebleu():
    predictions = ["the cat sat on the mat today", "a dog, barked!"]
    references = ["the cat sat on a mat today", "a dog barked!"]
    rows = tuple(Example(str(n), "x", text) for n, text in enumerate(references))
    examples = Examples("t", "dev", rows, 2, 0, None)
    found = translation_scores(predictions, examples)
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(predictions, [references]).score)
    assert found["chrf"] == pytest.approx(sacrebleu.corpus_chrf(predictions, [references]).score)
    note = TASKS.get("translation/en_de").metrics[0].note()
    assert "tok:13a" in note
    assert "chrF2" in note


class TwoVocabularies:
    """Tokenizer whose targets have ids of their own, as Marian's, and a language token, as NLLB's."""

    eos_token_id, bos_token_id, tgt_lang = 1, None, "deu"

    def __call__(self, text=None, text_target=None, **options):
        given, first = (text, 100) if text_target is None else (text_target, 200)
        ids = [[first + len(word) for word in line.split()] for line in ([given] if isinstance(given, str) else given)]
        return {"input_ids": ids[0] if isinstance(given, str) else ids}

    def convert_tokens_to_ids(self, token):
        return {"deu": 7}[token]


def test_targets_use_the_vocabulary_and_the_language_of_targets():
    rows = [Example("0", "a house", "ein Haus")]
    encoded = EncodedExamples(rows, TwoVocabularies(), encoder_decoder=True, max_input_tokens=8, max_target_tokens=3)[0]
    assert encoded == {"input_ids": [101, 105], "labels": [7, 203, 1]}
    assert target_language(word_tokenizer()) is None
