"""Answers with spans in the results format of ERASER, so that its own scorer can read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftwork.core.files import read_lines
from graftwork.core.run_folder import DETAILS_SUFFIX, RunFolder
from graftwork.tasks.sources import write_json_lines

SUFFIX = ".eraser.jsonl"

_DISTRIBUTIONS = {
    "classification_scores": "probabilities",
    "comprehensiveness_classification_scores": "probabilities_without",
    "sufficiency_classification_scores": "probabilities_alone",
}
"""Fields of the format, by the details that they are made of."""


def write_eraser_results(run: RunFolder, output: Path) -> list[Path]:
    """Write one file for each task and setting of a run whose documents are of ERASER.

    Source: DeYoung et al. 2020; the results format of `jayded/eraserbenchmark`.

    Args:
        run: The run.
        output: Folder for the files.

    Returns:
        The files written; none if the run has no such answers.
    """
    written = []
    for path in sorted(run.predictions.rglob(f"*{DETAILS_SUFFIX}")):
        entries = list(read_lines(path))
        if not entries or not all("document" in entry for entry in entries):
            continue
        target = output / str(path.relative_to(run.predictions)).replace(DETAILS_SUFFIX, SUFFIX)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json_lines(target, eraser_results(entries))
        written.append(target)
    return written


def eraser_results(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a results file.

    A field that not every answer has is left out of all of them, and classes go with their probabilities or not at all,
    because the scorer refuses anything else. It knows no answer outside the classes: one whose label is none of them is
    given a class that is not the true one, so that it counts as wrong there as here.

    Args:
        entries: What the method told of each answer of one task.
    """
    there = {name for name, own in _DISTRIBUTIONS.items() if all(own in entry for entry in entries)}
    classed = "classification_scores" in there
    scored = all("token_scores" in entry for entry in entries)
    rows = []
    for entry in entries:
        names = entry["class_names"]
        spans = [{"start_token": start, "end_token": end} for start, end in entry["spans"]]
        rationale: dict[str, Any] = {"docid": entry["document"], "hard_rationale_predictions": spans}
        if scored:
            rationale["soft_rationale_predictions"] = entry["token_scores"]
        row: dict[str, Any] = {"annotation_id": entry["id"], "rationales": [rationale]}
        if classed:
            wrong = next(name for label, name in names.items() if label != entry["gold_label"])
            row["classification"] = names.get(entry["label"], wrong)
            for name, own in _DISTRIBUTIONS.items():
                if name in there:
                    row[name] = {names[label]: value for label, value in entry[own].items()}
        rows.append(row)
    return rows
