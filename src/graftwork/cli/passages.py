"""The verbs that care for passages: their index and the bank of their gradients."""

from __future__ import annotations

from typing import Annotated

import typer

from graftwork.cli.output import show
from graftwork.cli.parameters import Dtype, Json


def index(
    corpus: Annotated[
        str | None, typer.Argument(help="A .tsv or .jsonl file, a folder of them, or a pattern in quotes.")
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder, or the name of an index in Elasticsearch.")
    ] = "",
    backend: Annotated[str, typer.Option(help="embedded or elasticsearch.")] = "embedded",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a finished index once the new one is.")
    ] = False,
    add: Annotated[bool, typer.Option("--add", help="Add the corpus to a finished embedded index.")] = False,
    delete: Annotated[list[str] | None, typer.Option(help="Id of a passage to take out. Repeat for several.")] = None,
    query: Annotated[list[str] | None, typer.Option(help="Search the index for this. Repeat for several.")] = None,
    top_k: Annotated[int, typer.Option(help="Passages found for each query.", min=1)] = 3,
    allow_incomplete: Annotated[
        bool, typer.Option("--allow-incomplete", help="Search an index that was not finished.")
    ] = False,
    json: Json = False,
) -> None:
    """Index passages for retrieval; run again after a stop, it goes on where it was."""
    from graftwork.cli import retrieval

    show(
        retrieval.index_passages(
            corpus,
            output,
            backend,
            overwrite=overwrite,
            add=add,
            delete=delete or [],
            queries=query or [],
            k=top_k,
            allow_incomplete=allow_incomplete,
        ),
        as_json=json,
    )


bank = typer.Typer(help="Keep the gradient bank: what is in it, whether it is whole, and what goes in and out.")
Bank = Annotated[str, typer.Argument(help="The bank: a folder, or an address such as s3://bucket/bank.")]


Precision = Annotated[
    str | None, typer.Option(help="How a new bank keeps numbers: float32, bfloat16 (by default) or int8.")
]
BatchSize = Annotated[int, typer.Option(help="Passages differentiated at once, at most.", min=1)]
TokensPerBatch = Annotated[int, typer.Option(help="Tokens of a batch at most, padding counted.", min=1)]


@bank.command("build")
def bank_build(
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
    from graftwork.cli import encoding

    done = encoding.build(
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
    from graftwork.cli import encoding

    done = encoding.make(
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
    from graftwork.cli import encoding

    show(
        encoding.add(
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
    from graftwork.cli import bank as verbs

    show(verbs.stats(folder), as_json=json)


@bank.command("verify")
def bank_verify(folder: Bank, json: Json = False) -> None:
    """Read everything again and name what is damaged; fails if anything is."""
    from graftwork.cli import bank as verbs

    found, whole = verbs.verify(folder)
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
    from graftwork.cli import bank as verbs

    show(verbs.delete(folder, ids, index), as_json=json)


@bank.command("compact")
def bank_compact(folder: Bank, json: Json = False) -> None:
    """Give the space of deleted gradients back."""
    from graftwork.cli import bank as verbs

    show(verbs.compact(folder), as_json=json)


@bank.command("merge")
def bank_merge(
    folder: Bank, sources: Annotated[list[str], typer.Argument(help="Banks to copy from.")], json: Json = False
) -> None:
    """Copy what other banks hold, without computing anything again."""
    from graftwork.cli import bank as verbs

    show(verbs.merge(folder, sources), as_json=json)


@bank.command("export")
def bank_export(
    folder: Bank,
    output: Annotated[str, typer.Option("--output", "-o", help="Empty folder for safetensors.")],
    id: Annotated[list[str] | None, typer.Option(help="Passage to write; all by default. Repeat for several.")] = None,
    json: Json = False,
) -> None:
    """Write gradients as safetensors."""
    from graftwork.cli import bank as verbs

    show(verbs.export(folder, output, id or []), as_json=json)


@bank.command("import")
def bank_import(
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
    from graftwork.cli import bank as verbs

    show(verbs.bring(source, output, questions, precision, model), as_json=json)
