"""Users' own files: formats recognised from content, mapped columns, and one clear line for everything else."""

from __future__ import annotations

import gzip
import json

import pytest

from graftwork.core.config import build
from graftwork.core.example import Example, Examples
from graftwork.errors import ConfigError, DataError
from graftwork.settings.evaluation import EvaluationSettings
from graftwork.settings.fields import DataFields
from graftwork.settings.training import TrainingSettings
from graftwork.tasks.inputs import input_rows, read_inputs
from graftwork.tasks.loading import check_tasks, load_tasks, load_training, load_validation
from graftwork.tasks.naming import class_labels, named_tasks
from graftwork.tasks.task import Task
from graftwork.tasks.templates import parse_template
from own_data_files import FACTS, files, gsm8k, json_lines, parquet, squad, table, write_files


def load(path, **fields) -> tuple[Task, Examples]:
    [(task, examples)] = load_tasks([str(path)], None, "train", 0, fields=DataFields(**fields))
    return task, examples


def first(path, **fields) -> Example:
    return load(path, **fields)[1].rows[0]


def refused(path, **fields) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        load(path, **fields)
    return str(caught.value)


KINDS = {
    "alpaca_data.json": ("JSON array, Alpaca format, instruction, input → output, 5 rows", "green"),
    "sharegpt.json": ("JSON array, chat format, conversations → assistant turns, 4 rows", "green"),
    "messages.jsonl.gz": ("JSON lines, chat format, messages → assistant turns, 4 rows", "green"),
    "gsm8k.jsonl": ("JSON lines, GSM8K format, question → answer, scored after ####, 4 rows", "20"),
    "gsm8k.jsonl.bz2": ("JSON lines, GSM8K format, question → answer, scored after ####, 4 rows", "20"),
    "gsm8k.jsonl.xz": ("JSON lines, GSM8K format, question → answer, scored after ####, 4 rows", "20"),
    "gsm8k.jsonl.zst": ("JSON lines, GSM8K format, question → answer, scored after ####, 4 rows", "20"),
    "dev-v1.1.json": ("SQuAD JSON, SQuAD format, question, context → answers, 4 rows", "green"),
    "dev-v2.0.json": ("SQuAD JSON, SQuAD format, question, context → answers, 5 rows", "green"),
    "questions.parquet": ("Parquet, question and answer format, question → answer, 4 rows", "green"),
    "prompts.jsonl": ("JSON lines, prompt and completion format, prompt → completion, 4 rows", "green"),
    "reviews.csv": ("CSV, classes format, text → label, 2 rows", "good"),
}


def test_formats_are_recognised_from_content_and_the_guess_is_printed(tmp_path, capsys):
    paths = write_files(tmp_path)
    assert set(KINDS) | {"faq.csv"} == set(files())
    for name, (line, answer) in KINDS.items():
        # the suffix is not needed, apart from that of a table
        plain = tmp_path / f"copy_{name.replace('.', '_')}"
        plain.write_bytes(paths[name].read_bytes())
        for path in (paths[name], plain):
            _, examples = load(path)
            assert capsys.readouterr().err == f"{path}: {line}\n"
            assert (examples.rows[0].answers[0], examples.ignored) == (answer, 0)
            assert len(examples.rows) == int(line.split()[-2])
            load(path)
            assert capsys.readouterr().err == ""


def test_alpaca_rows_have_the_prompt_of_its_authors(tmp_path):
    rows = load(write_files(tmp_path)["alpaca_data.json"])[1].rows
    assert rows[0].input == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nWhat is the colour of grass?\n\n### Response:"
    )
    assert rows[4].input == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nName the colour.\n\n### Input:\n"
        "a lemon\n\n### Response:"
    )


