"""Files of the offline world have the format of the real data sets."""

import csv
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from graftwork.demo.world.passages import HELD_OUT_QUESTIONS, MULTIHOP_SIZES, passages
from graftwork.demo.world.reviews import SENTENCES, SIZES
from graftwork.demo.world.sentences import OPPOSITES, REVIEW, SCENE
from graftwork.demo.world.world import World, build_world
from graftwork.demo.world.writers import WRITERS
from graftwork.tasks import get_task

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
DIGESTS = {
    "unifiedqa": "9d1d50a462517b21",
    "text": "4b0cce2673f1ea93",
    "wikitext": "3849a018797589e0",
    "esnli": "4aac78181522b826",
    "eraser": "970cfc4406300709",
    "imdb": "456757380fd0b7d6",
    "sst2": "631ec13b6a1ed9c0",
    "passages": "a981265979ffd5ae",
    "popqa": "99bd92884868db8e",
    "multihop": "2b1050ddce74a157",
}
"""SHA-256 prefix of the output of each writer for seed 0, with files in the order of their names."""


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(0)


@pytest.fixture(scope="module")
def folder(offline_world: Path) -> Path:
    return offline_world


def read_csv(path: Path, **options: str) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True, **options))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def real(path: str) -> Path:
    if not (SHARED / path).exists():
        pytest.skip(f"real data are not at {SHARED / path}")
    return SHARED / path


@pytest.mark.parametrize("name", WRITERS)
def test_writers_are_byte_for_byte_stable(name, world, tmp_path):
    paths = WRITERS[name](world, tmp_path)
    assert all(path.is_file() for path in paths)
    digest = hashlib.sha256()
    for path in sorted(file for file in tmp_path.rglob("*") if file.is_file()):
        digest.update(f"{path.relative_to(tmp_path).as_posix()}\n".encode() + path.read_bytes())
    assert digest.hexdigest()[:16] == DIGESTS[name]


# e-SNLI


@pytest.mark.parametrize("name", ["train_1", "train_2", "dev", "test"])
def test_esnli_has_the_header_of_the_real_file(name, folder):
    header = (folder / "esnli" / f"esnli_{name}.csv").read_text(encoding="utf-8").splitlines()[0]
    with real(f"esnli/esnli_{name}.csv").open(encoding="utf-8") as file:
        assert header == file.readline().rstrip("\r\n")


def test_esnli_pairs_have_unique_keys_and_balanced_labels(folder):
    keys = []
    for names in (("train_1", "train_2"), ("dev",), ("test",)):
        rows = [row for name in names for row in read_csv(folder / "esnli" / f"esnli_{name}.csv")]
        labels = Counter(row["gold_label"] for row in rows)
        assert set(labels) == {"entailment", "neutral", "contradiction"}
        assert len(set(labels.values())) == 1
        keys += [row["pairID"] for row in rows]
        reasons = [row[f"Explanation_{n}"] for row in rows for n in ((1,) if "train_1" in names else (1, 2, 3))]
        assert all(reasons)
    assert len(set(keys)) == len(keys)


def test_esnli_labels_follow_from_the_two_sentences(folder):
    """Derive the labels from the sentences by comparing their animals, places and traits."""
    for name in ("train_1", "train_2", "dev", "test"):
        for row in read_csv(folder / "esnli" / f"esnli_{name}.csv"):
            assert derived_label(row["Sentence1"], row["Sentence2"]) == row["gold_label"], row


def derived_label(premise: str, hypothesis: str) -> str:
    first, second = scene(premise), scene(hypothesis)
    verdicts = {
        compared(first["animal"], second["animal"], SCENE["bird"], "bird", "beast"),
        compared(first["animal"], second["animal"], SCENE["beast"], "beast", "bird"),
        compared(first["place"], second["place"], SCENE["outside"], "outside", "inside"),
        compared(first["place"], second["place"], SCENE["inside"], "inside", "outside"),
    }
    if second["trait"]:
        if first["trait"] is None:
            verdicts.add("neutral")
        elif OPPOSITES[first["trait"]] == second["trait"]:
            verdicts.add("contradiction")
    return next((v for v in ("contradiction", "neutral") if v in verdicts), "entailment")


def compared(stated: str | None, claimed: str | None, members: tuple[str, ...], whole: str, other: str) -> str:
    """Return the label of one attribute.

    Args:
        stated: Value in the premise.
        claimed: Value in the hypothesis.
        members: Values of one category.
        whole: Name of that category.
        other: Name of the other category.
    """
    if claimed is None or claimed == stated:
        return "entailment"
    if stated is None:
        return "neutral"
    if stated in members:
        return "entailment" if claimed == whole else "contradiction"
    return "entailment"


