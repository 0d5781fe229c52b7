"""Scores of explanations over all answers: consistency, simulatability, BERTScore, and what is refused."""

import math
import sys

import pytest
from transformers import AutoTokenizer

from graftwork.demo import shipped_model
from graftwork.errors import ConfigError, MissingExtraError
from graftwork.evaluation.prediction import predict_records
from graftwork.grafting.conversion import convert, converted_of
from graftwork.methods.wt5 import WT5, WT5Config
from graftwork.methods.wt5.explanation_scores import label_consistency, similarity, simulated
from graftwork.methods.wt5.orders import ordered
from graftwork.methods.wt5.own_data import OwnFormat
from graftwork.metrics.bertscore import bert_score
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.tasks.sources import Record
from tiny_models import tiny_model

FORM = OwnFormat(("bad", "good"), spans=False)


def row(key="a", **fields):
    return FORM(Record(key, {"text": f"a film {key}", "label": "bad", "explanations": ("it drags",), **fields}))


@pytest.mark.parametrize("order", ["label_first", "reason_first"])
def test_consistency_compares_with_the_prompt_without_a_request(order):
    rows = [ordered(row(str(n)), order, training=False) for n in range(4)] + [row("p", explain=False)]
    found = [{"label": "bad"} for _ in rows]
    seen = []

    def predict(asked):
        seen.extend(asked)
        return [{"answer": {"label": ("bad", "good")[n == 2]}} for n in range(len(asked))]

    assert label_consistency(rows, found, predict) == {"consistency": 75.0, "consistency_n": 4.0}
    assert [one.input for one in seen] == [f"classify text: a film {n}" for n in range(4)]
    assert all("answer_order" not in one.metadata and not one.metadata["explain"] for one in seen)
    assert found[2]["label_without_explanation"] == "good"
    assert "label_without_explanation" not in found[4]


def test_consistency_is_measured_with_a_model():
    tokenizer = AutoTokenizer.from_pretrained(shipped_model("encoder_decoder"))
    model = tiny_model("t5", vocab_size=len(tokenizer)).float().eval()
    held = convert(converted_of(model, tokenizer), WT5(constrained=True, consistency=True, simulatability=True))
    settings = EvaluationSettings(max_input_tokens=48, max_new_tokens=12, batch_size=4)
    rows = [row(str(n)) for n in range(3)]
    records = predict_records(held, rows, settings, digest="")
    scores = held.methods[-1].examine(model, tokenizer, None, rows, records, settings).scores
    assert scores["consistency_n"] == 3
    assert 0 <= scores["consistency"] <= 100
    assert math.isnan(scores["las"])
    assert scores["las_n"] <= 3


def test_simulatability_needs_one_set_of_labels(capsys):
    entry = {"explanations": ["it drags"], "label": "bad"}
    found = simulated([row(str(n)) for n in range(4)], [entry, entry, {**entry, "explanations": []}, entry])
    assert found["las_n"] == 3
    assert "undefined for 3 answers with an explanation: it needs 10, two labels" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="labels of their own"):
        simulated([row(), row("b", choices=("bad", "fine"))], [entry, entry])


def test_bert_score_needs_its_extra_a_folder_and_free_text(monkeypatch, tmp_path):
    entry = {"explanations": ["it drags"], "gold_explanations": ["it is slow"]}
    with pytest.raises(ConfigError, match="which is no folder of a model"):
        similarity([entry], str(tmp_path), "cpu")
    with pytest.raises(ConfigError, match="free-text explanations only"):
        similarity([{**entry, "source": "it drags"}], str(tmp_path), "cpu")
    monkeypatch.setitem(sys.modules, "bert_score", None)
    with pytest.raises(MissingExtraError, match=r"graftwork\[bertscore\]"):
        similarity([entry], shipped_model("encoder"), "cpu")
    assert math.isnan(similarity([{**entry, "explanations": []}], shipped_model("encoder"), "cpu")["bertscore"])


def test_bert_score_is_that_of_the_package():
    library = pytest.importorskip("bert_score")
    texts, references = ["it drags", "a fine film"], [["it is slow", "it drags"], ["a bad film"]]
    folder = shipped_model("encoder")
    found = bert_score(texts, references, folder, device="cpu")
    one = library.score(["it drags", "a fine film"], ["it drags", "a bad film"], model_type=folder, num_layers=4)
    other = library.score(["it drags"], ["it is slow"], model_type=folder, num_layers=4)
    assert other[2][0] < one[2][0]
    assert found == pytest.approx(100 * float(one[2].mean()), abs=1e-4)


def test_consistency_of_two_prompts_is_refused():
    with pytest.raises(ConfigError, match="consistency is on, which has no effect with explanation_order separate"):
        WT5Config(consistency=True, explanation_order="separate")


def test_token_scores_without_any_span_have_no_area_and_a_word(monkeypatch, capsys):
    fields = {"text": "it drags badly .", "label": "bad", "spans": ((3, 8),)}
    rows = [OwnFormat(("bad", "good"), spans=True)(Record("a", fields))]
    for scores, undefined in (([0.0, 0.0, 0.0, 0.0], True), ([0.0, 1.0, 0.0, 0.0], False)):
        monkeypatch.setattr(WT5, "_token_scores", lambda *given, scores=scores: [scores])
        found = WT5(samples=2)._ranking(None, None, rows, [{}], EvaluationSettings())
        assert math.isnan(found["auprc"]) == undefined
        assert found["ranked_rate"] == (0 if undefined else 100)
        assert ("no sample of any answer names a span" in capsys.readouterr().err) == undefined
