"""Readers of multihop questions: real files, malformed files, parsing and prompts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from graftwork.core.example import Example
from graftwork.errors import ConfigError, DataError, UnknownNameError
from graftwork.metrics.answers import normalize_short_answer
from graftwork.tasks import MIXTURES, TASKS, get_task
from graftwork.tasks.multihop import (
    DATASETS,
    Dataset,
    _read_2wiki,
    multihop_task,
    parse_choice,
    parse_open,
    parse_yes_no,
)
from graftwork.tasks.prompts import FAMILIES, prompt_family

COUNTS = {
    ("2wikimultihopqa", "dev"): 270,
    ("2wikimultihopqa", "train"): 110,
    ("hotpotqa", "dev"): 144,
    ("hotpotqa", "train"): 154,
    ("popqa", "dev"): 1200,
    ("complexwebquestions", "dev"): 400,
    ("complexwebquestions", "train"): 200,
}
"""Counts that the data's own table states."""


@pytest.mark.parametrize(("name", "split"), COUNTS)
def test_real_files_are_read_completely_with_the_gold_answer_first(shared: Path, name, split):
    examples = get_task(f"multihop/{name}").load(shared / "data", split)
    assert len(examples.rows) == examples.size == COUNTS[name, split]
    assert [row.key for row in examples.rows] == [str(number) for number in range(examples.size)]
    gold = [row.target for row in examples.rows]
    assert gold == [row.answers[0] for row in examples.rows]
    assert all(len(set(row.answers)) == len(row.answers) for row in examples.rows)
    scores = get_task(f"multihop/{name}").evaluate(gold, examples)
    # a few gold answers are only punctuation or an article; two texts without words have F1 0
    wordy = 100 * sum(bool(normalize_short_answer(text)) for text in gold) / len(gold)
    assert scores == {"exact_match": 100.0, **dict.fromkeys(("f1", "precision", "recall"), pytest.approx(wordy))}
    assert wordy > 99


@pytest.mark.parametrize(
    ("name", "file", "field"),
    [("2wikimultihopqa", "dev.json", "answer"), ("hotpotqa", "hotpot_dev_distractor_v1.json", "answer")],
)
def test_targets_are_the_gold_answers_of_the_raw_file(shared: Path, name, file, field):
    raw = json.loads((shared / "data" / name / file).read_bytes())
    rows = get_task(f"multihop/{name}").load(shared / "data", "dev").rows
    assert [(row.input, row.target) for row in rows] == [(item["question"], item[field]) for item in raw]


def test_the_first_question_of_popqa_matches_the_file(shared: Path):
    row = get_task("multihop/popqa").load(shared / "data", "dev").rows[0]
    with (shared / "data" / "popqa" / "popQA.tsv").open(encoding="utf-8") as file:
        names, cells = (next(file).rstrip("\n").split("\t") for _ in range(2))
    found = dict(zip(names, cells, strict=True))
    assert row.input == found["question"].strip('"')
    assert row.target == found["obj"].strip('"')


def test_reading_does_not_depend_on_the_hash_seed(shared: Path):
    code = (
        "import sys; from pathlib import Path; from graftwork.tasks import get_task\n"
        "for n in ('complexwebquestions', 'popqa', '2wikimultihopqa'):\n"
        "    print([r.answers for r in get_task('multihop/' + n).load(Path(sys.argv[1]), 'dev').rows])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code, shared / "data"],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
        for path in [str(Path(__file__).parents[2] / "src")]
    }
    assert len(outputs) == 1


def test_aliases_follow_the_gold_answer_and_demonyms_are_optional(write, tmp_path: Path):
    write(
        "2wikimultihopqa/dev.json",
        json.dumps(
            [
                {"_id": "x", "question": "Q?", "answer": "France", "answer_id": "Q1"},
                {"_id": "y", "question": "R?", "answer": "yes", "answer_id": None},
                {"_id": "z", "question": "S?", "answer": "Rome", "answer_id": "Q999"},
            ]
        ),
    )
    write(
        "2wikimultihopqa/id_aliases.json",
        '{"Q_id": "Q1", "aliases": ["french republic", "France"], "demonyms": ["French"]}\n',
    )
    rows = get_task("multihop/2wikimultihopqa").load(tmp_path, "dev").rows
    assert [row.answers for row in rows] == [("France", "french republic"), ("yes",), ("Rome",)]
    wider = Dataset("2wikimultihopqa", _read_2wiki, {"*": "{split}.json"}, demonyms=True)
    assert multihop_task(wider).load(tmp_path, "dev").rows[0].answers == ("France", "french republic", "French")


