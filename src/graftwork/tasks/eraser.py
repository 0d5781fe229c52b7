"""ERASER data sets: documents with rationales marked by token offsets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, cast

from graftwork.core.readers import fields_of, join_inside, read_text, require, text_problem
from graftwork.errors import DataError
from graftwork.tasks.lookup import FilesOrHub, find_folder
from graftwork.tasks.sources import HubSource, Record, Records, read_json_lines

logger = logging.getLogger(__name__)

_FILES = {"train": "train.jsonl", "validation": "val.jsonl", "test": "test.jsonl"}


class Evidence(NamedTuple):
    """One rationale snippet; start and end are token offsets, None if the annotation gives none."""

    text: str
    start: int | None = None
    end: int | None = None

    def moved(self, by: int) -> Evidence:
        """Snippet in a text with `by` tokens before its document."""
        return self if self.start is None or self.end is None else Evidence(self.text, self.start + by, self.end + by)


class Annotation(NamedTuple):
    """One line of an ERASER file with its document."""

    key: str
    document: str
    name: str
    """Name of the document."""
    classification: str
    query: str
    groups: tuple[tuple[Evidence, ...], ...]
    """Groups of snippets; the snippets of one group justify the answer together."""
    where: str = ""
    """File and line of the annotation, for error messages."""


def token_places(text: str) -> list[tuple[int, int]]:
    r"""Character range of each canonical token of a document; see `document_tokens`.

    Example:
        >>> token_places("a b .\n\n c")
        [(0, 1), (2, 3), (4, 5), (8, 9)]
    """
    found: list[tuple[int, int]] = []
    start = 0
    for line in text.split("\n"):
        inner = line.strip()
        place = start + line.index(inner)
        for token in inner.split(" "):
            if token:
                found.append((place, place + len(token)))
            place += len(token) + 1
        start += len(line) + 1
    return found


def document_tokens(text: str) -> list[str]:
    r"""Split a document into its canonical tokens, to which all offsets of ERASER refer.

    Source: DeYoung et al. 2020; `jayded/eraserbenchmark`, whose `docs.jsonl` reader keeps empty tokens by mistake.

    Example:
        >>> document_tokens("a b .\n\nc  d .\n")
        ['a', 'b', '.', 'c', 'd', '.']
    """
    return [text[start:end] for start, end in token_places(text)]


Naming = Callable[[Mapping[str, Any], str], str | tuple[str, ...]]
"""Function from an annotation, and its file and line, to the name of its document, or to the names of several."""


def read_annotations(path: Path, docid: Naming) -> list[Annotation]:
    """Read one annotation file with its documents and validate every offset.

    Args:
        path: `train.jsonl`, `val.jsonl` or `test.jsonl`, next to a folder `docs` or a file `docs.jsonl`.
        docid: Returns the name of the document of an annotation; several documents are joined, one on each line.

    Raises:
        DataError: If a line is not an annotation, its document is missing, or its offsets exceed the document.
    """
    documents = Documents(path.parent)
    found: list[Annotation] = []
    mismatches = foreign = 0
    for number, value in read_json_lines(path):
        where = f"{path}, line {number}"
        with fields_of(where, "annotation_id, classification and evidences with offsets, as in an ERASER file"):
            key = require(value, "annotation_id", str, where)
            given = docid(value, where)
            names = (given,) if isinstance(given, str) else given
            classification = require(value, "classification", str, where)
            query = require({"query": value.get("query") or ""}, "query", str, where)
            every = [list(group) for group in require(value, "evidences", list, where)]
            own = [[entry for entry in group if _is_of(entry, names)] for group in every]
            raw = [[_evidence(entry, where) for entry in group] for group in own]
        foreign += sum(map(len, every)) - sum(map(len, own))
        parts = [documents.get(name, where, key) for name in names]
        name, text = " ".join(names), "\n".join(part for part, _ in parts)
        tokens = [token for _, part in parts for token in part]
        if len(names) > 1:
            starts = dict(zip(names, accumulate((len(part) for _, part in parts), initial=0), strict=False))
            with fields_of(where, "evidences with docid"):
                moved = [[starts[str(require(entry, "docid", str, where))] for entry in group] for group in own]
            raw = [[entry.moved(by) for entry, by in zip(*pair, strict=True)] for pair in zip(raw, moved, strict=True)]
        for entry in (entry for group in raw for entry in group):
            mismatches += _check(entry, tokens, where, key, name)
        groups = tuple(tuple(group) for group in raw)
        found.append(Annotation(key, text, name, classification, query, groups, where))
    if mismatches:
        logger.warning("%s: %d snippets differ from the tokens at their offsets; offsets are used.", path, mismatches)
    if foreign:
        logger.warning("%s: %d snippets of a second document of their annotation are left out.", path, foreign)
    return found


def _is_of(entry: Any, documents: Sequence[str]) -> bool:
    """True unless a snippet names another document."""
    given: Any = cast("Mapping[str, Any]", entry).get("docid") if isinstance(entry, Mapping) else None
    return given is None or given in documents


def _evidence(entry: Any, where: str) -> Evidence:
    text = str(require(entry, "text", str, where))
    values = [require(entry, name, (int, type(None)), where) for name in ("start_token", "end_token")]
    if any(value is None or value < 0 for value in values):
        return Evidence(text)
    return Evidence(text, *map(int, values))


def _check(entry: Evidence, tokens: Sequence[str], where: str, key: str, document: str) -> bool:
    if entry.start is None or entry.end is None:
        return False
    if not 0 <= entry.start <= entry.end <= len(tokens):
        raise DataError(
            f"{where}: found a rationale at tokens {entry.start} to {entry.end} of {document}, which has "
            f"{len(tokens)}; expected offsets inside the document (annotation {key}). Fix or remove the line."
        )
    return " ".join(tokens[entry.start : entry.end]) != " ".join(entry.text.split())


class Documents:
    """Documents of one ERASER folder, from `docs/` or `docs.jsonl`.

    Args:
        folder: Folder of the annotation files.

    Raises:
        DataError: If the folder contains neither or both.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed, packed = (folder / "docs").is_dir(), (folder / "docs.jsonl").is_file()
        if listed == packed:
            raise DataError(
                f"{folder}: found {'both docs and docs.jsonl' if listed else 'neither docs nor docs.jsonl'}; expected "
                "one of them. Keep the one that belongs to the annotations."
            )
        self._texts: dict[str, str] | None = None
        if packed:
            self._texts = {}
            for number, value in read_json_lines(folder / "docs.jsonl"):
                where = f"{folder / 'docs.jsonl'}, line {number}"
                field = "doc_id" if isinstance(value, Mapping) and "doc_id" in value else "docid"
                name, text = (str(require(value, one, str, where)) for one in (field, "document"))
                if self._texts.setdefault(name, text) != text:
                    raise DataError(
                        f"{where}: found another document with the docid {name!r}; expected one document of each name. "
                        "Rename or remove one."
                    )
        self._cache: dict[str, tuple[str, list[str]]] = {}

    def get(self, name: str, where: str, annotation: str) -> tuple[str, list[str]]:
        """Return a document and its tokens.

        Args:
            name: Name of the document.
            where: File and line of the annotation, for the error message.
            annotation: Id of the annotation, for the error message.

        Raises:
            DataError: If there is no document of that name.
        """
        if name not in self._cache:
            text = self._read(name, f"{where}, annotation {annotation}")
            if text is None:
                raise DataError(
                    f"{where}: found no document {name!r} in {self.folder} for annotation {annotation}; expected it "
                    "in docs or docs.jsonl. Complete the documents, or remove the line."
                )
            self._cache[name] = (text, document_tokens(text))
        return self._cache[name]

    def _read(self, name: str, where: str) -> str | None:
        if self._texts is not None:
            return self._texts.get(name)
        path = join_inside(self.folder / "docs", name, where)
        if not path.is_file():
            return None
        text = read_text(path)
        if problem := text_problem(text, "the document"):
            raise DataError(f"{path}: {problem}; expected plain text. Replace the file.")
        return text


