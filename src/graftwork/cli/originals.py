"""`graftwork import`: what the authors' code trained, as a run of ours."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from graftwork.cli.output import show
from graftwork.cli.parameters import Dtype, Json
from graftwork.core.messages import say


def import_checkpoint(
    folder: Annotated[str, typer.Argument(help="Folder that ReGrad's own code wrote: checkpoint and JSON files.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Run folder to write.")],
    model: Annotated[
        str | None, typer.Option(help="Model that it adapts; by default the one that its configuration names.")
    ] = None,
    dtype: Dtype = None,
    allow_unknown: Annotated[
        bool, typer.Option("--allow-unknown", help="Pass over unknown keys in its configuration.")
    ] = False,
    json: Json = False,
) -> None:
    """Take over a checkpoint of the authors' code (regrad), without running any code in it."""
    show(taken_over(folder, output, model, dtype, allow_unknown=allow_unknown), as_json=json)


def taken_over(
    folder: str, output: str, model: str | None, dtype: str | None, *, allow_unknown: bool
) -> list[dict[str, Any]]:
    """Convert, fill in what was trained, and save; returns the changed modules."""
    from graftwork.core.config import build, to_plain
    from graftwork.core.run_folder import RunFolder
    from graftwork.grafting.conversion import convert
    from graftwork.grafting.converted import save
    from graftwork.methods.regrad import ReGrad
    from graftwork.methods.regrad.importing import CHECKPOINT, load_original, read_original
    from graftwork.pipeline.loading import load_model
    from graftwork.settings.recipe import RunConfig, write_run
    from graftwork.settings.training import TrainingSettings

    found = read_original(Path(folder), allow_unknown=allow_unknown)
    name = model or found.model
    loaded, tokenizer = load_model(name, dtype=dtype or found.dtype)
    converted = convert(loaded, ReGrad(found.method), tokenizer=tokenizer)
    load_original(converted.model, Path(folder) / CHECKPOINT)
    save(replace(converted, model=converted.model.eval()), output)
    train = build(TrainingSettings, found.train, where=folder) if found.train else None
    method = {"name": "regrad", **to_plain(found.method)}
    write_run(RunFolder(output).run_file, RunConfig(model=name, method=method, train=train, dtype=dtype or found.dtype))
    say(f"Took over {len(converted.changes)} adapters; wrote {output}")
    return [to_plain(change) for change in converted.changes]
