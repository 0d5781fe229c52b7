"""Options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Data = Annotated[str | None, typer.Option("--data", help="Folder that holds the tasks' files.")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", help="Any setting, as section.key=value; beats the file, yields to flags.")
]
Over = Annotated[
    list[str] | None,
    typer.Option("--over", help="Try several values: section.key=v1,v2 (null is off). Repeat to cross two settings."),
]
Strict = Annotated[bool, typer.Option("--strict", help="Fail if settings differ from the recorded ones.")]
Dtype = Annotated[str | None, typer.Option(help="Data type of the weights, such as bfloat16.")]
DeviceMap = Annotated[str | None, typer.Option(help="Spread the model over devices: auto, balanced, …")]
