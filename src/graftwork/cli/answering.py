"""`graftwork evaluate` and `graftwork predict`: scores and answers of a model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from graftwork.cli import completion
from graftwork.core.messages import show
from graftwork.grafting.commands import Assignments, Data, Device, DeviceMap, Dtype, Json, Over, RandomWeights, Strict


def evaluate(
    model: Annotated[str, typer.Argument(help="Run folder, model folder or hub id.")],
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Task to evaluate, a data file, or hub:ID. Repeat for several.", autocompletion=completion.tasks
        ),
    ] = None,
    data: Data = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Run folder for results; a run's own by default.")
    ] = None,
    over: Over = None,
    checkpoints: Annotated[
        str | None,
        typer.Option(
            help="Evaluate checkpoints of the training: all, last, best (by the first score), or steps (12000,14000)."
        ),
    ] = None,
    assignments: Assignments = None,
    strict: Strict = False,
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    random_weights: RandomWeights = False,
    report: Annotated[
        bool, typer.Option("--report", help="Write the report of the run too, as `graftwork report` does.")
    ] = False,
    json: Json = False,
    settings: Any = None,
) -> None:
    """Score a model on tasks, also of lm-eval; --baseline adds the dense model, --over a sweep of settings."""
    from graftwork.cli import verbs

    rows = verbs.evaluate_model(
        model,
        task or [],
        data=data,
        output=output,
        over=over or [],
        checkpoints=checkpoints,
        assignments=assignments or [],
        flags=settings,
        strict=strict,
        device=device,
        device_map=device_map,
        dtype=dtype,
        random_weights=random_weights,
        report_too=report,
    )
    show(rows, as_json=json)


def predict(
    model: Annotated[str, typer.Argument(help="Run folder, model folder or hub id.")],
    text: Annotated[
        list[str] | None, typer.Argument(help="Texts to answer; - reads one text per line from stdin.")
    ] = None,
    input: Annotated[
        str | None,
        typer.Option("--input", "-i", help="Text file with one input a line, or a data file in any format."),
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="JSON-lines file; stdout by default.")] = None,
    assignments: Assignments = None,
    strict: Strict = False,
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    random_weights: RandomWeights = False,
    json: Json = False,
    settings: Any = None,
) -> None:
    """Answer texts, the lines of stdin, or the inputs in a file."""
    from graftwork.cli import verbs

    verbs.predict_inputs(
        model,
        text or [],
        input=input,
        output=output,
        assignments=assignments or [],
        flags=settings,
        strict=strict,
        device=device,
        device_map=device_map,
        dtype=dtype,
        random_weights=random_weights,
        as_json=json,
    )