def annotation_document(value: Mapping[str, Any], where: str) -> str:
    """Document name of a Movies annotation: the annotation id."""
    return str(require(value, "annotation_id", str, where))


def evidence_document(value: Mapping[str, Any], where: str) -> str:
    """Document name of a MultiRC annotation: from the evidence, else `docids`, else the id before the first colon."""
    for group in value["evidences"]:
        for entry in group:
            return str(require(entry, "docid", str, where))
    docids = value.get("docids") or [str(value["annotation_id"]).split(":")[0]]
    return str(require({"docid": docids[0]}, "docid", str, where))


@dataclass(frozen=True, slots=True)
class EraserFiles:
    """Reader of one ERASER data set, with the record fields that a task's format uses."""

    name: str
    folders: tuple[str, ...]
    document: Naming
    fields: Callable[[Annotation], Mapping[str, Any]]

    def __call__(self, data: Path, split: str) -> Records:
        """Read the split.

        Raises:
            DataError: If a file is missing or a line is malformed.
        """
        path = find_folder(data, self.folders, _FILES[split]) / _FILES[split]
        annotations = read_annotations(path, self.document)
        rows = tuple(Record(annotation.key, self.fields(annotation)) for annotation in annotations)
        return Records(self.name, split, rows, len(rows), 0, path)


