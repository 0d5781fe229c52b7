"""Commands of Sparsefinder: comparison of attention graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graftwork.core.devices import CPU
from graftwork.core.messages import aligned, say, show
from graftwork.core.run_folder import RunFolder
from graftwork.errors import ConfigError
from graftwork.grafting.commands import Data, Device, DeviceMap, Dtype, Json, host_of, lengths_of, required_tasks


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
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Compare predictors of attention graphs: recall and perplexity at sparsity, curves, one head's graphs."""
    from graftwork.methods.sparsefinder.graph_report import compare_graphs
    from graftwork.settings.recipe import recorded_fields
    from graftwork.tasks.loading import check_tasks
    from graftwork.tasks.naming import applicable_fields

    tasks = required_tasks(task)
    check_tasks(tasks, data, applicable_fields(tasks, recorded_fields(RunFolder(run))), split=split)
    report = compare_graphs(
        host_of(context).load(run, device=device, device_map=device_map, dtype=dtype),
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


def import_files(
    context: typer.Context,
    run: Annotated[str, typer.Argument(help="Run converted with sparsefinder, with the settings of the files.")],
    projections: Annotated[
        str | None, typer.Option(help="Authors' projections, a list over layers; needed for predicted graphs.")
    ] = None,
    centroids: Annotated[
        str | None, typer.Option(help="Authors' centroids, a list over layers; needed for grouping kmeans.")
    ] = None,
    dump: Annotated[
        str | None, typer.Option(help="Authors' NAME_enc-attn.pt; replaces the run's extracted queries and keys.")
    ] = None,
    rescale_queries: Annotated[
        bool, typer.Option("--rescale-queries", help="The queries of the dump are divided by √width, as in fairseq.")
    ] = False,
    json: Json = False,
) -> None:
    """Import dumps, projections or centroids of the authors' code into a run, without executing code in them."""
    from graftwork.core.run_folder import RunFolder
    from graftwork.grafting.converted import write_model
    from graftwork.methods.sparsefinder.legacy import import_dump, load_into, read_centroids, read_projections
    from graftwork.methods.sparsefinder.modules import sparsefinder_modules
    from graftwork.methods.sparsefinder.phases import QUERIES_KEYS

    if projections is None and (dump is None or centroids is not None):
        raise ConfigError("Found nothing to import. Give --projections, with --centroids for k-means, or --dump.")
    if rescale_queries and dump is None:
        raise ConfigError("Found --rescale-queries without --dump, whose queries it rescales. Give --dump, or omit it.")
    converted = host_of(context).load(run, device=CPU)
    grafts = list(sparsefinder_modules(converted.model).values())
    if not grafts:
        raise ConfigError(f"Found no sparsefinder on the model in {run}. Convert it: graftwork convert sparsefinder.")
    folder, done = RunFolder(run), {"layers": len(grafts)}
    if projections is not None:
        read = read_projections(Path(projections), grafts[0].heads)
        load_into(grafts, read, None if centroids is None else read_centroids(Path(centroids)))
        write_model(converted, folder)
    if dump is not None:
        target = folder.artifacts / QUERIES_KEYS
        stored = import_dump(
            Path(dump),
            target,
            causal=any(graft.causal for graft in grafts),
            rescale_queries=rescale_queries,
            grafts=grafts,
        )
        done["sentences"] = len(stored)
    show(done, as_json=json)
    say(f"Imported into {run}")


COMMANDS = {"graphs": graphs}
"""Commands by word; the command line registers them."""
IMPORT = import_files
"""Command `graftwork import sparsefinder`."""
