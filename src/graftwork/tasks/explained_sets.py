"""Data sets with explanations beyond those of the paper: ERASER's other sets, SciFact, HateXplain and ECQA."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from graftwork.core.readers import fields_of, read_json_mapping, require
from graftwork.errors import DataError
from graftwork.metrics.spans import Span
from graftwork.tasks.eraser import Annotation, EraserFiles, class_index, evidence_document
from graftwork.tasks.lookup import find_folder
from graftwork.tasks.own_data.explained import marked_spans
from graftwork.tasks.sources import Record, Records, read_csv, read_json_lines, written

logger = logging.getLogger(__name__)

BOOLQ_CLASSES = ("False", "True")
FEVER_CLASSES = ("SUPPORTS", "REFUTES")
INFERENCE_CLASSES = ("significantly decreased", "no significant difference", "significantly increased")
NLI_CLASSES = ("contradiction", "entailment", "neutral")
CLAIM_CLASSES = ("SUPPORT", "CONTRADICT", "NOT_ENOUGH_INFO")
POST_CLASSES = ("hatespeech", "normal", "offensive")


def _asked(classes: Sequence[str], *, named: bool = True) -> Callable[[Annotation], Mapping[str, Any]]:
    """Record fields of a document with a query; without `named`, it is no document of the ERASER export."""

    def fields(annotation: Annotation) -> dict[str, Any]:
        found: dict[str, Any] = {
            "passage": annotation.document,
            "query": annotation.query,
            "label": class_index(annotation, classes),
            "evidences": tuple(entry.text for group in annotation.groups for entry in group),
            "groups": annotation.groups,
        }
        return {**found, "document_name": annotation.name, "class_names": tuple(classes)} if named else found

    return fields


def pair_documents(value: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Names of premise and hypothesis of an annotation of e-SNLI: its `docids`, or its id with both endings.

    Args:
        value: The annotation.
        where: File and line.
    """
    key = str(require(value, "annotation_id", str, where))
    given: Any = value.get("docids") or [f"{key}_premise", f"{key}_hypothesis"]
    names = [str(require({"docid": name}, "docid", str, where)) for name in given]
    return tuple(sorted(names, key=lambda name: (name.endswith("_hypothesis"), name)))


BOOLQ = EraserFiles("boolq", ("boolq", "eraser_boolq"), evidence_document, _asked(BOOLQ_CLASSES))
"""Yes–no questions on Wikipedia articles with the passage that answers them (ERASER)."""
FEVER = EraserFiles("fever", ("fever", "eraser_fever"), evidence_document, _asked(FEVER_CLASSES))
"""Claims on Wikipedia articles with the sentences that support or refute them (ERASER)."""
EVIDENCE_INFERENCE = EraserFiles(
    "evidence_inference",
    ("evidence_inference", "eraser_evidence_inference"),
    evidence_document,
    _asked(INFERENCE_CLASSES),
)
"""Effects of interventions in clinical trials with the sentences that report them (ERASER)."""
ERASER_ESNLI = EraserFiles("eraser_esnli", ("eraser_esnli", "esnli"), pair_documents, _asked(NLI_CLASSES, named=False))
"""e-SNLI with highlighted words in premise and hypothesis, which are two documents (ERASER)."""


@dataclass(frozen=True, slots=True)
class SciFactFiles:
    """Reader of `claims_train.jsonl`, `claims_dev.jsonl` and `corpus.jsonl` of `allenai/scifact`.

    A row is a claim with one of its abstracts; an abstract that is cited without evidence has the class
    NOT_ENOUGH_INFO.
    """

    def __call__(self, data: Path, split: str) -> Records:
        """Read the split into `passage`, `query`, `label` and `span_offsets`, the sentences of the evidence.

        Raises:
            DataError: If a file is missing, a line is malformed, or an abstract or a sentence does not exist.
        """
        file = f"claims_{'dev' if split == 'validation' else split}.jsonl"
        folder = find_folder(data, ("scifact", "scifact/data"), file)
        corpus: dict[str, list[str]] = {}
        for number, value in read_json_lines(folder / "corpus.jsonl"):
            where = f"{folder / 'corpus.jsonl'}, line {number}"
            with fields_of(where, "doc_id and abstract, as in SciFact's corpus"):
                corpus[str(value["doc_id"])] = [str(sentence) for sentence in require(value, "abstract", list, where)]
        rows: list[Record] = []
        for number, value in read_json_lines(folder / file):
            where = f"{folder / file}, line {number}"
            with fields_of(where, "id, claim, evidence and cited_doc_ids, as in SciFact's claims"):
                rows += _claims(value, corpus, where)
        return Records("scifact", split, tuple(rows), len(rows), 0, folder / file)


