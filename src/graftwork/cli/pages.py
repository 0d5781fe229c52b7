"""Verbs that compare predictions, run the demonstration, or diagnose a run."""

from __future__ import annotations

from itertools import chain
from typing import Annotated

import typer

from graftwork.core.devices import Placing
from graftwork.core.messages import say, show
from graftwork.errors import ConfigError
from graftwork.grafting.commands import Assignments, Device, DeviceMap, Dtype, Json


def report(
    runs: Annotated[
        list[str], typer.Argument(help="Run folders, evaluated or only trained; several share one report.")
    ],
    format: Annotated[
        list[str] | None, typer.Option(help="md or html, both by default; eraser exports spans for the ERASER scorer.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder; the first run's by default.")] = None,
    json: Json = False,
) -> None:
    """Write a report of one or several runs as Markdown and HTML."""
    from pathlib import Path

    from graftwork.reporting.render import report as write

    paths = write(runs, formats=format or ("md", "html"), output=None if output is None else Path(output))
    show([str(path) for path in paths], as_json=json)


def compare(
    files: Annotated[
        list[str],
        typer.Argument(help="Files of predictions (.jsonl) or summaries (.json); the first is the reference."),
    ],
    questions: Annotated[
        list[str] | None, typer.Option(help="Augmented file with gold answers, for summaries that lack them. Repeat.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="Merge all files, one for each data set, into one summary instead."),
    ] = None,
    json: Json = False,
) -> None:
    """Rescore files of predictions and compare them with the first by a paired bootstrap over questions."""
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
        list[str] | None, typer.Argument(metavar="[METHOD]...", help="Methods to demonstrate; all by default.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="world: write the data and models of the documentation, and nothing else; or a method."),
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder for the offline world, the runs and the report.")
    ] = "demo",
    quick: Annotated[
        bool, typer.Option("--quick", help="Smoke test: little training, few examples; scores mean nothing.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Full trainings with all settings; about 8 minutes on two cores.")
    ] = False,
    device: Device = None,
    json: Json = False,
) -> None:
    """Run every method on a small offline world and write a report; --only world writes only data and models."""
    chosen = [*(methods or []), *(only or [])]
    if chosen and set(chosen) == {"world"}:
        _write_world(output, json)
        return
    from graftwork.cli.output import results_only
    from graftwork.core.devices import default_device
    from graftwork.demo.run import run_demo

    with results_only(), default_device(device):
        summaries = run_demo(output, methods=[name for name in chosen if name != "world"], quick=quick, full=full)
    tables = [[{"method": name, **row} for row in summary.table] for name, summary in summaries.items()]
    for rows in [list(chain.from_iterable(tables))] if json else tables:
        show(rows, as_json=json)


def _write_world(output: str, as_json: bool) -> None:
    from pathlib import Path

    from graftwork.demo import offline_world

    world = offline_world(Path(output) / "world")
    paths = {"world": world, "data": world / "unifiedqa"}
    paths |= {path.name: path for path in sorted((world / "models").iterdir())}
    show({name: path.as_posix() for name, path in paths.items()}, as_json=as_json)


def doctor(
    run: Annotated[str | None, typer.Argument(help="Run folder to check as well.")] = None,
    drift: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Drift check: answer this many questions, some failing, and compare the weights before and after.",
        ),
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every byte of the weights, also of models above 8 GiB.")
    ] = False,
    assignments: Assignments = None,
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Check the environment and, optionally, a run."""
    if run is None:
        # no torch is imported for the environment alone
        from graftwork.pipeline.environment import environment

        given = {
            "--drift": drift,
            "--deep": deep or None,
            "--set": assignments or None,
            "--device": device,
            "--device-map": device_map,
            "--dtype": dtype,
        }
        if unused := [flag for flag, value in given.items() if value is not None]:
            raise ConfigError(f"Found {', '.join(unused)} without a run to check. Give the folder of a run.")
        findings = environment()
        healthy = all(entry["state"] != "wrong" for entry in findings)
    else:
        from graftwork.cli.verbs import sections
        from graftwork.pipeline.diagnosis import diagnose

        method = sections(assignments or (), "method").get("method")
        placing: Placing = {"device": device, "device_map": device_map, "dtype": dtype}
        findings, healthy = diagnose(run, drift=drift, method=method, deep=deep, **placing)
    show(findings, as_json=json)
    if not healthy:
        raise typer.Exit(1)


def cache(
    clear: Annotated[
        bool, typer.Option("--clear", help="Remove all cached files; they are made again as needed.")
    ] = False,
    json: Json = False,
) -> None:
    """Show the cached files: rows of large data files, token lengths, the offline world."""
    from graftwork.core.cache import cache_folder, cache_limit, cache_sizes, clear_cache

    folder, limit = cache_folder(), cache_limit()
    if clear:
        freed = clear_cache()
        say(f"Removed {freed / 1e6:.1f} MB from {folder}")
        return
    say(f"{folder}, at most {limit / 1e9:g} GB of rows and as much of lengths")
    show(
        [{"part": part, "files": files, "MB": round(size / 1e6, 1)} for part, (files, size) in cache_sizes().items()],
        as_json=json,
    )
