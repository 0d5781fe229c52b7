"""Readers of explained data sets: malformed files, real files, and hub rows."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from graftwork.errors import ConfigError, DataError
from graftwork.tasks import TASKS, get_task
from graftwork.tasks.cos_e import CosEFiles, cos_e
from graftwork.tasks.eraser import MOVIES, MULTIRC, document_tokens, token_places
from graftwork.tasks.esnli import ESNLI
from graftwork.tasks.lookup import HUB
from graftwork.tasks.reviews import AMAZON_CATEGORIES, ReviewFolders
from graftwork.tasks.sources import Record
from graftwork.tasks.spans import token_spans

HEADER = "pairID,gold_label,Sentence1,Sentence2,Explanation_1,Explanation_2,Explanation_3\n"
MOVIE = {
    "annotation_id": "negR_1.txt",
    "classification": "NEG",
    "query": "What is the sentiment of this review?",
    "query_type": None,
    "evidences": [[{"text": "c d", "docid": "negR_1.txt", "start_token": 3, "end_token": 5}]],
}
DOCUMENT = "a b .\n\nc  d .\n"


def evidence(text, start, end, docid="negR_1.txt"):
    return [{"text": text, "docid": docid, "start_token": start, "end_token": end}]


@pytest.fixture
def movies(write):
    def make(*lines, docs="folder"):
        path = write("movies/val.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        if docs == "folder":
            write("movies/docs/negR_1.txt", DOCUMENT)
        else:
            write("movies/docs.jsonl", json.dumps({"docid": "negR_1.txt", "document": DOCUMENT}) + "\n")
        return path.parent.parent

    return make


def test_esnli_reads_quoted_fields_and_joins_the_two_training_files(write):
    folder = write("esnli/esnli_dev.csv", HEADER + 'p1,neutral,"A, ""b""","C\nd",one,,three\n').parent
    row = ESNLI(folder.parent, "validation").rows[0]
    assert (row.key, row.fields["premise"], row.fields["hypothesis"]) == ("p1", 'A, "b"', "C\nd")
    assert (row.fields["label"], row.fields["explanation_2"], row.fields["explanation_3"]) == (1, "", "three")
    train = "pairID,gold_label,Sentence1,Sentence2,Explanation_1,WorkerId\n"
    write("esnli/esnli_train_1.csv", train + "a,entailment,x,y,z,w\n")
    write("esnli/esnli_train_2.csv", train + "b,contradiction,x,y,z,w\n")
    assert [row.key for row in ESNLI(folder, "train").rows] == ["a", "b"]


def test_esnli_names_a_missing_column_and_a_wrong_label(write):
    write("esnli/esnli_test.csv", "pairID,gold_label,Sentence1,Explanation_1,Explanation_2,Explanation_3\n")
    path = write("esnli/esnli_dev.csv", HEADER + "p1,maybe,a,b,c,d,e\n")
    with pytest.raises(DataError, match=r"esnli_test.csv, line 1: found the columns .*; expected also Sentence2\."):
        ESNLI(path.parent.parent, "test")
    with pytest.raises(DataError, match=r"esnli_dev.csv, row 1: found gold_label 'maybe'; expected entailment"):
        ESNLI(path.parent.parent, "validation")


def test_a_missing_file_error_lists_every_path_tried(tmp_path):
    with pytest.raises(DataError, match=r"Found no esnli_dev.csv in .*esnli/esnli_dev.csv.*Name the folder"):
        ESNLI(tmp_path, "validation")


def test_cos_e_joins_by_id_and_prefers_processed_explanations(write, caplog):
    question = {"stem": "Q?", "choices": [{"label": "A", "text": "one"}, {"label": "B", "text": "two words"}]}
    path = write("cos_e/v1.11/dev_rand_split.jsonl", json.dumps({"id": "x", "answerKey": "B", "question": question}))
    line = {"id": "x", "explanation": {"open-ended": "raw: because", "selected": "s"}}
    write("cos_e/v1.11/cose_dev_v1.11.jsonl", json.dumps(line))
    processed = {"id": "x", "explanation": {"open-ended": "because", "selected": "s"}}
    write(
        "cos_e/v1.11/cose_dev_v1.11_processed.jsonl",
        json.dumps(processed) + "\n" + json.dumps({**processed, "id": "unasked"}),
    )
    rows = cos_e()(path.parents[2], "validation").rows
    assert [(row.key, row.fields["answer"], row.fields["choices"]) for row in rows] == [
        ("x", "two words", ("one", "two words"))
    ]
    assert rows[0].fields["abstractive_explanation"] == "because"
    assert "1 of 2 explanations have no question" in caplog.text
    with pytest.raises(ConfigError, match=r"Found CoS-E version 'v2'; expected one of: v1.11, v1.0"):
        cos_e("v2")