def test_the_last_assistant_turn_is_the_reference(tmp_path, write):
    row = first(write_files(tmp_path)["sharegpt.json"])
    assert row.key == "c0"
    assert row.metadata["turns"][-2:] == (("user", FACTS[0][0]), ("assistant", "green"))
    assert row.input == "user: Hello.\nassistant: Hello, ask me.\nuser: What is the colour of grass?"
    again = {"role": "user", "content": "And?"}
    asked = {"role": "user", "content": "Hi"}
    said = {"role": "assistant", "content": "Ho"}
    path = write("open.jsonl", json_lines([{"messages": [asked, said, again]}] * 2))
    assert first(path).metadata["turns"] == (("user", "Hi"), ("assistant", "Ho"))
    # an open question is answered in prediction
    [row, _] = read_inputs(path, EvaluationSettings())
    assert (row.metadata["turns"][-1], row.answers) == (("user", "And?"), ())


def test_the_final_answer_of_gsm8k_is_scored(tmp_path):
    task, examples = load(write_files(tmp_path)["gsm8k.jsonl"])
    assert examples.rows[3].answers == ("1000",)
    assert examples.rows[3].target == gsm8k()[3]["answer"]
    # 20 with words around it, the number alone without its mark, 50 with a currency, 1,000 with a comma
    predictions = ["2 * 10 = 20\n#### 20", "30", "#### $50.", "so #### 1,000\nEnd"]
    assert task.evaluate(predictions, examples) == {"accuracy": 75.0}


def test_unanswerable_questions_have_the_empty_answer(tmp_path):
    paths = write_files(tmp_path)
    task, examples = load(paths["dev-v2.0.json"])
    assert examples.rows[4].answers == ("",)
    assert examples.rows[0].answers == ("green",)
    assert task.evaluate(["green", "white", "black", "blue", ""], examples) == {"exact_match": 80.0, "f1": 80.0}
    assert examples.rows[0].input.startswith("question: What is the colour of grass? context: Grass is green")


def test_columns_are_mapped_by_name_template_and_nested_field(tmp_path, write):
    path = write_files(tmp_path)["faq.csv"]
    row = first(path, input_field="ask", target_field=("reply", "also"))
    assert (row.input, row.target, row.answers) == (FACTS[0][0], "green", ("green", "it is green"))
    row = first(path, input_template=r"{{Q}}: {ask}\nA:", target_template="{reply} or {also}")
    assert (row.input, row.target) == ("{Q}: What is the colour of grass?\nA:", "green or it is green")
    task, examples = load(path, input_field="ask", label_field="reply")
    assert (task.labels, examples.rows[1].target) == (("black", "green", "red", "white"), "white")
    nested = write("n.jsonl", json_lines([{"data": {"q": "why {x}"}, "a": {"text": ["b", "c"]}, "p": [{"t": "d"}]}]))
    row = first(nested, input_field="data.q", target_field=("a.text", "p.t"))
    assert (row.input, row.answers) == ("why {x}", ("b", "c", "d"))
    context = write("c.csv", table(["q", "passage", "a"], [("who?", "It was I.", "I")]))
    row = first(context, input_field="q", context_field="passage", target_field=("a",))
    assert row.input == "question: who? context: It was I."
    pair = write("p.csv", table(["x", "y", "z"], [("a", "b", "1"), ("c", "d", "0")]))
    assert load(pair, input_field="x", pair_field="y", label_field="z")[1].rows[0].pair == "b"


def test_options_are_lettered_and_the_nearest_one_is_scored(write):
    arc = {"question": "Which?", "choices": {"text": ["a cat", "a dog"], "label": ["A", "B"]}, "answerKey": "B"}
    task, examples = load(write("arc.jsonl", json_lines([arc, {**arc, "answerKey": "a cat"}])))
    assert [row.input for row in examples.rows] == ["Which? (A) a cat (B) a dog"] * 2
    assert [row.target for row in examples.rows] == ["a dog", "a cat"]
    assert task.evaluate(["the dog", "the dog"], examples) == {"accuracy": 50.0, "exact_match": 50.0}
    mmlu = [{"q": "2?", "options": ["one", "two"], "right": 1}]
    path = write("mmlu.jsonl", json_lines(mmlu))
    assert first(path, input_field="q", choices_field="options", target_field=("right",)).target == "two"
    row = first(path, input_template="{q} {choices}", choices_field="options", target_field=("right",))
    assert row.input == "2? (A) one (B) two"
    wrong = write("wrong.jsonl", json_lines([{**mmlu[0], "right": 2}]))
    found = refused(wrong, input_field="q", choices_field="options", target_field=("right",))
    assert "line 1: found 2 as field 'right'; expected a position from 0 to 1" in found