def scene(sentence: str) -> dict[str, str | None]:
    traits = "|".join(OPPOSITES)
    animals = "|".join((*SCENE["bird"], *SCENE["beast"], "bird", "beast"))
    places = "|".join((*SCENE["outside"], *SCENE["inside"], "outside", "inside"))
    match = re.fullmatch(
        rf"an? (?:(?P<trait>{traits}) )?\w+ (?:{'|'.join(SCENE['verb'])}) an? (?P<animal>{animals})"
        rf"(?: (?P<place>{places}))? \.",
        sentence,
    )
    assert match, sentence
    return match.groupdict()


# ERASER


@pytest.mark.parametrize(("name", "split"), [("train", "train"), ("val", "dev"), ("test", "test")])
def test_eraser_spans_match_their_token_offsets(folder, name, split):
    rows = read_lines(folder / "eraser_movies" / f"{name}.jsonl")
    assert len(rows) == SIZES[split]
    assert Counter(row["classification"] for row in rows) == dict.fromkeys(("NEG", "POS"), SIZES[split] // 2)
    assert [row["annotation_id"] for row in rows] == sorted({row["annotation_id"] for row in rows})
    for row in rows:
        text = (folder / "eraser_movies" / "docs" / row["annotation_id"]).read_text(encoding="utf-8")
        sentences = [line.strip().split(" ") for line in text.split("\n") if line.strip()]
        tokens = [token for sentence in sentences for token in sentence if token]
        assert row["evidences"]
        for (span,) in row["evidences"]:
            assert span["text"] == " ".join(tokens[span["start_token"] : span["end_token"]])
            assert span["docid"] == row["annotation_id"]
            before = sum(map(len, sentences[: span["start_sentence"]]))
            assert before <= span["start_token"] < span["end_token"]
            assert span["end_token"] <= before + len(sentences[span["start_sentence"]])
            assert span["end_sentence"] == span["start_sentence"] + 1
            assert text.replace("\n", " ").count(span["text"]) == 1


def test_the_imdb_archive_contains_the_same_reviews_and_labels(folder):
    task = get_task("reviews/imdb")
    for split, name in (("train", "train"), ("test", "test")):
        classes = {"NEG": "negative", "POS": "positive"}
        expected = {}
        for row in read_lines(folder / "eraser_movies" / f"{name}.jsonl"):
            words = (folder / "eraser_movies" / "docs" / row["annotation_id"]).read_text(encoding="utf-8").split()
            expected[" ".join(words)] = classes[row["classification"]]
        rows = task.load(folder, split).rows
        assert {row.input: row.target for row in rows} == expected


def test_eraser_lines_have_the_fields_of_the_real_file(folder):
    ours = read_lines(folder / "eraser_movies" / "val.jsonl")[0]
    theirs = read_lines(real("eraser_movies/val.jsonl"))[0]
    assert ours.keys() == theirs.keys()
    assert ours["evidences"][0][0].keys() == theirs["evidences"][0][0].keys()
    assert ours["query"] == theirs["query"]


def test_rationales_of_reviews_with_concessions_support_the_label(folder):
    texts = [path.read_text(encoding="utf-8") for path in (folder / "eraser_movies" / "docs").iterdir()]
    assert 0.15 < sum("although" in text for text in texts) / len(texts) < 0.25
    for name in ("train", "val", "test"):
        for row in read_lines(folder / "eraser_movies" / f"{name}.jsonl"):
            assert not any("although" in span["text"] for (span,) in row["evidences"])


# GLUE


@pytest.mark.parametrize("split", SENTENCES)
def test_sst2_is_a_table_of_sentence_and_label_without_quotes(folder, split):
    lines = (folder / "glue" / "SST-2" / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "sentence\tlabel"
    rows = [line.split("\t") for line in lines[1:]]
    assert len(rows) == SENTENCES[split]
    assert Counter(label for _, label in rows) == {"0": SENTENCES[split] // 2, "1": SENTENCES[split] // 2}
    assert '"' not in "".join(lines)


def test_sst2_cannot_be_solved_by_counting_words(folder):
    """A classifier that counts positive and negative words is wrong or undecided on one third of the sentences."""
    praise = {*REVIEW["positive"], *REVIEW["positive-verb"]}
    blame = {*REVIEW["negative"], *REVIEW["negative-verb"]}
    lines = (folder / "glue" / "SST-2" / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]
    right = 0
    for line in lines:
        text, label = line.split("\t")
        score = sum((word in praise) - (word in blame) for word in text.split())
        right += (score > 0) == (label == "1") and score != 0
    assert right / len(lines) < 2 / 3


# running text


def test_wikitext_has_headings_and_blank_lines_as_the_real_file(folder):
    pattern = r" \n(?: = [^=\n]+ = \n \n(?: [^=\n]+ \n)+ \n)+"
    for name in ("train", "valid", "test"):
        text = (folder / "wikitext" / f"wiki.{name}.raw").read_text(encoding="utf-8")
        assert re.fullmatch(pattern, text)
    start = real("wikitext-2-raw/wiki.test.raw").read_text(encoding="utf-8")[:30]
    assert re.match(r" \n = [^=\n]+ = \n \n ", start)


# passages and questions


def test_corpora_contain_every_entity_once(folder, world):
    lines = (folder / "dpr" / "psgs_w100.tsv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "id\ttext\ttitle"
    rows = read_csv(folder / "dpr" / "psgs_w100.tsv", delimiter="\t")
    assert [row["id"] for row in rows] == [str(number) for number in range(1, len(rows) + 1)]
    assert {row["title"] for row in rows} == set(world.entities)
    assert len(rows) == len(world.entities)
    assert all(len(row["text"].split()) <= 100 for row in rows)
    records = read_lines(folder / "passages" / "passages.jsonl")
    assert [(r["_id"], r["title"], r["text"]) for r in records] == [(r["id"], r["title"], r["text"]) for r in rows]


def test_popqa_has_the_columns_of_the_real_file(folder):
    ours = (folder / "popqa" / "popQA.tsv").read_text(encoding="utf-8").splitlines()[0]
    with real("popqa/popQA.tsv").open(encoding="utf-8") as file:
        assert ours == file.readline().rstrip("\r\n")


def test_popqa_answers_occur_in_the_passage_about_the_subject(folder):
    texts = {row["title"]: row["text"] for row in read_csv(folder / "dpr" / "psgs_w100.tsv", delimiter="\t")}
    rows = read_csv(folder / "popqa" / "popQA.tsv", delimiter="\t")
    for row in rows:
        assert row["obj"] in texts[row["subj"]]
        assert json.loads(row["possible_answers"]) == [row["obj"], *json.loads(row["o_aliases"])]
        assert row["subj"] in row["question"]


def test_popqa_held_out_rows_and_train_rows_share_no_people(folder, world):
    rows = read_csv(folder / "popqa" / "popQA.tsv", delimiter="\t")
    held_out = {row["subj"] for row in rows[:HELD_OUT_QUESTIONS]}
    trained = {row["subj"] for row in rows[HELD_OUT_QUESTIONS:]}
    assert held_out <= {person.name for person in world.unseen_people("test")}
    assert trained == {person.name for person in world.unseen_people("train")}
    assert not held_out & trained


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_multihop_questions_follow_from_their_supporting_facts(folder, split):
    records = json.loads((folder / "2wikimultihopqa" / f"{split}.json").read_text(encoding="utf-8"))
    assert len(records) == MULTIHOP_SIZES[split]
    assert len({record["_id"] for record in records}) == len({record["question"] for record in records}) == len(records)
    for record in records:
        context = dict(record["context"])
        assert len(context) == len(record["context"])
        for (title, index), (subject, _, value) in zip(record["supporting_facts"], record["evidences"], strict=True):
            assert title == subject
            assert value in context[title][index]
        values = [value for _, _, value in record["evidences"]]
        if record["type"] == "compositional":
            assert record["answer"] == values[-1]
            assert record["evidences"][1][0] == values[0]
        else:
            half = len(values) // 2
            assert record["answer"] == ("yes" if values[half - 1] == values[-1] else "no")
        assert (record["answer_id"] is None) == (record["answer"] in ("yes", "no"))


def test_multihop_records_have_the_fields_of_the_real_file(folder):
    theirs = json.loads(real("2wikimultihopqa/dev.json").read_text(encoding="utf-8"))[0]
    ours = json.loads((folder / "2wikimultihopqa" / "dev.json").read_text(encoding="utf-8"))[0]
    assert ours.keys() == theirs.keys()
    aliases = read_lines(folder / "2wikimultihopqa" / "id_aliases.json")
    assert aliases[0].keys() == read_lines(real("2wikimultihopqa/id_aliases.json"))[0].keys()
    known = {record["Q_id"]: record["aliases"] for record in aliases}
    assert len(known) == len(aliases)
    assert ours["answer_id"] is None or ours["answer"] in known[ours["answer_id"]]


def test_question_files_are_lists_of_question_and_answers(folder):
    for name in ("train", "dev", "test", "known"):
        records = json.loads((folder / "questions" / f"{name}.json").read_text(encoding="utf-8"))
        assert len(records) > 100
        assert all(record["question"] and record["answer"] for record in records)


def test_passages_state_their_facts(world):
    for passage in passages(world):
        assert len(passage.sentences) == len(passage.facts)
        for sentence, fact in zip(passage.sentences, passage.facts, strict=True):
            assert fact.subject in sentence
            assert fact.value in sentence