def test_cos_e_error_names_the_malformed_line(write):
    path = write(
        "cos_e/dev_rand_split.jsonl", '{"id": "x", "answerKey": "C", "question": {"stem": "Q", "choices": []}}'
    )
    write("cos_e/cose_dev_v1.11.jsonl", '{"id": "x", "explanation": {"open-ended": "o"}}')
    with pytest.raises(DataError, match=r"dev_rand_split.jsonl, line 1: found no question with an answer"):
        cos_e()(path.parent.parent, "validation")


@pytest.mark.parametrize("docs", ["folder", "file"])
def test_r8_documents_and_offsets(movies, docs):
    assert document_tokens(DOCUMENT) == ["a", "b", ".", "c", "d", "."]
    example = get_task("movie_rationales_eval_v010").load(movies(MOVIE, docs=docs), "validation").rows[0]
    assert example.input == f"explain sentiment review: {DOCUMENT}"
    assert example.target == "negative explanation: c d"
    ((start, end),) = example.metadata["spans"]
    assert DOCUMENT[start:end].split() == ["c", "d"]
    assert token_spans(example.metadata["spans"], token_places(DOCUMENT)) == [(3, 5)]


def test_an_offset_outside_the_document_is_an_error_with_line_number(movies):
    bad = {**MOVIE, "evidences": [evidence("c d .  e", 3, 7)]}
    with pytest.raises(
        DataError,
        match=r"val.jsonl, line 2: found a rationale at tokens 3 to 7 of negR_1.txt, which has 6; .*Fix or remove",
    ):
        MOVIES(movies(MOVIE, bad), "validation")


def test_a_snippet_that_differs_from_its_offsets_is_counted_and_offsets_are_used(movies, caplog):
    data = movies({**MOVIE, "evidences": [evidence("x y", 0, 2)]})
    example = get_task("movie_rationales_eval_v010").load(data, "validation").rows[0]
    assert example.target == "negative explanation: a b"
    assert "1 snippets differ from the tokens at their offsets" in caplog.text


def test_a_carriage_return_inside_a_document_does_not_shift_offsets(movies):
    data = movies({**MOVIE, "evidences": [evidence("c d", 3, 5)]})
    document = b"a b\rx .\r\nc d .\r\n"
    (data / "movies" / "docs" / "negR_1.txt").write_bytes(document)
    example = get_task("movie_rationales_eval_v010").load(data, "validation").rows[0]
    assert example.metadata["source"] == document.decode()
    assert example.target == "negative explanation: c d"


def test_missing_offsets_are_recovered_from_the_snippet(movies):
    data = movies({**MOVIE, "evidences": [evidence("c d", -1, -1), evidence("nowhere", -1, -1)]})
    example = get_task("movie_rationales_eval_v010").load(data, "validation").rows[0]
    assert token_spans(example.metadata["spans"], token_places(DOCUMENT)) == [(3, 5)]
    assert example.metadata["gold_unmatched"] == 1


def test_null_offsets_and_snippets_of_a_second_document(movies, caplog):
    unknown = [{"text": "c d", "docid": None, "start_token": None, "end_token": None}]
    data = movies({**MOVIE, "evidences": [unknown, evidence("else", 90, 91, docid="other.txt")]})
    example = get_task("movie_rationales_eval_v010").load(data, "validation").rows[0]
    assert example.target == "negative explanation: c d"
    assert "1 snippets of a second document of their annotation are left out" in caplog.text


def test_documents_can_be_named_by_doc_id(write):
    write("movies/docs.jsonl", json.dumps({"doc_id": "negR_1.txt", "document": DOCUMENT}) + "\n")
    path = write("movies/val.jsonl", json.dumps(MOVIE) + "\n")
    example = get_task("movie_rationales_eval_v010").load(path.parents[1], "validation").rows[0]
    assert example.target == "negative explanation: c d"


def test_pairs_without_a_label_are_skipped_and_no_explanation_is_written_as_nan(write, caplog):
    rows = "a,-,P,H,x,y,z\nb,neutral,P,H,nan, ,because\n"
    path = write("esnli/esnli_dev.csv", HEADER + rows)
    examples = get_task("esnli_eval_v010").load(path.parents[1], "validation")
    assert [row.target for row in examples.rows] == ["neutral explanation: because"]
    assert examples.size == 1
    assert "1 pairs without an agreed label (-) are skipped" in caplog.text


def test_equal_choices_are_one_label():
    fields = {"question": "Q", "choices": ("a", "b", "a"), "answer": "a", "abstractive_explanation": "e"}
    assert get_task("cos_e_eval_v001").format(Record("x", fields)).metadata["choices"] == ("a", "b")


