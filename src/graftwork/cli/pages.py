"""Verbs whose result is something to look at: attention graphs, comparisons, the demonstration, a diagnosis."""

from __future__ import annotations

from itertools import chain
from typing import Annotated

import typer

from graftwork.core.messages import say, show
from graftwork.grafting.commands import Assignments, Json


def compare(
    files: Annotated[
        list[str], typer.Argument(help="Files of predictions (.jsonl), or summaries (.json); the first is compared to.")
    ],
    questions: Annotated[
        list[str] | None, typer.Option(help="Augmented file with gold answers, for a summary without. Repeat.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Write all files, one for each set, as one summary instead.")
    ] = None,
    json: Json = False,
) -> None:
    """Score files of predictions again, and set them against the first by a paired bootstrap over questions."""
    from pathlib import Path

    from graftwork.reporting.comparison import compare as set_against
    from graftwork.reporting.comparison import read_predictions, write_summary

    systems = [read_predictions(Path(file), [Path(one) for one in questions or []]) for file in files]
    if output is not None:
        write_summary(Path(output), [one for system in systems for one in system], {"files": files})
        say(f"Wrote {output}")
        systems = [[one for system in systems for one in system]]
    rows = set_against(systems)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    show([{key: row.get(key, "–") for key in columns} for row in rows], as_json=json)


def demo(
    methods: Annotated[
        list[str] | None, typer.Argument(metavar="[METHOD]...", help="Whose demonstrations to run; all by default.")
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder for the world, the runs and the page.")
    ] = "demo",
    quick: Annotated[
        bool, typer.Option("--quick", help="Only show that everything runs: little training, few examples.")
    ] = False,
    json: Json = False,
) -> None:
    """Run every method on a small world that needs no network, and write a page about it."""
    from graftwork.cli.output import results_only
    from graftwork.demo.run import run_demo

    with results_only():
        summaries = run_demo(output, methods=methods or [], quick=quick)
    tables = [[{"method": name, **row} for row in summary.table] for name, summary in summaries.items()]
    for rows in [list(chain.from_iterable(tables))] if json else tables:
        show(rows, as_json=json)


def doctor(
    run: Annotated[str | None, typer.Argument(help="Run folder to check as well.")] = None,
    drift: Annotated[
        int | None,
        typer.Option(min=1, help="Ask the run's model this many questions, some failing, and compare its weights."),
    ] = None,
    assignments: Assignments = None,
    json: Json = False,
) -> None:
    """Say what is installed, and whether a run is whole, computes what it did and stays as it is while it answers."""
    from graftwork.cli.verbs import sections
    from graftwork.pipeline.diagnosis import diagnose

    method = sections(assignments or (), "method").get("method")
    findings, healthy = diagnose(run, drift=drift, method=method)
    show(findings, as_json=json)
    if not healthy:
        raise typer.Exit(1)
