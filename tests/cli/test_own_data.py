"""Own data by command: formats that people have are trained on, evaluated and answered, or refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from graftwork.demo import shipped_model
from own_data_files import FACTS, json_lines, parquet, table, write_files

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
STEPS = ("--max-steps", "2", "--per-device-train-batch-size", "2")
SHORT = ("--max-new-tokens", "4")
COLUMNS = ("--input-field", "ask", "--target-field", "reply", "--target-field", "also")


@pytest.fixture
def command(graftwork) -> Callable[..., Any]:
    """Runs one command line and checks its exit code."""

    def call(*words: str, code: int = 0) -> Any:
        found = graftwork(*words)
        assert found.code == code, found.err
        return found

    return call


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    write_files(folder)
    (folder / "template.jinja").write_text(TEMPLATE)
    return folder


def test_show_prints_own_data_as_a_model_gets_it(command, own):
    found = command("show", str(own / "faq.csv"), *COLUMNS[:4], "-n", "1", "--json")
    assert json.loads(found.out) == [{"id": "0", "input": FACTS[0][0], "target": "green"}]
    assert found.err.endswith("faq.csv: CSV, ask → reply, 4 rows\n")
    assert "input_field" in command("show", str(own / "faq.csv"), "--input-field", "asks", code=1).err


@pytest.mark.long
def test_columns_are_recorded_and_inherited(command, own, tmp_path):
    run, faq = str(tmp_path / "run"), str(own / "faq.csv")
    command("convert", "topk", shipped_model("encoder_decoder"), "-o", run, "--feed-forward-k", "16")
    command("train", run, "--task", faq, *COLUMNS, *STEPS)
    recorded = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert (recorded["train"]["input_field"], recorded["train"]["target_field"]) == ("ask", ["reply", "also"])
    assert recorded["notes"] == [f"data {faq}: CSV, ask → reply, also, 4 rows"]
    found = command("evaluate", run, "--task", faq, *SHORT)
    assert f"Columns as in the training of {run}: input_field ask; target_field reply, also" in found.err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["rows"][0]["notes"] == [f"Data {faq}: CSV, ask → reply, also, 4 rows"]
    asked = tmp_path / "asked.csv"
    asked.write_bytes(table(["ask"], [("who?",)]))
    assert json.loads(command("predict", run, "-i", str(asked), *SHORT).out)["input"] == "who?"
    plain = tmp_path / "plain.txt"
    plain.write_text("why?\n")
    found = command("predict", run, "-i", str(plain), *SHORT)
    assert json.loads(found.out)["input"] == "why?"
    assert "Columns" not in found.err
    # columns of the command win over those of the training
    other = tmp_path / "other.jsonl"
    other.write_bytes(json_lines([{"q": "where?", "a": "here"}]))
    failed = command("evaluate", run, "--task", str(other), *SHORT, code=1)
    assert "line 1: found the columns q, a; expected 'ask', named by input_field" in failed.err
    command("evaluate", run, "--task", str(other), "--input-field", "q", "--target-field", "a", *SHORT)
    # the recorded run can be repeated
    command("run", run)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
def test_every_format_is_trained_on_evaluated_and_answered(command, own, tmp_path, kind):
    command("convert", "topk", shipped_model(kind), "-o", str(tmp_path / "base"), "--feed-forward-k", "16")
    chat = ("--chat-template", str(own / "template.jinja"))
    cases = {
        "alpaca_data.json": (),
        "sharegpt.json": chat,
        "messages.jsonl.gz": chat,
        "gsm8k.jsonl.zst": (),
        "dev-v1.1.json": (),
        "dev-v2.0.json": (),
        "questions.parquet": ("--as-chat", *chat),
        "prompts.jsonl": (),
        "reviews.csv": (),
        "faq.csv": COLUMNS,
    }
    for name, options in cases.items():
        run, path = str(tmp_path / name), str(own / name)
        shutil.copytree(tmp_path / "base", run)
        command("train", run, "--task", path, *options, *STEPS)
        rows = json.loads(command("evaluate", run, "--task", path, *SHORT, "--json").out)
        answers = command("predict", run, "-i", path, *SHORT).out.splitlines()
        assert [row["size"] for row in rows] == [len(answers)], name
    missing = command("train", str(tmp_path / "base"), "--task", str(own / "sharegpt.json"), *STEPS, code=2)
    assert "a tokenizer without a chat template" in missing.err
    assert missing.err.count("ConfigError") == 1


@pytest.mark.long
def test_a_table_with_other_names_trains_a_classifier(command, own, tmp_path):
    run = str(tmp_path / "run")
    reviews = tmp_path / "reviews.parquet"
    words = [("A fine, warm film.", 5), ("Dull.", 1)] * 4
    reviews.write_bytes(parquet({"review": [text for text, _ in words], "stars": [stars for _, stars in words]}))
    columns = ("--input-field", "review", "--label-field", "stars")
    options = ("--task", str(reviews), *columns)
    command("convert", "topk", shipped_model("encoder"), "-o", run, "--feed-forward-k", "16", *options)
    command("train", run, *options, *STEPS)
    rows = json.loads(command("evaluate", run, "--task", str(reviews), "--json").out)
    assert (rows[0]["size"], rows[0]["accuracy"] in (0.0, 50.0, 100.0)) == (8, True)
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "1", "1": "5"}


@pytest.mark.long
def test_a_folder_of_a_data_set_is_read_by_configuration_and_split(command, tmp_path):
    folder = tmp_path / "colours"
    (folder / "data").mkdir(parents=True)
    columns = {"question": [q for q, _ in FACTS], "answer": [a for _, a in FACTS]}
    for split in ("train", "validation"):
        (folder / "data" / f"{split}-00000-of-00001.parquet").write_bytes(parquet(columns))
    name = f"hub:{folder}"
    found = command("show", name, "--split", "dev", "-n", "1", "--json")
    assert json.loads(found.out)[0]["target"] == "green"
    run = str(tmp_path / "run")
    command("convert", "topk", shipped_model("encoder_decoder"), "-o", run, "--feed-forward-k", "16")
    command("train", run, "--task", name, *STEPS, "--validation", "dev", "--eval-steps", "2", "--save-steps", "2")
    rows = json.loads(command("evaluate", run, "--task", name, *SHORT, "--json").out)
    assert (rows[0]["task"], rows[0]["split"], rows[0]["size"]) == ("colours", "dev", 4)
    assert "found no split 'test'" in command("evaluate", run, "--task", f"{name}::test", code=1).err
    assert "hub:nobody/nothing: found no split" in command("evaluate", run, "--task", "hub:nobody/nothing", code=1).err