def test_a_missing_document_and_a_missing_folder_are_errors(movies, tmp_path):
    with pytest.raises(DataError, match=r"found no document 'other.txt' in .* for annotation other.txt"):
        MOVIES(movies({**MOVIE, "annotation_id": "other.txt"}), "validation")
    (tmp_path / "movies" / "docs.jsonl").write_text("")
    with pytest.raises(DataError, match=r"found both docs and docs.jsonl; expected one of them"):
        MOVIES(tmp_path, "validation")


def test_a_malformed_annotation_error_names_the_line(movies):
    with pytest.raises(DataError, match=r"val.jsonl, line 1: found no field 'classification' but 'annotation_id'"):
        MOVIES(movies({"annotation_id": "negR_1.txt", "evidences": []}), "validation")


def test_multirc_without_evidence_falls_back_to_docids_and_to_the_annotation_id(write):
    line = {"annotation_id": "d:0:0", "classification": "True", "query": "Q || A", "evidences": []}
    path = write("multirc/val.jsonl", json.dumps(line) + "\n" + json.dumps({**line, "docids": ["e"]}))
    write("multirc/docs/d", "x .")
    write("multirc/docs/e", "y .")
    assert [row.fields["passage"] for row in MULTIRC(path.parent.parent, "validation").rows] == ["x .", "y ."]


def test_review_folders(write):
    for name, text in (("pos/0_9.txt", "Good."), ("neg/0_1.txt", "Bad."), ("unsup/0_0.txt", "?")):
        path = write(f"aclImdb/train/{name}", text)
    rows = get_task("imdb_reviews_v100").load(path.parents[3], "train").rows
    assert [(row.input, row.target) for row in rows] == [
        ("sentiment: Bad.", "negative"),
        ("sentiment: Good.", "positive"),
        ("sentiment: ?", "<unk>"),
    ]
    with pytest.raises(DataError, match="Found no reviews of test"):
        ReviewFolders()(path.parents[3], "test")


def test_amazon_keeps_the_first_tenth_for_validation(write):
    lines = ["star_rating\treview_headline\treview_body"] + [f'{i % 5 + 1}\tH{i} "quoted\tB{i}' for i in range(20)]
    data = write("amazon_reviews_us_Books_v1_00.tsv", "\n".join(lines)).parent
    task = get_task("amazon_reviews_books_v1_00_v010")
    validation = task.load(data, "validation")
    assert [(row.input, row.target) for row in validation.rows] == [
        ('sentiment review: H0 "quoted B0', "negative"),
        ('sentiment review: H1 "quoted B1', "negative"),
    ]
    assert len(task.load(data, "train").rows) == 18 - 4, "three stars are left out"
    assert len(AMAZON_CATEGORIES) == len(set(AMAZON_CATEGORIES)) == 46
    write("amazon_reviews_us_Books_v1_00.tsv", "star_rating\treview_body\n5\tx")
    with pytest.raises(DataError, match="expected also review_headline"):
        task.load(data, "train")


def test_hub_and_files_yield_equal_examples(write):
    rows = [{"review": DOCUMENT, "label": 0, "evidences": ["c d"]}]
    path = write("hub.jsonl", "\n".join(map(json.dumps, rows)))
    hub = replace(MOVIES.hub, path="json", options={"data_files": {"validation": str(path)}})
    task = replace(get_task("movie_rationales_eval_v010"), source=replace(MOVIES, hub=hub))
    assert task.load(HUB, "validation").rows[0].target == "negative explanation: c d"
    pair = {"id": "1", "question": "Q", "choices": ["a", "b"], "answer": "b", "abstractive_explanation": "e"}
    path = write("cos_e.jsonl", json.dumps({**pair, "extractive_explanation": ""}))
    source = cos_e()
    hub = replace(source.hub, path="json", name=None, options={"data_files": {"validation": str(path)}})
    task = replace(get_task("cos_e_eval_v001"), source=replace(source, hub=hub))
    example = task.load(HUB, "validation").rows[0]
    assert example.input == "explain cos_e question: Q choice: a choice: b"
    assert (example.key, example.target) == ("1", "b explanation: e")


COUNTS = {
    ("esnli_eval_v010", "validation"): 602,
    ("esnli_eval_v010", "test"): 400,
    ("esnli_v010", "train"): 1002,
    ("cos_e_eval_v001", "validation"): 600,
    ("movie_rationales_v010", "train"): 200,
    ("movie_rationales_v010", "validation"): 100,
    ("movie_rationales_v010", "test"): 100,
    ("eraser_multi_rc_eval_v011", "validation"): 622,
    ("eraser_multi_rc_eval_v011", "test"): 604,
    ("mnli_v002", "train"): 3,
    ("mnli_v002", "validation_matched"): 2,
    ("imdb_reviews_v100", "test"): 200,
}
"""Counts that the data's own table states."""


