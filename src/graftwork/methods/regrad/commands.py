"""Commands of ReGrad: the gradient bank, and import of the authors' checkpoints."""

from __future__ import annotations

from typing import Annotated

import typer

from graftwork.core.messages import show
from graftwork.grafting.commands import Device, DeviceMap, Dtype, Json, host_of

bank = typer.Typer(help="Manage gradient banks: build, inspect, verify, merge, export and import.")

Bank = Annotated[str, typer.Argument(help="The bank: a folder, or an address such as s3://bucket/bank.")]

Precision = Annotated[
    str | None,
    typer.Option(help="Format of a new bank: float32 (exact), bfloat16 (default) or int8 (smallest)."),
]

BatchSize = Annotated[int, typer.Option(help="Maximum passages per batch.", min=1)]

TokensPerBatch = Annotated[
    int | None,
    typer.Option(
        help="Maximum tokens per batch, including padding; by default 1024 on a CPU and 4096 elsewhere.", min=1
    ),
]


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
    tokens_per_batch: TokensPerBatch = None,
    limit: Annotated[int | None, typer.Option(help="Number of passages to encode, from the beginning.", min=1)] = None,
    workers: Annotated[
        int | None, typer.Option(help="Number of Ray Data actors; not available under torchrun.", min=1)
    ] = None,
    cpus_per_worker: Annotated[float, typer.Option(help="CPUs per actor.")] = 1.0,
    gpus_per_worker: Annotated[
        float,
        typer.Option(help="GPUs that each actor reserves and encodes on; 0 for the CPU, 0.5 for two actors per GPU."),
    ] = 0.0,
    compact: Annotated[
        bool,
        typer.Option(
            "--compact/--no-compact",
            help="Compact the bank at the end; speeds up look-ups.",
        ),
    ] = True,
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    train_adapters: Annotated[
        bool,
        typer.Option(
            "--train-adapters",
            help="Train an adapter per passage instead of computing its gradient (Parametric RAG).",
        ),
    ] = False,
    pairs: Annotated[
        str | None,
        typer.Option(help="Pairs file with a rewrite, questions and answers per passage."),
    ] = None,
    texts: Annotated[
        str | None,
        typer.Option(
            help="Training texts: joined (default; passage, question and answer in one text), apart (separate texts, "
            "questions without the passage), or passage (the passage only, without pairs)."
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over a passage's texts; 1 by default.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate of AdamW; 3e-4 by default.")] = None,
    texts_per_update: Annotated[
        int | None,
        typer.Option(help="Texts of a passage per update; 1 by default."),
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay of AdamW; 0.01 by default.")] = None,
    json: Json = False,
) -> None:
    """Compute and store the gradients of passages; repeat the command to resume an interrupted run."""
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
        placing={"device": device, "device_map": device_map, "dtype": dtype},
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
    run: Annotated[str, typer.Argument(help="Run folder of a model with regrad; the pretrained model generates.")],
    source: Annotated[
        str, typer.Argument(help="Corpus (.tsv, .jsonl, a folder, a pattern), or augmented questions (.json).")
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Pairs file; existing entries are kept.")],
    at_least: Annotated[int, typer.Option(help="Minimum pairs per passage; fewer count as failed.", min=1)] = 3,
    batch_size: Annotated[int, typer.Option(help="Maximum texts per batch.", min=1)] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum tokens of a rewrite, or of all pairs.", min=1)] = 512,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 decodes greedily.", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling: total probability of candidate tokens.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Random seed of sampling; change it to retry failed passages.")] = 0,
    rewrite_prompt: Annotated[str | None, typer.Option(help="YAML file with another prompt for rewrites.")] = None,
    pairs_prompt: Annotated[str | None, typer.Option(help="YAML file with another prompt for pairs.")] = None,
    limit: Annotated[int | None, typer.Option(help="Number of passages to process, from the beginning.", min=1)] = None,
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Generate rewrites, questions and answers with the pretrained model, for adapter training; resumable."""
    from graftwork.methods.regrad.encoding import building

    done = building.make(
        host_of(context).load,
        run,
        source,
        output,
        limit=limit,
        placing={"device": device, "device_map": device_map, "dtype": dtype},
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
    text: Annotated[str | None, typer.Option(help="Text of that passage.")] = None,
    title: Annotated[str, typer.Option(help="Title of that passage.")] = "",
    replace: Annotated[bool, typer.Option("--replace", help="Let existing ids refer to their new texts.")] = False,
    index: Annotated[str | None, typer.Option(help="Embedded index that receives the passages too.")] = None,
    batch_size: BatchSize = 16,
    tokens_per_batch: TokensPerBatch = None,
    device: Device = None,
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Add a single passage by id and text, or the passages of a file."""
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
            placing={"device": device, "device_map": device_map, "dtype": dtype},
        ),
        as_json=json,
    )


@bank.command("stats")
def bank_stats(folder: Bank, json: Json = False) -> None:
    """Show the size and fingerprint of a bank."""
    from graftwork.methods.regrad.bank import administration

    show(administration.stats(folder), as_json=json)


@bank.command("verify")
def bank_verify(folder: Bank, json: Json = False) -> None:
    """Verify all checksums and counts; exit code 1 if anything is damaged."""
    from graftwork.methods.regrad.bank import administration

    found, whole = administration.verify(folder)
    show(found, as_json=json)
    if not whole:
        raise typer.Exit(1)


@bank.command("delete")
def bank_delete(
    folder: Bank,
    ids: Annotated[list[str], typer.Argument(help="Ids of the passages.")],
    index: Annotated[str | None, typer.Option(help="Embedded index to delete them from too.")] = None,
    erase: Annotated[
        bool,
        typer.Option(
            "--erase",
            help="Also remove gradient, text and older states from the files, and search them for what was erased. "
            "Rewrites files; without it, the bytes stay until a compaction.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Delete passages immediately and permanently."""
    from graftwork.methods.regrad.bank import administration

    show(administration.delete(folder, ids, index, erase=erase), as_json=json)


@bank.command("compact")
def bank_compact(folder: Bank, json: Json = False) -> None:
    """Free the space of deleted gradients."""
    from graftwork.methods.regrad.bank import administration

    show(administration.compact(folder), as_json=json)


@bank.command("merge")
def bank_merge(
    folder: Bank, sources: Annotated[list[str], typer.Argument(help="Banks to copy from.")], json: Json = False
) -> None:
    """Copy the gradients of other banks into one bank."""
    from graftwork.methods.regrad.bank import administration

    show(administration.merge(folder, sources), as_json=json)


@bank.command("export")
def bank_export(
    folder: Bank,
    output: Annotated[str, typer.Option("--output", "-o", help="Empty folder for safetensors.")],
    id: Annotated[list[str] | None, typer.Option(help="Id of a passage to export; all by default. Repeatable.")] = None,
    json: Json = False,
) -> None:
    """Export gradients as safetensors."""
    from graftwork.methods.regrad.bank import administration

    show(administration.export(folder, output, id or []), as_json=json)


@bank.command("adapter")
def bank_adapter(
    context: typer.Context,
    run: Annotated[str, typer.Argument(help="Run folder of a model with regrad.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Empty folder for the adapter.")],
    question: Annotated[
        str | None, typer.Option(help="Question whose passages are retrieved as for an answer, unless --ids is given.")
    ] = None,
    ids: Annotated[str | None, typer.Option(help="Ids of passages, with commas between.")] = None,
    folder: Annotated[
        str | None,
        typer.Option(
            "--bank",
            help="The bank: a folder, or an address; that of the run's settings by default, or artifacts/bank.",
        ),
    ] = None,
    index: Annotated[
        str | None, typer.Option(help="Index to retrieve passages from; that of the run's settings by default.")
    ] = None,
    passages: Annotated[int | None, typer.Option(help="Number of passages to retrieve.", min=1)] = None,
    strength: Annotated[
        float | None, typer.Option(help="Factor of the gradient step; that of the run's settings by default.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the pretrained model; by default the one that the run started from."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter in the folder.")] = False,
    dtype: Dtype = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Write the update of a question or of passages as an adapter folder of PEFT; without both, the trained adapter."""
    from graftwork.methods.regrad.answering import adapter_export

    host = host_of(context)
    done = adapter_export.export(
        host.load,
        host.load_model,
        run,
        output,
        question=question,
        ids=[one.strip() for one in (ids or "").split(",") if one.strip()],
        bank=folder,
        index=index,
        passages=passages,
        strength=strength,
        base=base,
        overwrite=overwrite,
        dtype=dtype,
        device=device,
    )
    show(done, as_json=json)


@bank.command("import")
def bank_import(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Folder of an export, or the original's .pt file.")],
    output: Annotated[
        str, typer.Option("--output", "-o", help="The new bank: a folder, or an address such as s3://bucket/bank.")
    ],
    questions: Annotated[
        str | None, typer.Option(help="Augmented questions that the original's gradients were computed from.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="Format of the new bank: float32, bfloat16 or int8.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Run of the checkpoint that the original's gradients belong to.")
    ] = None,
    json: Json = False,
) -> None:
    """Create a bank from an export, or from gradients of the authors' code."""
    from graftwork.methods.regrad.bank import administration

    show(administration.import_bank(host_of(context).load, source, output, questions, precision, model), as_json=json)


def import_checkpoint(
    context: typer.Context,
    folder: Annotated[str, typer.Argument(help="Folder with the authors' checkpoint and JSON files.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Run folder to write.")],
    model: Annotated[
        str | None, typer.Option(help="Base model; by default the one in the checkpoint's configuration.")
    ] = None,
    dtype: Dtype = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Prompt family that the run records: a YAML file, one of open, yes_no, choice, simple, or graftwork "
            "for this library's words. By default the authors' words, if the folder is in their repository."
        ),
    ] = None,
    allow_unknown: Annotated[
        bool, typer.Option("--allow-unknown", help="Ignore unknown keys in the configuration.")
    ] = False,
    json: Json = False,
) -> None:
    """Import a checkpoint of the authors' code (regrad) without executing pickled code."""
    from graftwork.methods.regrad.importing import import_run

    load_model = host_of(context).load_model
    changes = import_run(load_model, folder, output, model, dtype, prompt=prompt, allow_unknown=allow_unknown)
    show(changes, as_json=json)


COMMANDS = {"bank": bank}
"""Commands by word; the command line registers them."""
IMPORT = import_checkpoint
"""Command `graftwork import regrad`."""
