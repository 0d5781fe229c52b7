"""Commands of ReGrad: the gradient bank, and import of the authors' checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from graftwork.core.messages import say, show
from graftwork.grafting.commands import Dtype, Json, ModelLoader, host_of

bank = typer.Typer(help="Keep the gradient bank: what is in it, whether it is whole, and what goes in and out.")

Bank = Annotated[str, typer.Argument(help="The bank: a folder, or an address such as s3://bucket/bank.")]

Precision = Annotated[
    str | None, typer.Option(help="How a new bank keeps numbers: float32, bfloat16 (by default) or int8.")
]

BatchSize = Annotated[int, typer.Option(help="Passages differentiated at once, at most.", min=1)]

TokensPerBatch = Annotated[int, typer.Option(help="Tokens of a batch at most, padding counted.", min=1)]


@bank.command("build")
def bank_build(
    context: typer.Context,
    run: Annotated[str, typer.Argument(help="Run folder of a model with regrad.")],
    source: Annotated[
        str, typer.Argument(help="Corpus (.tsv, .jsonl, a folder, a pattern), or augmented questions (.json).")
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="The bank: a folder, or an address such as s3://bucket/bank; artifacts/bank in the run by default.",
        ),
    ] = None,
    precision: Precision = None,
    batch_size: BatchSize = 16,
    tokens_per_batch: TokensPerBatch = 4096,
    limit: Annotated[int | None, typer.Option(help="Encode the first passages only.", min=1)] = None,
    workers: Annotated[
        int | None, typer.Option(help="Encode with this many actors of Ray Data. Under torchrun, leave it out.", min=1)
    ] = None,
    cpus_per_worker: Annotated[float, typer.Option(help="Processors of each actor.")] = 1.0,
    gpus_per_worker: Annotated[float, typer.Option(help="Accelerators of each actor.")] = 0.0,
    compact: Annotated[
        bool, typer.Option("--compact/--no-compact", help="Tidy up at the end: one more copy, and faster look-ups.")
    ] = True,
    dtype: Dtype = None,
    train_adapters: Annotated[
        bool,
        typer.Option(
            "--train-adapters",
            help="Train an adapter for each passage in place of taking its gradient, as Parametric RAG does.",
        ),
    ] = False,
    pairs: Annotated[
        str | None,
        typer.Option(help="Pairs file: each passage's rewrite, questions and answers."),
    ] = None,
    texts: Annotated[
        str | None,
        typer.Option(
            help="joined (by default) puts passage, question and answer into one text; apart makes a text of each and "
            "asks blindly; passage takes the passage alone, without pairs."
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over a passage's texts; 1 by default.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Rate of AdamW; 3e-4 by default.")] = None,
    texts_per_update: Annotated[
        int | None,
        typer.Option(help="Texts of a passage that make one update; 1 by default."),
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Decay of AdamW; 0.01 by default.")] = None,
    json: Json = False,
) -> None:
    """Compute and keep the gradients of passages; run again after a stop, it encodes what is missing."""
    from graftwork.methods.regrad.encoding import building

    done = building.build(
        host_of(context).load,
        run,
        source,
        output,
        precision=precision,
        batch_size=batch_size,
        tokens_per_batch=tokens_per_batch,
        limit=limit,
        workers=workers,
        cpus_per_worker=cpus_per_worker,
        gpus_per_worker=gpus_per_worker,
        compact=compact,
        dtype=dtype,
        train_adapters=train_adapters,
        pairs=pairs,
        training={
            "texts": texts,
            "epochs": epochs,
            "learning_rate": learning_rate,
            "texts_per_update": texts_per_update,
            "weight_decay": weight_decay,
        },
    )
    if done is not None:
        show(done, as_json=json)


@bank.command("pairs")
def bank_pairs(
    context: typer.Context,
    run: Annotated[str, typer.Argument(help="Run folder of a model with regrad; its adapter is off meanwhile.")],
    source: Annotated[
        str, typer.Argument(help="Corpus (.tsv, .jsonl, a folder, a pattern), or augmented questions (.json).")
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Pairs file; what it holds already is kept.")],
    at_least: Annotated[int, typer.Option(help="Pairs without which a passage counts as failed.", min=1)] = 3,
    batch_size: Annotated[int, typer.Option(help="Texts generated at once, at most.", min=1)] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of a rewrite, or of all pairs, at most.", min=1)] = 512,
    temperature: Annotated[
        float, typer.Option(help="Draw tokens at this temperature; 0 takes the likeliest one.", min=0)
    ] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens with this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws; another one tries again what failed.")] = 0,
    rewrite_prompt: Annotated[str | None, typer.Option(help="YAML file of another wording for rewrites.")] = None,
    pairs_prompt: Annotated[str | None, typer.Option(help="YAML file of another wording for pairs.")] = None,
    limit: Annotated[int | None, typer.Option(help="Take the first passages only.", min=1)] = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Have the pretrained model rewrite passages and ask about them, to train adapters on; goes on after a stop."""
    from graftwork.methods.regrad.encoding import building

    done = building.make(
        host_of(context).load,
        run,
        source,
        output,
        limit=limit,
        dtype=dtype,
        at_least=at_least,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        rewrite_prompt=rewrite_prompt,
        pairs_prompt=pairs_prompt,
    )
    show(done, as_json=json)


