"""Writers of the offline world in the on-disk formats of real data sets."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from graftwork.demo.world.articles import articles
from graftwork.demo.world.pairs import Pair, pairs
from graftwork.demo.world.passages import (
    HELD_OUT_QUESTIONS,
    MultihopQuestion,
    Passage,
    Question,
    known_questions,
    multihop_questions,
    passages,
    unseen_questions,
)
from graftwork.demo.world.questions import UNIFIEDQA, text_lines
from graftwork.demo.world.reviews import Review, judged_sentences, reviews
from graftwork.demo.world.sentences import RELATIONS
from graftwork.demo.world.world import SPLITS, Fact, Split, World

_QUERY = "What is the sentiment of this review?"
_ESNLI_MARKS = ("Sentence1_marked", "Sentence2_marked", "Sentence1_Highlighted", "Sentence2_Highlighted")
_POPQA_COLUMNS = (
    *("id", "subj", "prop", "obj", "subj_id", "prop_id", "obj_id", "s_aliases", "o_aliases", "s_uri", "o_uri"),
    *("s_wiki_title", "o_wiki_title", "s_pop", "o_pop", "question", "possible_answers"),
)
_ERASER_NAMES: Mapping[Split, str] = MappingProxyType({"train": "train", "dev": "val", "test": "test"})
_WIKITEXT_NAMES: Mapping[Split, str] = MappingProxyType({"train": "train", "dev": "valid", "test": "test"})


def write_world(world: World, out: Path) -> list[Path]:
    """Write all formats below a folder; return the written files."""
    return [path for write in WRITERS.values() for path in write(world, out)]


def write_unifiedqa(world: World, out: Path) -> list[Path]:
    """Write `unifiedqa/<dataset>/<split>.tsv` and `<split>_ans.jsonl` below a folder.

    Returns:
        Paths of the TSV files.
    """
    written: list[Path] = []
    for name, rows_of in UNIFIEDQA.items():
        folder = out / "unifiedqa" / name
        for split in SPLITS:
            rows = rows_of(world, split)
            _write_lines(folder / f"{split}_ans.jsonl", [json.dumps(row.answers) for row in rows])
            written.append(_write_lines(folder / f"{split}.tsv", [f"{row.input}\t{row.answers[0]}" for row in rows]))
    return written


def write_text(world: World, out: Path) -> list[Path]:
    """Write `text/train.txt` and `text/dev.txt` below a folder, one sentence per line."""
    return [_write_lines(out / "text" / f"{split}.txt", text_lines(world, split)) for split in ("train", "dev")]


def write_wikitext(world: World, out: Path) -> list[Path]:
    """Write `wikitext/wiki.{train,valid,test}.raw` below a folder, headings and paragraphs separated by blank lines."""
    written: list[Path] = []
    for split, name in _WIKITEXT_NAMES.items():
        lines = [" "]
        for article in articles(world, split):
            lines += [f" = {article.title} = ", " ", f" {' '.join(article.sentences)} ", " "]
        written.append(_write_lines(out / "wikitext" / f"wiki.{name}.raw", lines))
    return written


def write_esnli(world: World, out: Path) -> list[Path]:
    """Write `esnli/esnli_{train_1,train_2,dev,test}.csv` below a folder; the highlight columns are empty."""
    folder = out / "esnli"
    train = pairs(world, "train")
    half = len(train) // 2
    parts = {"train_1": train[:half], "train_2": train[half:], "dev": pairs(world, "dev"), "test": pairs(world, "test")}
    return [_write_text(folder / f"esnli_{name}.csv", _esnli(rows)) for name, rows in parts.items()]


def write_eraser(world: World, out: Path) -> list[Path]:
    """Write `eraser_movies/{train,val,test}.jsonl` and one file per review in `docs/` below a folder.

    Negative reviews come first, as in the original; the spans of a review are in reading order.

    Returns:
        Paths of the annotation files and the documents.
    """
    folder = out / "eraser_movies"
    written: list[Path] = []
    for split, name in _ERASER_NAMES.items():
        made = sorted(reviews(world, split), key=lambda review: review.name)
        lines = [json.dumps(_annotation(review), sort_keys=True) for review in made]
        written.append(_write_lines(folder / f"{name}.jsonl", lines))
        written += [_write_text(folder / "docs" / review.name, review.text) for review in made]
    return written


def write_imdb(world: World, out: Path) -> list[Path]:
    """Write the same reviews without spans in the layout of the IMDb archive below a folder.

    The files are `aclImdb/<train|test>/<neg|pos>/*.txt`, one line each; the archive has no dev split.
    """
    return [
        _write_text(out / "aclImdb" / split / review.label[:3].lower() / review.name, review.text.replace("\n", " "))
        for split in ("train", "test")
        for review in reviews(world, split)
    ]


def write_sst2(world: World, out: Path) -> list[Path]:
    """Write `glue/SST-2/train.tsv` and `dev.tsv` below a folder."""
    written: list[Path] = []
    for split in ("train", "dev"):
        lines = [f"{text} \t{label}" for text, label in judged_sentences(world, split)]
        written.append(_write_lines(out / "glue" / "SST-2" / f"{split}.tsv", ["sentence\tlabel", *lines]))
    return written


def write_passages(world: World, out: Path) -> list[Path]:
    """Write the corpus as `dpr/psgs_w100.tsv` and, with equal ids, as `passages/passages.jsonl` below a folder."""
    made = passages(world)
    lines = [f'{p.number}\t"{p.text}"\t{p.title}' for p in made]
    records = [json.dumps({"_id": str(p.number), "title": p.title, "text": p.text}) for p in made]
    return [
        _write_lines(out / "dpr" / "psgs_w100.tsv", ["id\ttext\ttitle", *lines]),
        _write_lines(out / "passages" / "passages.jsonl", records),
    ]


def write_popqa(world: World, out: Path) -> list[Path]:
    """Write `popqa/popQA.tsv`, and the same questions by split as `questions/*.json`, below a folder.

    The first `HELD_OUT_QUESTIONS` rows of the table are about unseen people of the test split, the others about unseen
    people of the train split. `questions/known.json` is about facts that plain text states as well.
    """
    unseen: dict[str, list[Question]] = {split: unseen_questions(world, split) for split in SPLITS}
    numbers = _Numbers(world)
    rows = unseen["test"][:HELD_OUT_QUESTIONS] + unseen["train"]
    table = io.StringIO()
    writer = csv.writer(table, delimiter="\t", lineterminator="\n")
    writer.writerow(_POPQA_COLUMNS)
    writer.writerows(_popqa_row(number, question, numbers) for number, question in enumerate(rows, start=1))
    written = [_write_text(out / "popqa" / "popQA.tsv", table.getvalue())]
    for name, questions in (unseen | {"known": known_questions(world)}).items():
        records = [{"question": q.text, "answer": list(q.answers)} for q in questions]
        written.append(_write_json(out / "questions" / f"{name}.json", records))
    return written


def write_multihop(world: World, out: Path) -> list[Path]:
    """Write `2wikimultihopqa/{train,dev,test}.json` and `id_aliases.json` (JSON lines) below a folder."""
    folder = out / "2wikimultihopqa"
    numbers = _Numbers(world)
    by_title = {passage.title: passage for passage in passages(world)}
    written: list[Path] = []
    for split in SPLITS:
        records = [
            _multihop(f"{split}{number:06d}", question, by_title, numbers)
            for number, question in enumerate(multihop_questions(world, split))
        ]
        written.append(_write_json(folder / f"{split}.json", records))
    aliases = [
        json.dumps({"Q_id": numbers.identifier(name), "aliases": [name, f"the {name}"], "demonyms": []})
        for name in numbers.names
    ]
    return [*written, _write_lines(folder / "id_aliases.json", aliases)]


WRITERS = MappingProxyType(
    {
        "unifiedqa": write_unifiedqa,
        "text": write_text,
        "wikitext": write_wikitext,
        "esnli": write_esnli,
        "eraser": write_eraser,
        "imdb": write_imdb,
        "sst2": write_sst2,
        "passages": write_passages,
        "popqa": write_popqa,
        "multihop": write_multihop,
    }
)
"""Writers by format name."""


class _Numbers:
    """Numeric ids of all names, for columns that hold Wikidata-like identifiers."""

    def __init__(self, world: World) -> None:
        values = {value for relation in RELATIONS for value in world.pool(relation)}
        self.names = sorted({*world.entities, *values})
        self._number = {name: number for number, name in enumerate(self.names, start=1)}
        self._relation = {name: number for number, name in enumerate(RELATIONS, start=1)}

    def of(self, name: str) -> int:
        return self._number[name]

    def identifier(self, name: str) -> str:
        return f"Q{self._number[name]}"

    def relation(self, name: str) -> int:
        return self._relation[name]


def _esnli(rows: Sequence[Pair]) -> str:
    count = len(rows[0].explanations)
    header = ["pairID", "gold_label", "Sentence1", "Sentence2", "Explanation_1"]
    header += ["WorkerId"] if count == 1 else []
    header += [f"{mark}_1" for mark in _ESNLI_MARKS]
    for number in range(2, count + 1):
        header += [f"Explanation_{number}", *(f"{mark}_{number}" for mark in _ESNLI_MARKS)]
    table = io.StringIO()
    writer = csv.DictWriter(table, header, restval="", lineterminator="\n")
    writer.writeheader()
    for pair in rows:
        row = {"pairID": pair.name, "gold_label": pair.label, "Sentence1": pair.premise, "Sentence2": pair.hypothesis}
        writer.writerow(row | {f"Explanation_{n}": text for n, text in enumerate(pair.explanations, start=1)})
    return table.getvalue()


def _annotation(review: Review) -> dict[str, Any]:
    sentence_of = [number for number, sentence in enumerate(review.sentences) for _ in sentence]
    evidences = [
        [
            {
                "docid": review.name,
                "start_token": start,
                "end_token": end,
                "start_sentence": sentence_of[start],
                "end_sentence": sentence_of[end - 1] + 1,
                "text": " ".join(review.tokens[start:end]),
            }
        ]
        for start, end in review.spans
    ]
    return {
        "annotation_id": review.name,
        "classification": "POS" if review.label == "positive" else "NEG",
        "evidences": evidences,
        "query": _QUERY,
        "query_type": None,
    }


def _popqa_row(number: int, question: Question, numbers: _Numbers) -> Iterable[Any]:
    fact = question.fact
    subject, value = numbers.of(fact.subject), numbers.of(fact.value)
    return (
        number,
        fact.subject,
        fact.relation,
        fact.value,
        subject,
        numbers.relation(fact.relation),
        value,
        "[]",
        json.dumps(question.answers[1:]),
        f"world:Q{subject}",
        f"world:Q{value}",
        fact.subject,
        fact.value,
        1,
        1,
        question.text,
        json.dumps(question.answers),
    )


def _multihop(
    name: str, question: MultihopQuestion, by_title: Mapping[str, Passage], numbers: _Numbers
) -> dict[str, Any]:
    # corpus order, so that the order of titles carries no information
    titles = {fact.subject for fact in question.facts} | set(question.distractors)
    context = sorted(titles, key=lambda title: by_title[title].number)
    yes_no = question.answer in ("yes", "no")
    return {
        "_id": name,
        "type": question.kind,
        "question": question.text,
        "context": [[title, list(by_title[title].sentences)] for title in context],
        "entity_ids": "_".join(numbers.identifier(subject) for subject in question.subjects),
        "supporting_facts": [[fact.subject, by_title[fact.subject].facts.index(fact)] for fact in question.facts],
        "evidences": [[fact.subject, fact.relation, fact.value] for fact in question.facts],
        "evidences_id": [_identifiers(fact, numbers) for fact in question.facts],
        "answer": question.answer,
        "answer_id": None if yes_no else numbers.identifier(question.answer),
    }


def _identifiers(fact: Fact, numbers: _Numbers) -> list[str]:
    return [numbers.identifier(fact.subject), fact.relation, numbers.identifier(fact.value)]


def _write_lines(path: Path, lines: Sequence[str]) -> Path:
    return _write_text(path, "".join(f"{line}\n" for line in lines))


def _write_json(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    return _write_text(path, json.dumps(records) + "\n")


def _write_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
    return path