@pytest.mark.parametrize(("name", "split"), COUNTS, ids=lambda value: value)
def test_real_files_are_read_completely(shared: Path, name, split):
    examples = get_task(name).load(shared / "data", split)
    assert len(examples.rows) == COUNTS[name, split]
    assert examples.ignored == 0
    assert len({row.key for row in examples.rows}) == len(examples.rows)
    assert all(row.target for row in examples.rows)


def test_cos_e_1_0_has_three_choices(shared: Path):
    records = CosEFiles("v1.0")(shared / "data", "train")
    assert len(records.rows) == 1000
    assert {len(row.fields["choices"]) for row in records.rows} == {3}


@pytest.mark.parametrize(
    ("source", "empty"),
    [
        (("movie_rationales_v010", "train"), 0),
        (("movie_rationales_v010", "validation"), 0),
        (("movie_rationales_v010", "test"), 11),
        (("eraser_multi_rc_eval_v011", "validation"), 0),
    ],
)
def test_every_real_rationale_is_inside_its_document(shared: Path, source, empty, caplog):
    name, split = source
    task = get_task(name)
    examples = task.load(shared / "data", split)
    assert sum(row.metadata["gold_unmatched"] for row in examples.rows) == 0
    assert sum(row.metadata["gold_empty"] for row in examples.rows) == empty
    for row in examples.rows:
        source = row.metadata["source"]
        tokens, inside = document_tokens(source), token_spans(row.metadata["spans"], token_places(source))
        spans = [" ".join(tokens[start:end]) for start, end in inside]
        assert row.target == " explanation: ".join([row.metadata["label"], *spans])
    assert "differ" not in caplog.text
    scores = task.evaluate([row.target for row in examples.rows], examples)
    assert (scores["accuracy"], scores["spans_found"], scores["parsed_rate"]) == (100, 100, 100)
    assert scores["token_f1"] > 99, "a gold text that occurs earlier too is found there"


def test_all_tasks_with_real_data_yield_examples(shared: Path):
    """Every registered task can be built; only Amazon's tasks and some splits have no shared data."""
    without, messages = [], []
    for name in (name for name in TASKS if "/" not in name):
        task = get_task(name)
        for split in task.splits:
            try:
                assert task.load(shared / "data", split).ignored == 0
            except DataError as error:
                messages.append(str(error))
                without.append((name, split))
    assert all("expected one of" in message or "expected folders" in message for message in messages)
    kinds = {(name.split("_")[0], split) for name, split in without}
    assert kinds == {
        ("amazon", "train"),
        ("amazon", "validation"),
        ("cos", "train"),
        ("eraser", "train"),
        ("imdb", "train"),
        ("mnli", "test"),
        ("mnli", "test_matched"),
        ("mnli", "test_mismatched"),
    }


def test_a_subset_of_movies_is_balanced_although_the_file_is_sorted_by_class(shared: Path, tmp_path: Path):
    source = shared / "data" / "eraser_movies"
    folder = tmp_path / "movies"
    folder.mkdir()
    (folder / "docs").symlink_to(source / "docs")
    lines = sorted(
        (source / "train.jsonl").read_text().splitlines(), key=lambda line: json.loads(line)["annotation_id"]
    )
    (folder / "train.jsonl").write_text("\n".join(lines))
    whole = get_task("movie_rationales_v010").load(tmp_path, "train").rows
    assert {row.target.split()[0] for row in whole[:60]} == {"negative"}
    taken = get_task("movie_rationales_explanations_take100_v010").load(tmp_path, "train").rows
    negative = sum(row.target.startswith("negative") for row in taken)
    assert 35 <= negative <= 65
    skipped = get_task("movie_rationales_labels_skip100_v010").load(tmp_path, "train").rows
    assert {row.key for row in taken} | {row.key for row in skipped} == {row.key for row in whole}
    more = get_task("movie_rationales_explanations_take200_v010").load(tmp_path, "train").rows
    assert [row.key for row in more[:100]] == [row.key for row in taken]


def test_subsets_do_not_depend_on_the_hash_seed_of_the_process(shared: Path):
    code = (
        "import sys; from pathlib import Path; from graftwork.tasks import get_task; "
        "rows = get_task('esnli_explanations_take100_v010').load(Path(sys.argv[1]), 'train').rows; "
        "print([row.key for row in rows])"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code, str(shared / "data")],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
    keys = [row.key for row in get_task("esnli_explanations_take100_v010").load(shared / "data", "train").rows]
    assert found == {f"{keys}\n"}


def test_a_document_name_cannot_leave_its_folder(movies, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    for name in ("../../secret.txt", str(tmp_path / "secret.txt"), "a\0"):
        line = {"annotation_id": name, "classification": "POS", "evidences": []}
        with pytest.raises(DataError, match=r"val\.jsonl, line 1.*(found the file name|contains a NUL)|not JSON"):
            MOVIES(movies(line), "validation")
