"""CoS-E: explanations of CommonsenseQA answers, joined to the questions by id."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.errors import ConfigError, DataError
from graftwork.tasks.lookup import FilesOrHub, find_folder
from graftwork.tasks.sources import HubSource, Record, Records, read_json_lines, written

logger = logging.getLogger(__name__)

VERSIONS = ("v1.11", "v1.0")
"""Releases: v1.11 has five choices per question, v1.0 three. The paper uses v1.11."""

_WORDS = {"train": "train", "validation": "dev"}


@dataclass(frozen=True, slots=True)
class CosEFiles:
    """Reader of one release of `salesforce/cos-e` and its CommonsenseQA questions.

    The processed explanations, from which form labels such as "Question:" are removed, are preferred if present, as in
    the paper.
    """

    version: str = "v1.11"

    def __post_init__(self) -> None:
        if self.version not in VERSIONS:
            raise ConfigError(f"Found CoS-E version {self.version!r}; expected one of: {', '.join(VERSIONS)}.")

    def __call__(self, data: Path, split: str) -> Records:
        """Read the split into `question`, `choices`, `answer`, `abstractive_explanation`, `extractive_explanation`.

        Raises:
            DataError: If a file is missing, a line is malformed, or no explanation matches a question.
        """
        word = _WORDS[split]
        folders = (f"cos_e/{self.version}", f"cos-e/data/{self.version}", self.version, "cos_e", "commonsenseqa")
        questions_file = f"{word}_rand_split.jsonl"
        questions_path = find_folder(data, folders, questions_file) / questions_file
        names = (f"cose_{word}_{self.version}_processed.jsonl", f"cose_{word}_{self.version}.jsonl")
        present = [place / name for name in names for place in (data / f for f in folders) if (place / name).exists()]
        path = present[0] if present else find_folder(data, folders, names[1]) / names[1]
        explanations = dict(_explanation(path, number, value) for number, value in read_json_lines(path))
        rows: list[Record] = []
        for number, value in read_json_lines(questions_path):
            key, fields = _question(questions_path, number, value)
            if key in explanations:
                rows.append(Record(key, {**fields, **explanations[key]}))
        if not rows:
            raise DataError(
                f"{path}: found no explanation whose id is in {questions_path}; expected the questions of CoS-E "
                f"{self.version}. Put the CommonsenseQA files of that release next to it."
            )
        if len(rows) < len(explanations):
            logger.warning(
                "%s: %d of %d explanations have no question and are dropped.",
                path,
                len(explanations) - len(rows),
                len(explanations),
            )
        return Records("cos_e", split, tuple(rows), len(rows), 0, path)


def _explanation(path: Path, number: int, value: Any) -> tuple[str, dict[str, str]]:
    try:
        parts = value["explanation"]
        texts = (value["id"], parts["open-ended"], parts.get("selected", ""))
        if not all(isinstance(text, str) for text in texts):
            raise TypeError
        return texts[0], {"abstractive_explanation": written(texts[1]), "extractive_explanation": texts[2]}
    except (LookupError, TypeError, AttributeError):
        raise DataError(
            f'{path}, line {number}: found no explanation; expected {{"id": …, "explanation": {{"open-ended": …}}}}. '
            "Check that this is a CoS-E file."
        ) from None


def _question(path: Path, number: int, value: Any) -> tuple[str, dict[str, Any]]:
    try:
        choices = value["question"]["choices"]
        answer = next(choice["text"] for choice in choices if choice["label"] == value["answerKey"])
        question, listed = value["question"]["stem"], tuple(choice["text"] for choice in choices)
        if not all(isinstance(text, str) for text in (value["id"], question, *listed)):
            raise TypeError
        return str(value["id"]), {"question": question, "choices": listed, "answer": answer}
    except (LookupError, TypeError, AttributeError, StopIteration):
        raise DataError(
            f"{path}, line {number}: found no question with an answer among its choices; expected a line of "
            "CommonsenseQA with id, answerKey, question.stem and question.choices. Check that the file has answers."
        ) from None


def _hub_fields(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**row, "choices": tuple(row["choices"])}


def cos_e(version: str = "v1.11") -> FilesOrHub:
    """Return the source of one CoS-E release, from files or from the hub.

    Raises:
        ConfigError: If the release is unknown.
    """
    return FilesOrHub(CosEFiles(version), HubSource("Salesforce/cos_e", version, key="id"), _hub_fields)
