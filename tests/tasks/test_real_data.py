"""Readers on real files, compared with counts and texts from independent sources."""

import json
from pathlib import Path
from typing import Any

import pytest

from graftwork.tasks import get_task
from graftwork.tasks.sources import read_csv, read_tsv

ROWS = {
    ("arc_easy", "dev"): 450,
    ("arc_hard", "dev"): 219,
    ("boolq", "dev"): 600,
    ("commonsenseqa", "dev"): 600,
    ("mctest_corrected_the_separator", "dev"): 248,
    ("mctest_corrected_the_separator", "train"): 160,
    ("narrativeqa", "test"): 3,
    ("openbookqa", "dev"): 350,
    ("openbookqa", "test"): 350,
    ("openbookqa", "train"): 800,
    ("ropes", "dev"): 387,
    ("ropes", "train"): 319,
    ("squad1_1", "dev"): 1634,
}
"""Counts that the data's own table states."""

Row = tuple[str, str, str | None]


def test_the_counts_cover_every_file(shared: Path):
    files = (shared / "data" / "unifiedqa").glob("*/*.tsv")
    assert {(file.parent.name, file.stem) for file in files if not file.stem.endswith("_meta")} == set(ROWS)


@pytest.mark.parametrize(("name", "split"), ROWS, ids=[f"{name}-{split}" for name, split in ROWS])
def test_every_physical_line_is_one_row(shared: Path, name, split):
    folder = shared / "data" / "unifiedqa" / name
    examples = get_task(f"unifiedqa/{name}").load(folder.parent, split)
    lines = (folder / f"{split}.tsv").read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert len(examples.rows) == len(lines) == examples.size == ROWS[name, split]
    assert examples.ignored == 0
    answers = folder / f"{split}_ans.jsonl"
    expected = [json.loads(line) for line in answers.read_bytes().splitlines()] if answers.exists() else None
    for number, (line, row) in enumerate(zip(lines, examples.rows, strict=True)):
        text, answer = line.decode().split("\t")
        assert (row.metadata["id"], row.input) == (number, text)
        assert list(row.answers) == (expected[number] if expected else [answer])


@pytest.mark.parametrize(("name", "split"), ROWS, ids=[f"{name}-{split}" for name, split in ROWS])
def test_gold_answers_score_100(shared: Path, name, split):
    for task in (get_task(f"unifiedqa/{name}"), get_task(f"unifiedqa/{name}_t5")):
        examples = task.load(shared / "data" / "unifiedqa", split)
        gold = [row.target for row in examples.rows]
        assert task.evaluate(gold, examples) == {"exact_match": 100.0, "f1": 100.0}
        # one question of commonsenseqa repeats an option; the first occurrence is chosen
        least = 100 * 599 / 600 if name == "commonsenseqa" else 100.0
        assert all(score >= least for score in task.evaluate(gold, examples, official=True).values())


def squeeze(text: str) -> str:
    return " ".join(text.split())


def json_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def multiple_choice(path: Path) -> list[Row]:
    rows: list[Row] = []
    for item in json_lines(path):
        choices = item["question"]["choices"]
        options = " ".join(f"({'ABCDE'[i]}) {choice['text']}" for i, choice in enumerate(choices))
        right = next(choice["text"] for choice in choices if choice["label"] == item["answerKey"])
        rows.append((rf"{item['question']['stem']} \n {options}", right, item["answerKey"]))
    return rows


def squad(path: Path) -> list[Row]:
    return [
        (
            rf"{item['question']} \n ({article['title'].replace('_', ' ')}) {paragraph['context']}",
            item["answers"][0]["text"],
            None,
        )
        for article in json.loads(path.read_bytes())["data"]
        for paragraph in article["paragraphs"]
        for item in paragraph["qas"]
    ]