def _claims(value: Mapping[str, Any], corpus: Mapping[str, Sequence[str]], where: str) -> list[Record]:
    """One record for each abstract of a claim."""
    evidence: Mapping[str, Any] = value["evidence"]
    found: list[Record] = []
    for name in dict.fromkeys([*map(str, value["cited_doc_ids"]), *evidence]):
        if name not in corpus:
            raise DataError(f"{where}: found no abstract {name} in corpus.jsonl; expected it. Complete the corpus.")
        sentences = [" ".join(sentence.split()) for sentence in corpus[name]]
        ends: list[int] = []
        for sentence in sentences:
            ends.append((ends[-1] + 1 if ends else 0) + len(sentence))
        groups: list[Mapping[str, Any]] = list(evidence.get(name, ()))
        labels = {str(group["label"]) for group in groups} or {CLAIM_CLASSES[2]}
        chosen = sorted({int(place) for group in groups for place in group["sentences"]})
        if len(labels) > 1 or not labels <= set(CLAIM_CLASSES) or any(not 0 <= one < len(sentences) for one in chosen):
            raise DataError(
                f"{where}: found the labels {', '.join(sorted(labels))} and the sentences {chosen} of {name}, "
                f"which has {len(sentences)}; expected one of {', '.join(CLAIM_CLASSES)}, and sentences inside it. Fix "
                "or remove the line."
            )
        fields = {
            "passage": " ".join(sentences),
            "query": str(value["claim"]),
            "label": CLAIM_CLASSES.index(labels.pop()),
            "span_offsets": tuple((ends[place] - len(sentences[place]), ends[place]) for place in chosen),
        }
        found.append(Record(f"{value['id']}:{name}", fields))
    return found


@dataclass(frozen=True, slots=True)
class HateXplainFiles:
    """Reader of `dataset.json` and `post_id_divisions.json` of `hate-alert/HateXplain`.

    The label is that of most annotators; posts on which all of them differ are left out, as in the original. A token
    belongs to the explanation if at least half of the annotators who marked tokens have marked it.
    """

    def __call__(self, data: Path, split: str) -> Records:
        """Read the split into `post`, `label` and `span_offsets`.

        Raises:
            DataError: If a file is missing, a post is malformed, or a mask has another length than its post.
        """
        folder = find_folder(data, ("hatexplain", "HateXplain/Data", "Data"), "dataset.json")
        path = folder / "dataset.json"
        posts = read_json_mapping(path)
        divisions = read_json_mapping(folder / "post_id_divisions.json")
        names: list[str] = list(divisions.get({"validation": "val"}.get(split, split), ()))
        rows: list[Record] = []
        undecided = 0
        for name in names:
            where = f"{path}, post {name}"
            with fields_of(where, "annotators, rationales and post_tokens, as in HateXplain"):
                fields = _post(posts[name], where)
            if fields is None:
                undecided += 1
            else:
                rows.append(Record(name, fields))
        if undecided:
            logger.warning("%s: %d posts on which all annotators differ are left out.", path, undecided)
        return Records("hatexplain", split, tuple(rows), len(rows), 0, path)


def _post(value: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """Record fields of a post; None if no label has a majority."""
    tokens = [str(token) for token in value["post_tokens"]]
    label, votes = Counter(str(one["label"]) for one in value["annotators"]).most_common(1)[0]
    masks = cast("list[list[int]]", [list(mask) for mask in value["rationales"] if mask])
    if label not in POST_CLASSES or any(len(mask) != len(tokens) for mask in masks):
        raise DataError(
            f"{where}: found the label {label!r} and masks of {sorted({len(mask) for mask in masks})} tokens; expected "
            f"one of {', '.join(POST_CLASSES)}, and masks of {len(tokens)} tokens. Fix or remove the post."
        )
    if votes == 1 and len(value["annotators"]) > 1:
        return None
    places: list[Span] = []
    for token in tokens:
        start = places[-1][1] + 1 if places else 0
        places.append((start, start + len(token)))
    spans = marked_spans(masks, places) if masks else ()
    return {"post": " ".join(tokens), "label": POST_CLASSES.index(label), "span_offsets": spans}


_OPTIONS = tuple(f"q_op{number}" for number in range(1, 6))
_SPLITS = {"train": "train", "validation": "val", "test": "test"}


@dataclass(frozen=True, slots=True)
class EcqaFiles:
    """Reader of `cqa_data_train.csv`, `cqa_data_val.csv` and `cqa_data_test.csv`, which `dair-iitd/ECQA-Dataset` makes.

    The explanation is the free-flow one (`taskB`).
    """

    def __call__(self, data: Path, split: str) -> Records:
        """Read the split into `question`, `choices`, `answer` and `abstractive_explanation`.

        Raises:
            DataError: If a file or a column is missing, or an answer is none of its options.
        """
        file = f"cqa_data_{_SPLITS[split]}.csv"
        folder = find_folder(data, ("ecqa", "ECQA-Dataset"), file)
        table = read_csv(folder / file, ("q_no", "q_text", "q_ans", "taskB", *_OPTIONS))
        rows: list[Record] = []
        for index, cells in table.rows:
            choices = tuple(cells[name] for name in _OPTIONS)
            if cells["q_ans"] not in choices:
                raise DataError(
                    f"{table.path}, row {index + 1}: found the answer {cells['q_ans']!r}; expected one of "
                    f"{', '.join(choices)}. Fix or remove the row."
                )
            fields = {"question": cells["q_text"], "choices": choices, "answer": cells["q_ans"]}
            rows.append(Record(cells["q_no"], {**fields, "abstractive_explanation": written(cells["taskB"])}))
        return Records("ecqa", split, tuple(rows), len(rows) + table.ignored, table.ignored, table.path)