@bank.command("add")
def bank_add(
    context: typer.Context,
    folder: Bank,
    run: Annotated[str, typer.Argument(help="Run folder of the model that the bank belongs to.")],
    source: Annotated[str | None, typer.Argument(help="Corpus or augmented questions.")] = None,
    id: Annotated[str | None, typer.Option(help="Id of one passage to add.")] = None,
    text: Annotated[str | None, typer.Option(help="Its text.")] = None,
    title: Annotated[str, typer.Option(help="Its title.")] = "",
    replace: Annotated[
        bool, typer.Option("--replace", help="Let ids that are there stand for their new texts.")
    ] = False,
    index: Annotated[str | None, typer.Option(help="Embedded index that gets the passage as well.")] = None,
    batch_size: BatchSize = 16,
    tokens_per_batch: TokensPerBatch = 4096,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Add passages to a bank: one by its id and text, or those of a file."""
    from graftwork.methods.regrad.encoding import building

    show(
        building.add(
            host_of(context).load,
            folder,
            run,
            source,
            id=id,
            text=text,
            title=title,
            replace=replace,
            index=index,
            batch_size=batch_size,
            tokens_per_batch=tokens_per_batch,
            dtype=dtype,
        ),
        as_json=json,
    )


@bank.command("stats")
def bank_stats(folder: Bank, json: Json = False) -> None:
    """Say how much is in a bank, and what its gradients belong to."""
    from graftwork.methods.regrad.bank import administration

    show(administration.stats(folder), as_json=json)


@bank.command("verify")
def bank_verify(folder: Bank, json: Json = False) -> None:
    """Read everything again and name what is damaged; fails if anything is."""
    from graftwork.methods.regrad.bank import administration

    found, whole = administration.verify(folder)
    show(found, as_json=json)
    if not whole:
        raise typer.Exit(1)


@bank.command("delete")
def bank_delete(
    folder: Bank,
    ids: Annotated[list[str], typer.Argument(help="Passages to take out.")],
    index: Annotated[str | None, typer.Option(help="Embedded index to take them out of as well.")] = None,
    json: Json = False,
) -> None:
    """Take passages out, at once and for good."""
    from graftwork.methods.regrad.bank import administration

    show(administration.delete(folder, ids, index), as_json=json)


@bank.command("compact")
def bank_compact(folder: Bank, json: Json = False) -> None:
    """Give the space of deleted gradients back."""
    from graftwork.methods.regrad.bank import administration

    show(administration.compact(folder), as_json=json)


@bank.command("merge")
def bank_merge(
    folder: Bank, sources: Annotated[list[str], typer.Argument(help="Banks to copy from.")], json: Json = False
) -> None:
    """Copy what other banks hold, without computing anything again."""
    from graftwork.methods.regrad.bank import administration

    show(administration.merge(folder, sources), as_json=json)


@bank.command("export")
def bank_export(
    folder: Bank,
    output: Annotated[str, typer.Option("--output", "-o", help="Empty folder for safetensors.")],
    id: Annotated[list[str] | None, typer.Option(help="Passage to write; all by default. Repeat for several.")] = None,
    json: Json = False,
) -> None:
    """Write gradients as safetensors."""
    from graftwork.methods.regrad.bank import administration

    show(administration.export(folder, output, id or []), as_json=json)


@bank.command("import")
def bank_import(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Folder that export wrote, or the original's .pt file.")],
    output: Annotated[
        str, typer.Option("--output", "-o", help="The new bank: a folder, or an address such as s3://bucket/bank.")
    ],
    questions: Annotated[
        str | None, typer.Option(help="Augmented questions that the original's gradients were computed from.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="float32, bfloat16 or int8.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Run of the checkpoint that the original's gradients were computed with.")
    ] = None,
    json: Json = False,
) -> None:
    """Make a bank of exported gradients, or of those of the authors' code."""
    from graftwork.methods.regrad.bank import administration

    show(administration.bring(host_of(context).load, source, output, questions, precision, model), as_json=json)


def import_checkpoint(
    context: typer.Context,
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
    changes = import_run(host_of(context).load_model, folder, output, model, dtype, allow_unknown=allow_unknown)
    show(changes, as_json=json)


def import_run(
    load_model: ModelLoader, folder: str, output: str, model: str | None, dtype: str | None, *, allow_unknown: bool
) -> list[dict[str, Any]]:
    """Convert the base model, load the authors' trained adapter into it, and save it as a run.

    Args:
        load_model: Loads the base model.
        folder: Folder that the authors' code wrote.
        output: Run folder to write.
        model: Base model; by default the one that the checkpoint's configuration names.
        dtype: Data type of the weights; by default as recorded.
        allow_unknown: Ignore unknown keys of the authors' configuration.

    Returns:
        The changed modules.
    """
    from graftwork.core.config import build, to_plain
    from graftwork.core.run_folder import RunFolder
    from graftwork.grafting.conversion import convert
    from graftwork.grafting.converted import Origin, save
    from graftwork.methods.regrad import ReGrad
    from graftwork.methods.regrad.importing import CHECKPOINT, load_original, read_original
    from graftwork.settings.recipe import read_run, write_run
    from graftwork.settings.training import TrainingSettings

    found = read_original(Path(folder), allow_unknown=allow_unknown)
    name = model or found.model
    loaded, tokenizer = load_model(name, dtype=dtype or found.dtype)
    converted = convert(loaded, ReGrad(found.method), tokenizer=tokenizer)
    load_original(converted.model, Path(folder) / CHECKPOINT)
    origin = Origin(name, dtype or found.dtype)
    run = RunFolder(save(replace(converted, model=converted.model.eval(), origin=origin), output))
    train = build(TrainingSettings, found.train, where=folder) if found.train else None
    write_run(run.run_file, replace(read_run(run), train=train))
    say(f"Imported {len(converted.changes)} adapters; wrote {output}")
    return [to_plain(change) for change in converted.changes]


COMMANDS = {"bank": bank, "import": import_checkpoint}
"""Commands by word; the command line registers them."""
