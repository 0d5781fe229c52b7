"""Selection of the results that a report shows: those of the run's current weights."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

from graftwork.core.digests import verify_files
from graftwork.core.files import read_json
from graftwork.core.run_folder import MANIFEST_FILE, RunFolder
from graftwork.errors import IncompleteRunError
from graftwork.metrics.results import ResultRow, Results
from graftwork.reporting.curves import read_closing, read_curves

logger = logging.getLogger(__name__)


def current_results(run: RunFolder, *, verify: bool = True) -> Results:
    """Read the results of a run, without those that were measured on earlier weights of its own model.

    Results of other models, such as checkpoints, stay and get a note.

    Args:
        run: Run folder.
        verify: Compare the files of the model with their digests.

    Raises:
        IncompleteRunError: If the run has no results, or none of its current weights.
        CheckpointMismatchError: If a file of the run's model or the results have changed since they were written.
    """
    results = Results.read(run.require(run.results_file, "evaluate"))
    file = run.model / MANIFEST_FILE
    if not file.exists():
        return results
    manifest = read_json(file)
    if verify:
        verify_files(run.model, manifest.get("files", {}))
    stale = _of_earlier_weights(results.rows, manifest.get("digest"))
    if stale:
        logger.warning(
            "%s: left out, because the weights in model/ have changed since: %s. `graftwork evaluate` measures the "
            "current ones.",
            run.path,
            _labels(stale),
        )
        if len(stale) == len(results.rows):
            raise IncompleteRunError(
                f"Found no result of the weights in {run.model}; all rows of {run.results_file.name} were measured on "
                "earlier ones. Run `graftwork evaluate` again."
            )
        results = _without(results, stale)
    return _annotated(results, manifest.get("digest"))


def unevaluated_results(run: RunFolder, model: str, method: str | None) -> Results:
    """Return the training numbers and curves of a run that was trained but not evaluated.

    Args:
        run: Run folder.
        model: Checkpoint that the run started from.
        method: Name of its method.

    Raises:
        IncompleteRunError: If the run has no training log either.
    """
    curves, closing = read_curves(run), read_closing(run)
    if not curves and not closing:
        run.require(run.results_file, "evaluate")
    return Results(model, method, training=closing, curves={"training": curves} if curves else {})


def stale_predictions(run: RunFolder) -> set[str]:
    """Names of prediction files, without suffix, that belong to earlier weights of a run's own model."""
    file = run.model / MANIFEST_FILE
    if not (file.exists() and run.results_file.exists()):
        return set()
    stale = _of_earlier_weights(Results.read(run.results_file).rows, read_json(file).get("digest"))
    return {f"{row.task}.{row.label.replace('/', '_')}" for row in stale}


def _of_earlier_weights(rows: Sequence[ResultRow], current: str | None) -> list[ResultRow]:
    return [row for row in rows if row.own and row.digest and current and row.digest != current]


def _without(results: Results, stale: Sequence[ResultRow]) -> Results:
    rows = tuple(row for row in results.rows if row not in stale)
    gone = {row.label for row in stale} - {row.label for row in rows}
    return replace(
        results,
        rows=rows,
        measures={label: found for label, found in results.measures.items() if label not in gone},
        cost=tuple(row for row in results.cost if row.label not in gone),
        changes={label: count for label, count in results.changes.items() if label not in gone},
        comparisons=tuple(
            row
            for row in results.comparisons
            if not {(row.task, row.label), (row.task, row.baseline)} & {(row.task, row.label) for row in stale}
        ),
        samples=tuple(
            replace(sample, predictions=kept)
            for sample in results.samples
            if (kept := {label: text for label, text in sample.predictions.items() if label not in gone})
        ),
    )


def _annotated(results: Results, current: str | None) -> Results:
    """Add a note to results of other models."""
    others = [row for row in results.rows if row.digest and current and row.digest != current]
    if not others:
        return results
    note = f"Measured on other weights than those in model/: {_labels(others)}."
    labels = {row.label for row in others}
    rows = [replace(row, notes=(*row.notes, note)) if row.label in labels else row for row in results.rows]
    return replace(results, rows=tuple(rows))


def _labels(rows: Iterable[ResultRow]) -> str:
    return ", ".join(dict.fromkeys(row.label for row in rows))
