"""Own explained data by command: three commands from a table to a page."""

import csv
import json
from pathlib import Path

import pytest

from graftwork.demo import shipped_model

SHARED = Path(__file__).parents[2].parent / "shared"
COLUMNS = ("--text-field", "text", "--label-field", "label", "--spans-field", "rationale")


def movie_sentences(count):
    """Sentences of the real movie reviews that contain an annotated rationale, both classes equally often."""
    folder = SHARED / "data" / "eraser_movies"
    found = {"NEG": {}, "POS": {}}
    for line in (folder / "train.jsonl").read_text().splitlines():
        value = json.loads(line)
        sentences = [line.split() for line in (folder / "docs" / value["annotation_id"]).read_text().split("\n")]
        for quote in (entry["text"].split() for group in value["evidences"] for entry in group):
            size = len(quote)
            for words in sentences if 2 <= size <= 8 else ():
                inside = any(words[start : start + size] == quote for start in range(len(words) - size + 1))
                if inside and max(6, size + 1) <= len(words) <= 25:
                    found[value["classification"]].setdefault(" ".join(words), " ".join(quote))
    named = (("negative", "NEG"), ("positive", "POS"))
    return [(text, label, quote) for label, name in named for text, quote in list(found[name].items())[: count // 2]]


def write(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label", "rationale"), *rows])


@pytest.mark.long
@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder"])
def test_three_commands_lead_from_200_sentences_to_a_page(graftwork, tmp_path, monkeypatch, kind):
    if not (SHARED / "data").is_dir():
        pytest.skip(f"no real data in {SHARED}")
    monkeypatch.chdir(tmp_path)
    rows = movie_sentences(200)
    assert len(rows) == 200
    write(Path("mine.csv"), rows)
    options = ("--validation", "0.1", "--max-steps", "12", "--per-device-train-batch-size", "8")
    lora = ("--set", "train.lora={r: 4, target_modules: [q_proj, v_proj]}") if kind == "decoder" else ()
    assert graftwork("convert", "wt5", shipped_model(kind), "-o", "run", "--dtype", "float32").code == 0
    trained = graftwork("train", "run", "--task", "mine.csv", *COLUMNS, *options, *lora)
    assert trained.code == 0, trained.err
    assert "200 rows, 200 of them explained" in trained.err
    method = ("--set", "method.constrained=true", "--set", "method.faithfulness=true")
    scored = graftwork("evaluate", "run", "--task", "mine", "--report", "--max-new-tokens", "24", *method, "--json")
    assert scored.code == 0, scored.err
    (record,) = json.loads(scored.out)
    assert record["size"] == 20
    # a model of 12 steps may give no reason, and every reason that it gives is found
    assert record["parsed_rate"] == record.get("spans_found", 100) == 100
    page = Path("run/explanations.html").read_text()
    assert page.count("<article") == 20
    assert page.count("<mark class=") >= 20
    results = json.loads(Path("run/results.json").read_text())
    assert results["rows"][0]["cut"]["size"] == 20


@pytest.mark.long
def test_a_task_file_is_a_task_for_other_models_and_formats_texts(graftwork, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path("mine.csv"), [(f"a lazy film {n}", "bad", "lazy") for n in range(4)] + [("a fine one", "good", "fine")])
    model = shipped_model("encoder_decoder")
    assert graftwork("convert", "wt5", model, "-o", "run", "--dtype", "float32").code == 0
    assert graftwork("train", "run", "--task", "mine.csv", *COLUMNS, "--max-steps", "1").code == 0
    constrained = ("--set", "method.constrained=true", "--max-new-tokens", "16")
    found = graftwork("predict", "run", "a fine day", "--json", *constrained)
    assert found.code == 0, found.err
    answer = json.loads(found.out)
    assert answer["label"] in ("bad", "good")
    assert answer["input"] == "explain classify text: a fine day"
    Path("new.csv").write_text("text\na lazy day\n")
    found = graftwork("predict", "run", "--input", "new.csv", "--json", *constrained)
    assert found.code == 0, found.err
    assert json.loads(found.out)["label"] in ("bad", "good")
    assert graftwork("convert", "wt5", model, "-o", "other", "--dtype", "float32").code == 0
    task = "run/tasks/mine.task.yaml"
    assert graftwork("train", "other", "--task", task, "--max-steps", "1").code == 0
    assert graftwork("evaluate", "other", "--task", task, "--max-new-tokens", "8", "--limit", "2").code == 0
    assert "Leave the setting out" in graftwork("evaluate", "other", "--task", task, *COLUMNS).err


@pytest.mark.long
@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder"])
def test_the_data_of_distilling_step_by_step_train_and_evaluate(graftwork, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    Path("llm").mkdir()
    rows = [{"input": f"a {('lazy', 'fine')[n % 2]} film {n}", "label": ("bad", "good")[n % 2]} for n in range(24)]
    outputs = [f"The film is {('lazy', 'fine')[n % 2]}. So the answer is (a) {row['label']}.\n\nQ: A" for n, row in
               enumerate(rows)]  # fmt: skip
    outputs[5] = "I do not know."
    Path("train.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for part in range(2):
        Path(f"llm/train_CoT_{part}.json").write_text(json.dumps(outputs[12 * part : 12 * part + 12]))
    files = ("--teacher-outputs", "llm/train_CoT_0.json", "--teacher-outputs", "llm/train_CoT_1.json")
    columns = ("--text-field", "input", "--label-field", "label", *files)
    order = ("--explanation-order", "separate", "--alpha", "0.5")
    assert graftwork("convert", "wt5", shipped_model(kind), "-o", "run", "--dtype", "float32", *order).code == 0
    options = ("--validation", "0.25", "--max-steps", "4", "--logging-steps", "2")
    trained = graftwork("train", "run", "--task", "train.json", *columns, *options)
    assert trained.code == 0, trained.err
    assert "23 of 24 outputs of the teacher kept; left out: 0 with another label, 1 without" in trained.err
    log = [json.loads(line) for line in Path("run/train/finetune/log.jsonl").read_text().splitlines()]
    assert any({"label_loss", "explanation_loss"} <= row.keys() for row in log)
    method = ("--set", "method.constrained=true", "--max-new-tokens", "24", "--json")
    plain = graftwork("evaluate", "run", "--task", "train", *method)
    assert plain.code == 0, plain.err
    (record,) = json.loads(plain.out)
    assert (record["size"], record["parsed_rate"]) == (6, 100)
    assert record.get("bleu") is None
    asked = graftwork("evaluate", "run", "--task", "train", "--explain", "--report", *method)
    assert asked.code == 0, asked.err
    (with_reasons,) = json.loads(asked.out)
    # the label does not depend on the explanation
    assert with_reasons["accuracy"] == record["accuracy"]
    assert isinstance(with_reasons["bleu"], float)
    predicted = graftwork("predict", "run", "a lazy day", *method)
    answer = json.loads(predicted.out)
    assert answer["prediction"] == answer["label"]
    assert answer["label"] in ("bad", "good")
    assert "second_input" in json.loads(graftwork("predict", "run", "a lazy day", "--explain", *method).out)
