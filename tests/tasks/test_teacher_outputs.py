"""Outputs of a language model as explanations: parsing, selection by label, files in the layout of the original."""

import json
import re
from pathlib import Path

import pytest

from graftwork.errors import ConfigError, DataError
from graftwork.settings.fields import DataFields
from graftwork.settings.training import TrainingSettings
from graftwork.tasks.loading import load_training
from graftwork.tasks.own_data.explained_task import definition_of, explained_task
from graftwork.tasks.own_data.task_file import read_task_file
from graftwork.tasks.own_data.teacher import parse_output

FIELDS = {"text_field": "input", "label_field": "label"}


def published_cqa(output):
    """Definition of the original for CommonsenseQA: reason, mark, option, label without its full stop."""
    reason, rest = output.split("Q:")[0].rstrip().split("So the answer is")
    label = re.split(r"\(.\)", rest)[1].strip()
    return reason.rstrip(), label[:-1] if label[-1] == "." else label


def published_esnli(output):
    """Definition of the original for e-SNLI."""
    return output.split("Answer:")[0].rstrip(), output.split("Answer: ")[1].split("Premise")[0].rstrip()


def published_anli(output):
    """Definition of the original for ANLI: the last character of the label is a full stop."""
    reason, label = output.split("Premise:")[0].rstrip().split("So the answer is")
    return reason.rstrip(), label.lstrip()[:-1]


@pytest.mark.parametrize(
    ("published", "output"),
    [
        (published_cqa, "The spare is in the boot. So the answer is (a) boot.\n\nQ: Where is it?\nAnswer Choices:"),
        (published_cqa, "It is wet there. So the answer is (b) fish pond"),
        (published_cqa, "It is U.S. soil (really). So the answer is (c) U.S.."),
        (published_esnli, "A chef is a person.\nAnswer: entailment\n\nPremise: A man"),
        (published_esnli, "We do not know it. Answer: neutral"),
        (published_anli, "It says so. So the answer is contradiction.\n\nPremise: It"),
    ],
)
def test_outputs_are_parsed_as_in_the_original(published, output):
    found = parse_output(output)
    assert (found.reason, found.label) == published(output)


@pytest.mark.parametrize("output", ["", "No idea.", "So the answer is (a) boot.", "It is. So the answer is .", "Q: a"])
def test_outputs_without_label_or_reason_are_none(output):
    assert parse_output(output) is None


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, value, *, lines=False):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in value) if lines else json.dumps(value))
        return name

    return write


ROWS = [{"id": f"r{n}", "input": f"text {n}", "label": ("wet", "dry")[n % 2]} for n in range(4)]
OUTPUTS = [
    "It rains. So the answer is wet.",
    "It rains. So the answer is wet.",
    "It pours. So the answer is (a) Wet.\n\nQ: again",
    "No answer",
]


def explanations(name, **fields):
    task, split = explained_task(definition_of(name, DataFields(**FIELDS, **fields)), "train")
    return [row.metadata["explanations"] for row in task.load(Path(), split).rows]


def test_lists_in_the_order_of_the_rows_keep_reasons_of_right_labels(folder, capsys):
    name = folder("train.json", ROWS, lines=True)
    files = (folder("llm/train_CoT_0.json", OUTPUTS[:2]), folder("llm/train_CoT_1.json", OUTPUTS[2:]))
    assert explanations(name, teacher_outputs=files) == [("It rains.",), (), ("It pours.",), ()]
    said = capsys.readouterr().err
    assert "2 of 4 outputs of the teacher kept; left out: 1 with another label, 1 without label or reason" in said
    assert "(first: llm/train_CoT_0.json, item 2: 'It rains. So the answer is wet.')" in said