def class_index(annotation: Annotation, classes: Sequence[str]) -> int:
    """Index of the class of an annotation.

    Args:
        annotation: The annotation.
        classes: Class names.

    Raises:
        DataError: If it has another class.
    """
    if annotation.classification not in classes:
        raise DataError(
            f"{annotation.where}: found classification {annotation.classification!r} in {annotation.key}; expected "
            f"{' or '.join(classes)}. Fix or remove the line."
        )
    return classes.index(annotation.classification)


MOVIE_CLASSES, QUESTION_CLASSES = ("NEG", "POS"), ("False", "True")
"""Class names in the annotations, indexed by label."""


def _movie(annotation: Annotation) -> dict[str, Any]:
    return {
        "review": annotation.document,
        "document_name": annotation.name,
        "class_names": MOVIE_CLASSES,
        "label": class_index(annotation, MOVIE_CLASSES),
        "evidences": tuple(entry.text for group in annotation.groups for entry in group),
        "groups": annotation.groups,
    }


def _question(annotation: Annotation) -> dict[str, Any]:
    return {
        "passage": annotation.document,
        "query_and_answer": annotation.query,
        "document_name": annotation.name,
        "class_names": QUESTION_CLASSES,
        "label": class_index(annotation, QUESTION_CLASSES),
        "evidences": tuple(entry.text for group in annotation.groups for entry in group),
        "groups": annotation.groups,
    }


def _with_texts(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a hub row, which has snippets without offsets."""
    groups = tuple((Evidence(snippet),) for snippet in row["evidences"])
    return {**row, "evidences": tuple(row["evidences"]), "groups": groups}


MOVIES = FilesOrHub(
    EraserFiles("movie_rationales", ("movies", "eraser_movies"), annotation_document, _movie),
    HubSource("eraser-benchmark/movie_rationales", options={"revision": "refs/convert/parquet"}),
    _with_texts,
)
"""Movie reviews with rationales."""

MULTIRC = FilesOrHub(
    EraserFiles("eraser_multi_rc", ("multirc", "eraser_multirc"), evidence_document, _question),
    HubSource("eraser-benchmark/eraser_multi_rc", options={"revision": "refs/convert/parquet"}),
    _with_texts,
)
"""Questions on passages with candidate answers to judge, and the sentences that support each judgement."""
