"""Commands of Sparsefinder: comparison of attention graphs."""

from __future__ import annotations

from typing import Annotated

import typer

from graftwork.core.messages import aligned, say, show
from graftwork.grafting.commands import Data, Json, host_of, lengths_of, required_tasks


def graphs(
    context: typer.Context,
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
    from graftwork.methods.sparsefinder.graph_report import compare_graphs
    from graftwork.tasks.loading import check_tasks

    tasks = required_tasks(task)
    check_tasks(tasks, data)
    report = compare_graphs(
        host_of(context).load(run),
        tasks,
        data=data,
        split=split,
        samples=samples,
        max_input_tokens=max_input_tokens,
        methods=method,
        cost_lengths=lengths_of(cost_lengths),
        output=output,
    )
    show(aligned(report.table), as_json=json)
    say(f"Wrote {report.folder}")


COMMANDS = {"graphs": graphs}
"""Commands by word; the command line registers them."""
