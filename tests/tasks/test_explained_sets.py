"""Data sets with explanations in the layouts of their public files."""

import csv
import json
from pathlib import Path

import pytest

from graftwork.errors import DataError
from graftwork.tasks import get_task


@pytest.fixture
def write_json(tmp_path):
    def write(name, *rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return write


def load(name, data, split="train"):
    return get_task(f"explained/{name}").load(Path(data), split).rows


def evidence(docid, start, end, text):
    return {
        "docid": docid,
        "end_sentence": -1,
        "end_token": end,
        "start_sentence": -1,
        "start_token": start,
        "text": text,
    }


@pytest.mark.parametrize(
    ("name", "label", "query"),
    [
        ("boolq", "True", "is the lake deep"),
        ("fever", "REFUTES", "The lake is shallow ."),
        ("evidence_inference", "significantly increased", "With respect to depth , what is the effect of rain ?"),
    ],
)
def test_documents_of_eraser_with_a_query(write_json, tmp_path, name, label, query):
    write_json(f"{name}/docs.jsonl", {"docid": "Lake", "document": "The lake .\nIt is very deep ."})
    line = {
        "annotation_id": "7",
        "classification": label,
        "docids": None,
        "evidences": [[evidence("Lake", 3, 7, "It is very deep")]],
        "query": query,
        "query_type": None,
    }
    write_json(f"{name}/train.jsonl", line)
    (row,) = load(name, tmp_path)
    assert row.input == f"explain {name} passage: The lake .\nIt is very deep . query: {query}"
    assert row.target == f"{label} explanation: It is very deep"
    source, start = row.metadata["source"], row.metadata["source_start"]
    assert [source[s:e] for s, e in row.metadata["spans"]] == ["It is very deep"]
    assert row.input[start : start + len(source)] == source
    # the ERASER export names document and class
    assert (row.metadata["document"], row.metadata["class_names"]) == ("Lake", row.metadata["choices"])
    write_json(f"{name}/train.jsonl", {**line, "classification": "maybe"})
    with pytest.raises(DataError, match="line 1: found classification 'maybe' in 7; expected"):
        load(name, tmp_path)


def test_evidence_of_both_documents_of_a_pair(write_json, tmp_path):
    write_json(
        "eraser_esnli/docs.jsonl",
        {"docid": "1.jpg#0_hypothesis", "document": "A man sleeps ."},
        {"docid": "1.jpg#0_premise", "document": "A man runs home ."},
    )
    groups = [[evidence("1.jpg#0_hypothesis", 2, 3, "sleeps"), evidence("1.jpg#0_premise", 2, 4, "runs home")]]
    line = {
        "annotation_id": "1.jpg#0",
        "classification": "contradiction",
        "docids": ["1.jpg#0_hypothesis", "1.jpg#0_premise"],
        "evidences": groups,
        "query": "",
        "query_type": None,
    }
    write_json("eraser_esnli/train.jsonl", line, {**line, "docids": None, "classification": "neutral", "evidences": []})
    first, second = load("eraser_esnli", tmp_path)
    assert first.metadata["source"] == second.metadata["source"] == "A man runs home .\nA man sleeps ."
    assert first.target == "contradiction explanation: runs home explanation: sleeps"
    assert second.target == "neutral"
    assert "document" not in first.metadata
    write_json("eraser_esnli/train.jsonl", {**line, "evidences": [[evidence("1.jpg#0_hypothesis", 3, 9, "x")]]})
    with pytest.raises(DataError, match="line 1: found a rationale at tokens 8 to 14"):
        load("eraser_esnli", tmp_path)


def test_claims_of_scifact(write_json, tmp_path):
    write_json(
        "scifact/corpus.jsonl",
        {"doc_id": 10, "title": "t", "abstract": ["AIM: depth.", "It  rose.", "So we say."], "structured": False},
        {"doc_id": 11, "title": "u", "abstract": ["Nothing here."], "structured": False},
    )
    claim = {
        "id": 2,
        "claim": "Rain deepens lakes.",
        "evidence": {"10": [{"sentences": [1], "label": "SUPPORT"}, {"sentences": [2], "label": "SUPPORT"}]},
        "cited_doc_ids": [10, 11],
    }
    write_json("scifact/claims_train.jsonl", claim)
    first, second = load("scifact", tmp_path)
    assert first.key == "2:10"
    assert first.input == "explain scifact passage: AIM: depth. It rose. So we say. query: Rain deepens lakes."
    assert first.target == "SUPPORT explanation: It rose. explanation: So we say."
    assert (second.key, second.target) == ("2:11", "NOT_ENOUGH_INFO")
    write_json("scifact/claims_dev.jsonl", {**claim, "evidence": {"10": [{"sentences": [3], "label": "SUPPORT"}]}})
    with pytest.raises(DataError, match=r"line 1: found the labels SUPPORT and the sentences \[3\] of 10, which has 3"):
        load("scifact", tmp_path, "dev")
    write_json("scifact/claims_dev.jsonl", {**claim, "cited_doc_ids": [12]})
    with pytest.raises(DataError, match="line 1: found no abstract 12"):
        load("scifact", tmp_path, "dev")


def post(name, labels, masks, tokens=("you", "are", "so", "odd")):
    votes = [{"label": label, "annotator_id": n, "target": ["None"]} for n, label in enumerate(labels)]
    return {"post_id": name, "annotators": votes, "rationales": masks, "post_tokens": list(tokens)}


def test_posts_of_hatexplain(tmp_path, caplog):
    folder = tmp_path / "hatexplain"
    folder.mkdir()
    posts = [
        post("a", ["offensive", "offensive", "normal"], [[0, 0, 1, 1], [0, 1, 0, 1]]),
        post("b", ["normal"] * 3, []),
        post("c", ["normal", "offensive", "hatespeech"], [[1, 0, 0, 0], [1, 0, 0, 0]]),
        post("d", ["hatespeech"] * 3, [[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 1]]),
    ]
    path = folder / "dataset.json"
    path.write_text(json.dumps({one["post_id"]: one for one in posts}))
    (folder / "post_id_divisions.json").write_text(json.dumps({"train": ["a", "b", "c"], "val": ["d"], "test": []}))
    first, second = load("hatexplain", tmp_path)
    assert first.input == "explain hatexplain post: you are so odd"
    # each of two annotators is half of them
    assert first.target == "offensive explanation: are so odd"
    assert second.target == "normal"
    assert "1 posts on which all annotators differ are left out" in caplog.text
    assert load("hatexplain", tmp_path, "dev")[0].target == "hatespeech explanation: you"
    path.write_text(json.dumps({"d": post("d", ["normal"], [[1, 0, 0]])}))
    with pytest.raises(DataError, match=r"post d: found the label 'normal' and masks of \[3\] tokens"):
        load("hatexplain", tmp_path, "dev")


def test_questions_of_ecqa(tmp_path):
    folder = tmp_path / "ecqa"
    folder.mkdir()
    names = [
        "",
        "q_no",
        "q_concept",
        "q_text",
        *(f"q_op{n}" for n in range(1, 6)),
        "q_ans",
        "taskA_pos",
        "taskA_neg",
        "taskB",
    ]
    cells = [
        "0",
        "q1",
        "spare",
        "Where is it?",
        "boot",
        "pond",
        "attic",
        "tree",
        "sea",
        "boot",
        "a\nb",
        "c",
        "A boot is dry.",
    ]

    def write(name, *rows):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows([names, *rows])

    write("cqa_data_train.csv", cells, [*cells[:12], ""])
    first, second = load("ecqa", tmp_path)
    assert first.input == (
        "explain ecqa question: Where is it? choice: boot choice: pond choice: attic choice: tree choice: sea"
    )
    assert (first.key, first.target, second.target) == ("q1", "boot explanation: A boot is dry.", "boot")
    write("cqa_data_val.csv", [*cells[:9], "lake", *cells[10:]])
    with pytest.raises(DataError, match="row 1: found the answer 'lake'"):
        load("ecqa", tmp_path, "dev")
