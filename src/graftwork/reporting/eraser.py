"""Export of answers with spans in the results format of ERASER, for its official scorer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftwork.core.files import read_lines
from graftwork.core.run_folder import DETAILS_SUFFIX, RunFolder
from graftwork.reporting.selection import stale_predictions
from graftwork.tasks.eraser import token_places
from graftwork.tasks.sources import write_json_lines
from graftwork.tasks.spans import token_spans

SUFFIX = ".eraser.jsonl"

_DISTRIBUTIONS = {
    "classification_scores": "probabilities",
    "comprehensiveness_classification_scores": "probabilities_without",
    "sufficiency_classification_scores": "probabilities_alone",
}
"""Source field of the details by field of the results format."""


def write_eraser_results(run: RunFolder, output: Path) -> list[Path]:
    """Write one results file per task and setting of a run on ERASER documents.

    Source: DeYoung et al. 2020; the results format of `jayded/eraserbenchmark`.

    Args:
        run: Run folder.
        output: Folder for the files.

    Returns:
        The files written; empty if the run has no answers with ERASER spans.
    """
    written: list[Path] = []
    stale = stale_predictions(run)
    for path in sorted(run.predictions.rglob(f"*{DETAILS_SUFFIX}")):
        if path.relative_to(run.predictions).as_posix().removesuffix(DETAILS_SUFFIX) in stale:
            continue
        entries = list(read_lines(path))
        if not entries or not all("document" in entry for entry in entries):
            continue
        target = output / str(path.relative_to(run.predictions)).replace(DETAILS_SUFFIX, SUFFIX)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json_lines(target, eraser_results(entries))
        written.append(target)
    return written


def eraser_results(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Convert annotated answers to the lines of a results file.

    The scorer requires that a field is present for all answers or for none, and that classes have probabilities; fields
    that do not fulfil this are omitted. It accepts only known classes: an answer with another label gets a class
    other than the true one, so that it still counts as wrong.

    Args:
        entries: Annotations of the method for each answer of one task.
    """
    complete = {name for name, own in _DISTRIBUTIONS.items() if all(own in entry for entry in entries)}
    classed = "classification_scores" in complete
    scored = all("token_scores" in entry for entry in entries)
    rows: list[dict[str, Any]] = []
    for entry in entries:
        names = entry["class_names"]
        spans = [{"start_token": start, "end_token": end} for start, end in _token_spans(entry)]
        rationale: dict[str, Any] = {"docid": entry["document"], "hard_rationale_predictions": spans}
        if scored:
            rationale["soft_rationale_predictions"] = entry["token_scores"]
        row: dict[str, Any] = {"annotation_id": entry["id"], "rationales": [rationale]}
        if classed:
            wrong = next(name for label, name in names.items() if label != entry["gold_label"])
            row["classification"] = names.get(entry["label"], wrong)
            for name, own in _DISTRIBUTIONS.items():
                if name in complete:
                    row[name] = {names[label]: value for label, value in entry[own].items()}
        rows.append(row)
    return rows


def _token_spans(entry: Mapping[str, Any]) -> Sequence[Sequence[int]]:
    """Spans of an answer over ERASER's tokens; answers of earlier versions have them as such."""
    if "characters" not in entry:
        return entry["spans"]
    return token_spans([(start, end) for start, end in entry["characters"]], token_places(entry["source"]))
