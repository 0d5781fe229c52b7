"""Verbs whose result is a page to look at: attention graphs, and the demonstration."""

from __future__ import annotations

from itertools import chain
from typing import Annotated

import typer

from graftwork.cli.output import say, show
from graftwork.cli.parameters import Data, Json


def graphs(
    run: Annotated[str, typer.Argument(help="Run of sparsefinder whose projections are trained.")],
    task: Annotated[list[str] | None, typer.Option(help="Held-out text: a task or a file. Repeat for several.")] = None,
    data: Data = None,
    split: Annotated[str, typer.Option(help="Split to take held-out text from, such as test[80%:].")] = "dev",
    samples: Annotated[int, typer.Option(help="Held-out sentences or chunks.", min=2)] = 64,
    max_input_tokens: Annotated[int, typer.Option(help="Longer ones are cut.", min=2)] = 128,
    method: Annotated[
        list[str] | None, typer.Option(help="Predictor or baseline to compare; all by default. Repeat for several.")
    ] = None,
    cost_lengths: Annotated[
        str | None,
        typer.Option(help="Lengths, such as 512,1024, at which the executors are timed on one attention layer."),
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder; RUN/graphs by default.")] = None,
    json: Json = False,
) -> None:
    """Compare predictors of attention graphs: recall and perplexity at sparsity, curves, one head's graphs."""
    from graftwork.cli import verbs

    table, written = verbs.compare_run_graphs(
        run, task or [], data=data, split=split, samples=samples, max_input_tokens=max_input_tokens, methods=method,
        cost_lengths=cost_lengths, output=output,
    )  # fmt: skip
    show(table, as_json=json)
    say(f"Wrote {written}")


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