def ropes(path: Path) -> list[Row]:
    return [
        (rf"{item['question']} \n {paragraph['background']} {paragraph['situation']}", item["answers"][0]["text"], None)
        for article in json.loads(path.read_bytes())["data"]
        for paragraph in article["paragraphs"]
        for item in paragraph["qas"]
    ]


def boolq(path: Path) -> list[Row]:
    return [
        (rf"{row['question']} \n {row['passage']}", "yes" if row["label"] else "no", None) for row in json_lines(path)
    ]


@pytest.mark.parametrize(
    ("source", "original", "read"),
    [
        ("openbookqa train", "openbookqa/Data/Main/train.jsonl", multiple_choice),
        ("openbookqa dev", "openbookqa/Data/Main/dev.jsonl", multiple_choice),
        ("openbookqa test", "openbookqa/Data/Main/test.jsonl", multiple_choice),
        ("arc_easy dev", "arc/ARC-Easy/ARC-Easy-Dev.jsonl", multiple_choice),
        ("arc_hard dev", "arc/ARC-Challenge/ARC-Challenge-Dev.jsonl", multiple_choice),
        ("commonsenseqa dev", "cos_e/v1.11/dev_rand_split.jsonl", multiple_choice),
        ("squad1_1 dev", "squad/dev-v1.1.json", squad),
        ("ropes train", "ropes/train-v1.0.json", ropes),
        ("ropes dev", "ropes/dev-v1.0.json", ropes),
        ("boolq dev", "superglue/BoolQ/val.jsonl", boolq),
    ],
    ids=lambda value: value if isinstance(value, str) and "/" not in value else "",
)
def test_rows_equal_the_original_data(shared: Path, source, original, read):
    name, split = source.split()
    examples = get_task(f"unifiedqa/{name}").load(shared / "data" / "unifiedqa", split)
    found = [(squeeze(row.input), squeeze(row.target), row.metadata.get("answer_key")) for row in examples.rows]
    assert found == [
        (squeeze(text), squeeze(answer), letter) for text, answer, letter in read(shared / "data" / original)
    ]


def test_mctest_has_four_questions_per_story(shared: Path):
    rows = get_task("unifiedqa/mctest_corrected_the_separator").load(shared / "data" / "unifiedqa", "dev").rows
    letters = "".join((shared / "data" / "mctest" / f"{name}.dev.ans").read_text() for name in ("mc160", "mc500"))
    stories = [cells for name in ("mc160", "mc500") for cells in mctest(shared / "data" / "mctest" / f"{name}.dev.tsv")]
    expected = []
    for story, key in zip(stories, letters.split("\n"), strict=False):
        for question, letter in enumerate(key.split("\t")):
            start = 3 + 5 * question
            expected.append((story[start].partition(": ")[2], story[start + 1 + "ABCD".index(letter)]))
    found = [(squeeze(row.input.partition(r"\n")[0]), squeeze(row.target)) for row in rows]
    assert sorted(found) == sorted((squeeze(question), squeeze(answer)) for question, answer in expected)


def mctest(path: Path) -> list[list[str]]:
    return [list(cells.values()) for _, cells in read_tsv(path, [str(column) for column in range(23)]).rows]


def test_quoted_tables_are_read_completely(shared: Path):
    dev = read_csv(shared / "data" / "esnli" / "esnli_dev.csv", ["pairID", "gold_label", "Explanation_3"])
    assert (len(dev.rows), dev.ignored) == (602, 0)
    assert {cells["gold_label"] for _, cells in dev.rows} == {"entailment", "neutral", "contradiction"}
    documents = read_csv(shared / "data" / "narrativeqa" / "documents.csv")
    assert (len(documents.rows), documents.ignored) == (199, 0)  # 200 lines with the header


def test_tables_with_a_header_are_read_completely(shared: Path):
    table = read_tsv(shared / "data" / "glue" / "SST-2" / "train.tsv")
    assert (len(table.rows), table.ignored) == (1200, 0)
    assert {cells["label"] for _, cells in table.rows} == {"0", "1"}