def test_several_outputs_of_one_row_are_several_reasons(folder, capsys):
    name = folder("train.json", ROWS, lines=True)
    outputs = [
        {"id": "r2", "output": OUTPUTS[0]},
        {"id": "r2", "output": OUTPUTS[1]},
        {"id": "r2", "outputs": ["It is a lake. The answer is wet", "It dries. The answer is dry"]},
        {"id": "gone", "output": OUTPUTS[0]},
    ]
    found = explanations(name, teacher_outputs=folder("outputs.jsonl", outputs, lines=True))
    assert found == [(), (), ("It rains.", "It is a lake."), ()]
    assert "outputs.jsonl, line 3: 'It dries" in capsys.readouterr().err


def test_a_column_holds_a_text_a_list_or_nothing(folder):
    values = [OUTPUTS[0], ["It dries. Answer: dry", "It is sand. Answer: dry"], None, []]
    name = folder("mine.json", [{**row, "told": value} for row, value in zip(ROWS, values, strict=True)], lines=True)
    assert explanations(name, teacher_field="told") == [("It rains.",), ("It dries.", "It is sand."), (), ()]


def test_options_are_the_labels_of_their_row(folder):
    rows = [
        {"id": "a", "input": "where ?", "options": ["boot", "pond"], "label": "B", "why": "It swims."},
        {"id": "b", "input": "what ?", "options": ["tea", "milk", "jam"], "label": "tea", "why": ""},
    ]
    name = folder("mine.json", rows, lines=True)
    outputs = folder("llm.json", ["It swims. So the answer is (b).", "It is hot. So the answer is (c) jam."])
    options = {"choices_field": "options"}
    assert explanations(name, teacher_outputs=outputs, **options) == [("It swims.",), ()]
    task, split = explained_task(definition_of(name, DataFields(**FIELDS, explanation_field="why", **options)), "train")
    first, second = task.load(Path(), split).rows
    assert first.input == "explain classify text: where ? choice: boot choice: pond"
    assert first.target == "pond explanation: It swims."
    assert (first.metadata["choices"], second.metadata["choices"]) == (("boot", "pond"), ("tea", "milk", "jam"))
    assert (second.input, second.target) == ("classify text: what ? choice: tea choice: milk choice: jam", "tea")
    definition = task.source.definition
    definition.write(Path("mine.task.yaml"))
    assert read_task_file("mine.task.yaml").labels == ()
    # a prediction needs neither label nor outputs
    task, split = explained_task(
        definition_of(name, DataFields(**FIELDS, teacher_outputs="gone.json", **options)), "all", required=False
    )
    assert len(task.load(Path(), split).rows) == 2


def test_a_training_reads_them_and_its_task_file_names_them(folder):
    name = folder("train.json", ROWS, lines=True)
    outputs = folder("llm.json", OUTPUTS)
    settings = TrainingSettings(tasks=(name,), validation=0.25, teacher_outputs=outputs, **FIELDS)
    rows = load_training(settings, None, 0).examples[0].rows
    assert len(rows) == 3
    definition = definition_of(name, settings)
    definition.write(Path("train.task.yaml"))
    assert read_task_file("train.task.yaml").teacher_outputs == ("llm.json",)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (OUTPUTS[:3], "found 3 outputs for 4 rows; expected one for each row"),
        ([{"id": "r1", "text": "x"}], "found the fields id, text; expected id and output"),
        ([{"id": "other", "output": "x"}], "found no output with the id of a row"),
    ],
)
def test_outputs_of_other_rows_are_one_line(folder, value, message):
    name = folder("train.json", ROWS, lines=True)
    with pytest.raises(DataError, match=message):
        explanations(name, teacher_outputs=folder("llm.json", value, lines=isinstance(value[0], dict)))


@pytest.mark.parametrize(
    "fields",
    [
        {"teacher_field": "t", "explanation_field": "e"},
        {"teacher_field": "t", "teacher_outputs": "f"},
        {"teacher_outputs": "f", "spans_field": "s"},
        {"explanation_field": "e", "choices_field": "c", "labels": ("a", "b")},
    ],
)
def test_two_sources_of_explanations_are_refused(fields):
    with pytest.raises(ConfigError, match="exclude each other"):
        DataFields(**FIELDS, **fields)
    with pytest.raises(ConfigError, match="Found teacher_field without text_field"):
        DataFields(teacher_field="t")
