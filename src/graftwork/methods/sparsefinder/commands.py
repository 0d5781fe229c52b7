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
    run: Annotated[
        str, typer.Argument(help="Run of sparsefinder whose projections are trained; with --oracle, any run or model.")
    ],
    task: Annotated[list[str] | None, typer.Option(help="Held-out text: a task or a file. Repeat for several.")] = None,
    data: Data = None,
    split: Annotated[str, typer.Option(help="Split to take held-out text from, such as test[80%:].")] = "dev",
    samples: Annotated[
        int | None, typer.Option(help="Held-out sentences or chunks; 64 by default, 4 with --oracle.", min=2)
    ] = None,
    max_input_tokens: Annotated[
        int | None, typer.Option(help="Longer ones are cut; 128 by default, 512 with --oracle.", min=2)
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Predictor or baseline to compare; all by default. Repeat for several.")
    ] = None,
    cost_lengths: Annotated[
        str | None,
        typer.Option(help="Lengths, such as 512,1024, at which the executors are timed on one attention layer."),
    ] = None,
    oracle: Annotated[
        bool,
        typer.Option(
            "--oracle",
            help="Measure in one forward pass how much attention any choice of key blocks can keep, and write a page. "
            "Run it first: it answers whether any predictor could help.",
        ),
    ] = False,
    budgets: Annotated[
        str | None, typer.Option(help="Shares of the key blocks for --oracle, such as 0.125,0.25, the default.")
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens per block for --oracle; 16 by default.", min=1)] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder; RUN/graphs by default.")] = None,
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Compare predictors of attention graphs: recall and perplexity at sparsity, curves, one head's graphs."""
    from graftwork.methods.sparsefinder.graph_report import compare_graphs, oracle_page, sorting_findings
    from graftwork.settings.recipe import recorded_fields
    from graftwork.tasks.loading import check_tasks
    from graftwork.tasks.naming import applicable_fields

    tasks = required_tasks(task)
    unused = [("--method", method), ("--cost-lengths", cost_lengths)]
    unused = unused if oracle else [("--budgets", budgets), ("--block-size", block_size)]
    for name, value in unused:
        if value is not None:
            state = "with" if oracle else "without"
            raise ConfigError(f"Found {name} {state} --oracle, where it has no effect. Leave one of them out.")
    check_tasks(tasks, data, applicable_fields(tasks, recorded_fields(RunFolder(run))), split=split)
    loaded = host_of(context).load(run, device=device, device_map=device_map, dtype=dtype)
    if oracle:
        found = oracle_page(
            loaded,
            tasks,
            data=data,
            split=split,
            samples=samples or 4,
            max_input_tokens=max_input_tokens or 512,
            budgets=_shares(budgets),
            block_size=block_size or 16,
            output=output,
        )
        show([{name: _rounded(value) for name, value in row.items()} for row in found.table], as_json=json)
        for text in found.findings:
            say(text)
        say(f"Wrote {found.page}")
        return
    report = compare_graphs(
        loaded,
        tasks,
        data=data,
        split=split,
        samples=samples or 64,
        max_input_tokens=max_input_tokens or 128,
        methods=method,
        cost_lengths=lengths_of(cost_lengths),
        output=output,
    )
    show(aligned(report.table), as_json=json)
    for text in sorting_findings(report.costs):
        say(text)
    say(f"Wrote {report.folder}")


def _shares(text: str | None) -> tuple[float, ...]:
    """Parse shares with commas between them."""
    try:
        return tuple(float(part) for part in (text or "0.125,0.25").split(","))
    except ValueError:
        raise ConfigError(f"budgets is {text!r}. Expected shares with commas between, as 0.125,0.25.") from None


def _rounded(value: object) -> object:
    return round(value, 4) if isinstance(value, float) else value


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
    from graftwork.methods.sparsefinder.extraction import module_scales
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
            scales=[scale for scale, _ in module_scales(converted.model)],
        )
        done["sentences"] = len(stored)
    show(done, as_json=json)
    say(f"Imported into {run}")


COMMANDS = {"graphs": graphs}
"""Commands by word; the command line registers them."""
IMPORT = import_files
"""Command `graftwork import sparsefinder`."""