def test_domain_data_sets_have_specific_readers(write, tmp_path: Path):
    for name, row in {
        "pubmedqa": {"question": "Q", "answer": "Long text with no. The final decision is: Yes."},
        "lhf": {"question": "Q", "answer": "YES"},
        "casehold": {"question": "Q", "answer": "B", "choices": list("vwxyz")},
        "football": {"question": "Q", "answer": "Pelé"},
    }.items():
        for split in ("dev", "train"):
            write(f"{name}/{split}.jsonl", json.dumps(row) + "\n")

    def first(name: str, split: str = "dev") -> Example:
        return get_task(f"multihop/{name}").load(tmp_path, split).rows[0]

    assert first("pubmedqa").target == "yes"
    assert first("pubmedqa", "train").target.startswith("Long text")
    assert (first("lhf").target, first("football").target) == ("yes", "Pelé")
    assert first("casehold").input == "Q\nA) v\nB) w\nC) x\nD) y\nE) z"
    from dataclasses import replace

    write("pubmedqa/dev.jsonl", '{"question": "Q", "answer": "The final decision is: maybe"}\n' * 2)
    assert first("pubmedqa").target == "maybe"
    strict = replace(DATASETS["pubmedqa"], keep_maybe=False)
    assert multihop_task(strict).load(tmp_path, "dev").rows == ()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("hotpotqa/hotpot_dev_distractor_v1.json", '[{"question": "Q"}]', "record 0.*'question'.*'answer'"),
        ("hotpotqa/hotpot_dev_distractor_v1.json", "[\n{", "line 2: not readable"),
        ("popqa/popQA.tsv", "question\tobj\to_aliases\nQ\tA\t['x']\n", "record 0.*'o_aliases'.*JSON list"),
        ("casehold/dev.jsonl", '{"question": "Q", "answer": "A", "choices": ["x"]}\n', "record 1.*five 'choices'"),
        ("lhf/nothing", "", "Found no dev.jsonl"),
    ],
)
def test_a_malformed_file_error_names_the_place(write, file, content, message):
    folder = write(file, content).parent
    with pytest.raises(DataError, match=message):
        get_task(f"multihop/{folder.name}").load(folder.parent, "dev")


def test_every_data_set_is_a_task_and_every_domain_a_mixture():
    assert {f"multihop/{name}" for name in DATASETS} <= set(TASKS.names())
    assert set(MIXTURES.get("multihop/law").training_tasks) == {
        "multihop/casehold",
        "multihop/lhf",
        "multihop/housingqa",
    }


CHOICE = Example("0", "the answer depends on it", "B", ("B",))


@pytest.mark.parametrize(
    ("parse", "text", "found"),
    [
        (parse_choice, " B", "B"),
        (parse_choice, "The answer: (D).", "D"),
        (parse_choice, "none", "none"),
        (parse_yes_no, " No, because yes", "no"),
        (parse_yes_no, "nothing", "nothing"),
        (parse_open, " Paris\nQuestion: more", "Paris"),
        (parse_open, "Answer: Paris", "Paris"),
        (parse_open, "", ""),
    ],
)
def test_answers_are_parsed_from_generated_text(parse, text, found):
    assert parse(text, CHOICE) == found


HOSTILE = "Who {c0} {{ question }} <|eot_id|> {% raw %} Answer: $x?"


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_are_inserted_verbatim(name):
    family = prompt_family(name)
    turns = family.messages(HOSTILE, choices=[HOSTILE] * 5, passages=[("T", HOSTILE), ("", "second")])
    assert HOSTILE in turns[-1]["content"]
    assert HOSTILE in turns[0]["content"]
    assert "{{" not in turns[0]["content"].replace(HOSTILE, "")
    assert family.assistant == "Answer:"
    if name == "choice":
        assert turns[-1]["content"].endswith(f"\nE) {HOSTILE}")


def test_passages_precede_the_question_and_closed_book_prompts_have_none():
    family = prompt_family("open")
    blind = family.messages("Q?")
    seen = family.messages("Q?", passages=[("Title", "text"), ("", "more")])
    assert seen[1] == blind[1] == {"role": "user", "content": "Q?"}
    extra = seen[0]["content"].removeprefix(blind[0]["content"])
    assert extra == "\nUse these passages if they help.\n[1] Title\ntext\n[2] \nmore"
    assert prompt_family("simple").plain("Q?", passages=[("T", "x")]) == "T: x\nQuestion: Q?\nAnswer:"


def test_custom_prompt_families_have_distinct_digests(write):
    text = "system: S\ncontext: C\npassage: '{{ text }}'\nuser: '{{ question }}'\nassistant: 'A:'\n"
    own = prompt_family(str(write("own.yaml", text)))
    assert own.messages("Q")[0]["content"] == "S"
    assert len({own.digest(), *(prompt_family(name).digest() for name in FAMILIES)}) == 5
    with pytest.raises(UnknownNameError, match="'open'"):
        prompt_family("opne")
    with pytest.raises(ConfigError, match="without choices"):
        prompt_family("choice").messages("Q")
