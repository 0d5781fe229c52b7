"""Commands of CALD: comparison of mixers before training, and import of a student trained by the authors' code."""

from __future__ import annotations

from typing import Annotated

import typer

from graftwork.core.devices import CPU
from graftwork.core.messages import say, show
from graftwork.errors import ConfigError
from graftwork.grafting.commands import Data, Device, DeviceMap, Dtype, Json, host_of, required_tasks


def calibrate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Dense model: a folder, a hub id, or the run of a fine-tuned teacher.")],
    task: Annotated[list[str] | None, typer.Option(help="Examples: a task or a file. Repeat for several.")] = None,
    data: Data = None,
    split: Annotated[str, typer.Option(help="Split to take examples from.")] = "train",
    samples: Annotated[
        int, typer.Option(help="Examples or chunks of text: half for the guided updates, half to measure.", min=2)
    ] = 64,
    max_input_tokens: Annotated[int, typer.Option(help="Longer examples are cut.", min=2)] = 512,
    rank: Annotated[
        str | None,
        typer.Option(
            help="Ranks of an encoder, such as 16,32; an eighth, a quarter and half of the longest example by default."
        ),
    ] = None,
    window: Annotated[str | None, typer.Option(help="Windows of a decoder, such as 16,64, the default.")] = None,
    layers: Annotated[str | None, typer.Option(help='Layers to convert, such as "0-3"; all by default.')] = None,
    guided_updates: Annotated[
        int, typer.Option(help="Updates of the mixers alone on dense attention outputs; 0 skips them.", min=0)
    ] = 20,
    output: Annotated[str, typer.Option("--output", "-o", help="Folder of the page.")] = "calibration",
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Compare mixers, ranks, initialisations and guides of cald on a dense model before any training."""
    from graftwork.methods.cald.calibration_page import calibrate as compare
    from graftwork.tasks.loading import check_tasks

    tasks = required_tasks(task)
    numbers = {"rank": _numbers(rank, "rank"), "window": _numbers(window, "window")}
    check_tasks(tasks, data, split=split)
    loaded = host_of(context).load(model, device=device, device_map=device_map, dtype=dtype)
    report = compare(
        loaded,
        tasks,
        data=data,
        split=split,
        samples=samples,
        max_input_tokens=max_input_tokens,
        ranks=numbers["rank"],
        windows=numbers["window"],
        layers=layers,
        guided_updates=guided_updates,
        output=output,
    )
    show(report.table, as_json=json)
    for text in report.findings:
        say(text)
    say(f"Wrote {report.page}")


def _numbers(text: str | None, name: str) -> list[int] | None:
    """Parse whole numbers from 1 with commas between them."""
    parts = [part.strip() for part in text.split(",")] if text is not None else []
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"{name} is {text!r}. Expected whole numbers from 1 with commas between, as 16,64.")
    return sorted({int(part) for part in parts}) or None


def import_student(
    context: typer.Context,
    student: Annotated[str, typer.Argument(help="File of the student, or folder with its pytorch_model.bin.")],
    run: Annotated[str, typer.Argument(help="Run converted with cald and the rank, positions and share of the file.")],
    json: Json = False,
) -> None:
    """Load a student trained by the authors' code into a run, without executing code in the file."""
    from graftwork.core.run_folder import RunFolder
    from graftwork.grafting.converted import write_model
    from graftwork.methods.cald.config import CaldConfig
    from graftwork.methods.cald.weights import load_reference

    converted = host_of(context).load(run, device=CPU)
    if not any(isinstance(method.config, CaldConfig) for method in converted.methods):
        raise ConfigError(f"Found no cald on the model in {run}. Convert it: graftwork convert cald MODEL -o RUN.")
    load_reference(converted.model, student)
    write_model(converted, RunFolder(run))
    show({"changes": len(converted.changes)}, as_json=json)
    say(f"Imported {student} into {run}")


COMMANDS = {"calibrate": calibrate}
"""Commands by word; the command line registers them."""
IMPORT = import_student
"""Command `graftwork import cald`."""
