"""Commands of CALD: import of a student trained by the authors' code."""

from __future__ import annotations

from typing import Annotated

import typer

from graftwork.core.devices import CPU
from graftwork.core.messages import say, show
from graftwork.errors import ConfigError
from graftwork.grafting.commands import Json, host_of


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


IMPORT = import_student
"""Command `graftwork import cald`."""
