"""Encoding with several processes: one shard per process of `torchrun`, or an actor pool of Ray Data."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np

from graftwork.core.progress import Progress
from graftwork.core.ray_cluster import check_cpus, check_gpus, open_ray
from graftwork.methods.regrad.bank.backends import Backend
from graftwork.methods.regrad.bank.files import holds_bank
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.bank.opening import backend_for
from graftwork.methods.regrad.bank.records import Gradient
from graftwork.methods.regrad.bank.transfer import merge
from graftwork.methods.regrad.bank.writing import BankWriter, Encoded
from graftwork.methods.regrad.encoding.encoder import (
    Document,
    PassageEncoder,
    belongs_to,
    encode_passages,
    group_by_text,
    missing_documents,
    with_id,
)
from graftwork.retrieval.retriever import Passage

LONGEST_WAIT = timedelta(days=7)
"""Timeout of barriers between the processes."""
CHUNK = 200_000
"""Number of passages per Ray data set; actors are restarted for each."""
ROWS_PER_CALL = 256
"""Number of passages per actor call, sorted by length within the call."""


def workers_of_torchrun() -> int:
    """Return the number of processes that `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def encode_share(
    encoder: PassageEncoder, location: str | Path, passages: Iterable[Passage], *, precision: str | None = None
) -> Encoded:
    """Encode this process's share of the passages and merge all shares; every process must call this.

    Each process fills a separate bank, so that no process waits for the commits of others. Partial banks of an
    interrupted call are merged first, also if the number of processes has changed.

    Args:
        encoder: The encoder, equal in every process.
        location: The bank: a folder shared by all processes, or an address in an object store.
        passages: All passages, equal in every process.
        precision: Storage format of a new bank.

    Returns:
        Counts of this process.
    """
    backend = backend_for(location)
    parts = backend.sibling(".parts")
    with _process_group() as (rank, processes, wait):
        if rank == 0:
            _merge_parts(encoder.open_bank(backend, precision=precision), parts)
        wait()
        whole = encoder.open_bank(backend)
        own = encoder.open_bank(parts.child(f"{rank}-of-{processes}"), precision=whole.precision)
        mine = (one for one in passages if belongs_to(one.id, rank, processes))
        done = encode_passages(encoder, own, mine, known=whole)
        wait()
        if rank == 0:
            _merge_parts(whole, parts)
        wait()
    return done


@contextmanager
def _process_group() -> Generator[tuple[int, int, Callable[[], Any]]]:
    """Rank of this process, number of processes, and a barrier."""
    from torch import distributed

    made = not distributed.is_initialized()
    if made:
        # only barriers are used, so no accelerator is needed
        distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
    try:
        yield distributed.get_rank(), distributed.get_world_size(), cast("Any", distributed).barrier
    finally:
        if made:
            distributed.destroy_process_group()


def _merge_parts(bank: GradientBank, parts: Backend) -> None:
    """Merge the partial banks of all processes, then remove them."""
    sources = [GradientBank(part) for part in parts.children() if holds_bank(part)]
    try:
        merge(bank, sources)
    finally:
        for source in sources:
            source.close()
    parts.remove()


def encode_with_ray(
    load: Callable[[], PassageEncoder],
    encoder: PassageEncoder,
    bank: GradientBank,
    passages: Iterable[Passage],
    *,
    workers: int,
    cpus_per_worker: float = 1.0,
    gpus_per_worker: float = 0.0,
    replace: bool = False,
    total: int = 0,
) -> Encoded:
    """Encode with an actor pool of Ray Data, one model per actor; only this process writes to the bank.

    Args:
        load: Factory of an actor's encoder; called once in each actor.
        encoder: Encoder of this process, which formats and counts passages.
        bank: Bank that receives the gradients; open for writing.
        passages: All passages; streamed.
        workers: Number of actors.
        cpus_per_worker: Number of CPUs per actor.
        gpus_per_worker: Number of GPUs per actor.
        replace: Let existing ids refer to their new texts.
        total: Number of missing passages for the progress bar; 0 if unknown.

    Raises:
        MissingExtraError: If Ray is not installed.
        ConfigError: If the actors would occupy every CPU, which deadlocks Ray's readers.
    """
    ray = open_ray()
    check_cpus(ray, workers, cpus_per_worker)
    check_gpus(ray, workers, gpus_per_worker)
    with Progress("encode", total) as progress:
        writer = BankWriter(bank, replace=replace, progress=progress)
        rest = iter(passages)
        while chunk := list(islice(rest, CHUNK)):
            documents = group_by_text(encoder, chunk, writer)
            missing = missing_documents([one for same in documents.values() for one in same], writer)
            wanted: dict[str, list[Document]] = {}
            for document in missing:
                wanted.setdefault(document.key, []).append(document)
            held = bank.holds(wanted)
            writer.add([with_id(document, None) for key in sorted(held) for document in wanted.pop(key)])
            firsts = [same[0] for same in wanted.values()]
            for rows in _mapped(ray, load, firsts, workers, num_cpus=cpus_per_worker, num_gpus=gpus_per_worker):
                writer.add([with_id(document, row) for row in rows for document in wanted[row.id]])
            writer.commit()
        return writer.result()


class EncodingActor:
    """Actor of the pool: computes gradients of tokenized documents.

    Args:
        load: Factory of the encoder.
    """

    def __init__(self, load: Callable[[], PassageEncoder]) -> None:
        self.encoder = load()

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        """Encode a batch of columns `key`, `ids`, `truncated` and `lengths`."""
        documents = [
            Document(key, key, key, _numbers(ids), bool(cut), _numbers(lengths))
            for key, ids, cut, lengths in zip(rows["key"], rows["ids"], rows["truncated"], rows["lengths"], strict=True)
        ]
        found = [one for batch in self.encoder.batches(documents) for one in self.encoder.gradients(batch)]
        return {
            "key": np.array([one.id for one in found]),
            "values": np.stack([one.values for one in found]),
            "tokens": np.array([one.tokens for one in found]),
            "loss": np.array([one.loss for one in found]),
            "truncated": np.array([one.truncated for one in found]),
        }


def _numbers(data: bytes) -> tuple[int, ...]:
    return tuple(np.frombuffer(data, "<i4").tolist())


def _mapped(
    ray: Any, load: Callable[[], PassageEncoder], documents: Sequence[Document], workers: int, **resources: float
) -> Iterator[list[Gradient]]:
    """Yield gradients with record keys as ids, in arbitrary order."""
    if not documents:
        return
    items = [
        {
            "key": one.key,
            "ids": np.array(one.ids, "<i4").tobytes(),
            "truncated": one.truncated,
            "lengths": np.array(one.lengths, "<i4").tobytes(),
        }
        for one in documents
    ]
    blocks = max(workers, -(-len(items) // ROWS_PER_CALL))
    mapped = ray.data.from_items(items, override_num_blocks=min(blocks, len(items))).map_batches(
        EncodingActor,
        fn_constructor_args=(load,),
        batch_size=ROWS_PER_CALL,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=workers),
        **resources,
    )
    for rows in mapped.iter_batches(batch_size=None, batch_format="numpy"):
        columns = [rows[name] for name in ("key", "values", "tokens", "loss", "truncated")]
        yield [
            Gradient(str(key), "", np.asarray(values, np.float32), int(tokens), float(loss), bool(cut))
            for key, values, tokens, loss, cut in zip(*columns, strict=True)
        ]