def test_unknown_columns_are_named_with_those_that_exist(tmp_path):
    path = write_files(tmp_path)["faq.csv"]
    assert refused(path, input_field="asks", target_field=("reply",)) == (
        f"{path}, line 2: found the columns ask, reply, also; expected 'asks', named by input_field. "
        "Did you mean 'ask'?"
    )
    found = refused(path, input_template="{question}", target_field=("reply",))
    assert f"{path}, line 2: found the columns ask, reply, also; expected 'question', named by input_template" in found


def test_ambiguous_data_is_refused_with_what_to_pass(tmp_path, write):
    third = write("third.csv", table(["text", "label", "rationale"], [("a", "x", "b"), ("c", "y", "d")]))
    message = refused(third)
    assert "beside 'label' there are 2 columns, text, rationale. If one of them explains the label" in message
    assert "--text-field, --label-field, and --explanation-field or --spans-field" in message
    assert "found CSV with the columns ask, reply, also" in refused(write_files(tmp_path)["faq.csv"])
    both = write("both.jsonl", json_lines([{"question": "q", "answer": "a", "answers": ["b"]}]))
    assert "fit several formats: question and answer (question → answer); question and answer" in refused(both)
    label = write("label.jsonl", json_lines([{"question": "q", "answer": "a", "label": 1}]))
    assert "fit several formats" in refused(label)
    chat = write("chat.jsonl", json_lines([{"messages": [{}], "prompt": "p", "completion": "c"}]))
    assert "fit several formats: chat (messages → assistant turns); prompt and completion" in refused(chat)
    assert first(both, input_field="question", target_field=("answer",)).target == "a"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,label\na,b\nc\n", "line 3: found 1 cells; expected 2 (text, label)"),
        ("a.csv", b'text,label\na,b\n"c,d\ne,f\n', "line 3: found broken quoting"),
        ("a.csv", b"text,text\na,b\n", "line 1: found the column 'text' twice"),
        ("a.csv", b"", "found an empty file"),
        ("a.csv", b"text,label\n", "found no row"),
        ("a.csv", "text,label\nä,b\n".encode("latin-1"), "line 2: found byte 0xe4 at position 0; expected UTF-8"),
        ("a.csv", "text,label\na,b\n".encode("utf-16"), "found UTF-16; convert it"),
        ("a.jsonl", json_lines([{"question": 5, "answer": "a"}]), "line 1: found 5 as field 'question'; expected a te"),
        ("a.jsonl", json_lines([{"question": "q", "answer": "a"}, {"question": "r"}]), "line 2: found the columns que"),
        ("a.jsonl", json_lines([{"question": "q", "answer": []}]), "line 1: found no answer; expected at least one"),
        ("a.jsonl", b'{"question": "q", "answer": "a"}\n{"question\n', "line 2: found"),
        ("a.json", b'[{"question": "q", "answer": "a"}, 3]', "item 2: found 3; expected an object"),
        ("a.json", b'[{"question": "q", ', "found Expecting property name"),
        (
            "a.json",
            json.dumps({"data": [{"paragraphs": [{"qas": 1}]}]}).encode(),
            "paragraphs 1: found 1 as field 'qas'",
        ),
        ("a.gz", files()["messages.jsonl.gz"][:-20], "found damaged compressed data"),
        ("a.gz", b"\x1f\x8b" + b"?" * 40, "found damaged or truncated gzip data"),
        ("a.bz2", files()["gsm8k.jsonl.bz2"][:-20], "found damaged compressed data"),
        ("a.bz2", b"BZh9" + b"?" * 40, "found damaged or truncated bzip2 data"),
        ("a.xz", files()["gsm8k.jsonl.xz"][:-20], "found damaged compressed data"),
        ("a.xz", b"\xfd7zXZ\0" + b"?" * 40, "found damaged or truncated xz data"),
        ("a.zst", files()["gsm8k.jsonl.zst"][:-20], "found damaged or truncated Zstandard data"),
        (
            "a.jsonl",
            json_lines([{"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}]),
            "line 1: found tool calls in messages[0]; expected text only",
        ),
        ("a.parquet", parquet({"question": ["q"], "answer": ["a"]})[:-30], "found damaged or truncated Parquet data"),
        (
            "a.parquet",
            parquet({"question": ["q", None], "answer": ["a", "b"]}),
            "row 2: found None as field 'question'",
        ),
        ("a.bin", b"PK\x03\x04....", "found a ZIP archive; unpack it"),
        ("a.jsonl", json_lines([{"messages": [{"role": "boss", "content": "x"}]}]), "line 1: found the role 'boss' in"),
        ("a.jsonl", json_lines([{"messages": [{"role": "user", "content": "x"}]}]), "line 1: found no assistant turn"),
        (
            "a.jsonl",
            json_lines([{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}]),
            "expected a part of type text",
        ),
    ],
)
def test_bad_files_end_in_one_line_with_file_and_place(write, name, content, message):
    path = write(name, content)
    found = refused(path)
    assert found.startswith(str(path))
    assert message in found
    assert "\n" not in found


def test_one_target_needs_no_list():
    found = build(TrainingSettings, {"input_field": "a", "target_field": "bc"}, where="run.yaml")
    assert found.target_field == ("bc",)
    assert found.given == {"input_field": "a", "target_field": ("bc",)}


def test_contradicting_settings_are_refused():
    with pytest.raises(ConfigError, match=r"input_field .* and input_template .* exclude each other"):
        TrainingSettings(input_field="a", input_template="{a}")
    with pytest.raises(ConfigError, match="Found target_field without an input"):
        EvaluationSettings(target_field=("a",))
    with pytest.raises(ConfigError, match=r"messages_field .* exclude"):
        DataFields(input_field="a", messages_field="b")
    settings = TrainingSettings(tasks=("unifiedqa/boolq",), input_field="question")
    with pytest.raises(ConfigError, match="Found input_field without own data: unifiedqa/boolq has a fixed format"):
        check_tasks(settings.tasks, None, settings)


def test_data_sets_that_cannot_be_told_apart_or_held_out_are_refused(write):
    one = write("one.csv", "text,label\na,b\nc,b\n")
    with pytest.raises(DataError, match="one: found one class, b; expected at least 2"):
        class_labels([str(one)], None)
    other = write("other/one.csv", "text,label\na,b\nc,d\n")
    with pytest.raises(ConfigError, match="both with the task name 'one'; expected different names"):
        load_tasks([str(one), str(other)], None, "train", 0)
    settings = TrainingSettings(tasks=(str(other),), validation="dev")
    with pytest.raises(ConfigError, match="validation split 'dev' for one, a file without splits"):
        load_validation(settings, None, 0)


def test_compressed_text_is_text(write):
    path = write("lines.txt.gz", gzip.compress(b"{one}\ntwo\n"))
    assert [row.input for row in read_inputs(path, EvaluationSettings())] == ["{one}", "two"]
    [(task, _)] = load_tasks([str(path)], None, "train", 0)
    assert task.running_text


@pytest.mark.parametrize("text", ["{a", "a}", "{}", "{a!r}", "{a:>3}", "no column"])
def test_malformed_templates_are_refused(text):
    with pytest.raises(ConfigError, match="input_template is"):
        parse_template(text, "input_template")


def test_values_are_inserted_into_templates_literally():
    template = parse_template(r"\\n{a}\t{b}\x{{{a}}}", "input_template")
    assert template.columns == ("a", "b")
    assert template.fill({"a": r"{b}\n", "b": "1"}.__getitem__) == "\\n{b}\\n\t1\\x{{b}\\n}"


def test_results_and_runs_name_the_mapping(tmp_path):
    path = write_files(tmp_path)["faq.csv"]
    settings = TrainingSettings(tasks=(str(path),), input_field="ask", target_field=("reply",))
    assert load_training(settings, None, 0).notes == (f"data {path}: CSV, ask → reply, 4 rows",)
    [(task, split)] = named_tasks(str(path), "dev", settings)
    assert (task.name, split, task.description) == ("faq", "all", f"{path}: CSV, ask → reply, 4 rows")


def test_prediction_needs_no_answers(tmp_path, write):
    asked = write("ask.csv", table(["ask"], [("who?",), ("why?",)]))
    settings = EvaluationSettings(input_field="ask", target_field=("reply",))
    assert [(row.input, row.answers) for row in read_inputs(asked, settings)] == [("who?", ()), ("why?", ())]
    alpaca = write("new.jsonl", json_lines([{"instruction": "Sing.", "input": ""}]))
    assert read_inputs(alpaca, EvaluationSettings())[0].input.endswith("Sing.\n\n### Response:")
    plain = write("lines.txt", '{"input": "a"}\n')
    assert read_inputs(plain, EvaluationSettings())[0].input == '{"input": "a"}'


def test_answers_become_turns_of_a_chat(tmp_path):
    path = write_files(tmp_path)["faq.csv"]
    row = first(path, input_field="ask", target_field=("reply",), as_chat=True)
    assert row.metadata["turns"] == (("user", FACTS[0][0]), ("assistant", "green"))


def test_data_sets_of_the_hub_have_a_configuration_and_a_split(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []
    features = {"text": object(), "label": datasets.ClassLabel(names=["bad", "good"])}

    class Loaded(list):
        pass

    def load_dataset(path, name, split):
        asked.append((path, name, split))
        if split == "test":
            raise ValueError("Unknown split")
        rows = Loaded([{"text": "Dull.", "label": 0}, {"text": "Fine.", "label": 1}])
        rows.features = features
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    [(task, examples)] = load_tasks(["hub:me/films:small"], None, "dev", 0)
    assert set(asked) == {("me/films", "small", "validation")}
    assert (task.name, examples.split, task.labels) == ("me/films/small", "dev", ("bad", "good"))
    assert [row.target for row in examples.rows] == ["bad", "good"]
    with pytest.raises(
        DataError, match=r"hub:me/films: found no split 'test' .*Check id, configuration, split and net"
    ):
        load_tasks(["hub:me/films::test"], None, "train", 0)
    with pytest.raises(ConfigError, match="Expected hub:ID"):
        load_tasks(["hub:"], None, "train", 0)


def test_squad_of_the_hub_is_recognised(write):
    rows = [{"id": "1", "question": "q", "context": "c a", "answers": {"text": ["a"], "answer_start": [2]}}]
    assert first(write("hub.jsonl", json_lines(rows))).answers == ("a",)
    assert squad()["data"][0]["paragraphs"][0]["qas"][0]["id"] == "q0"


def test_texts_are_user_turns_of_a_chat_and_have_no_columns():
    (row,) = input_rows(["hi"], EvaluationSettings(as_chat=True))
    assert row.metadata["turns"] == (("user", "hi"),)
    assert input_rows(["hi"], EvaluationSettings())[0].metadata == {}
    with pytest.raises(ConfigError, match="input_field is 'ask', which has no effect on texts"):
        input_rows(["hi"], EvaluationSettings(input_field="ask"))
