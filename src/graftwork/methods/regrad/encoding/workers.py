"""Encoding by several processes: shards under `torchrun`, or a pool of actors under Ray Data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from graftwork.core.progress import Progress
from graftwork.errors import ConfigError, MissingExtraError
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
    by_text,
    encode_passages,
    missing_documents,
    share_of,
    under_own_id,
)
from graftwork.retrieval.retriever import Passage

LONGEST_WAIT = timedelta(days=7)
"""How long a worker waits for the others."""
CHUNK = 200_000
"""Passages that are handed to a pool of actors at once; the actors are started anew for the next ones."""
ROWS_PER_CALL = 256
"""Passages that an actor takes at once, and sorts by length."""


def workers_of_torchrun() -> int:
    """Processes that `torchrun` started, this one among them; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def encode_share(
    encoder: PassageEncoder, location: str | Path, passages: Iterable[Passage], *, precision: str | None = None
) -> Encoded:
    """Encode this process's share, and put all shares together in one bank; to be called by every process.

    Each process fills a bank of its own, so that none waits for another's commits. What a stopped call left in such
    banks is kept, also when the next call has another number of processes.

    Args:
        encoder: The model with its settings, the same in every process.
        location: The bank: a folder that all processes share, or an address in an object store.
        passages: The whole work list, the same in every process.
        precision: How a new bank keeps numbers.

    Returns:
        What this process did.
    """
    backend = backend_for(location)
    parts = backend.sibling(".parts")
    with _together() as (rank, processes, wait):
        if rank == 0:
            _gather(encoder.open_bank(backend, precision=precision), parts)
        wait()
        whole = encoder.open_bank(backend)
        own = encoder.open_bank(parts.child(f"{rank}-of-{processes}"), precision=whole.precision)
        mine = (one for one in passages if share_of(one.id, rank, processes))
        done = encode_passages(encoder, own, mine, known=whole)
        wait()
        if rank == 0:
            _gather(whole, parts)
        wait()
    return done


@contextmanager
def _together() -> Iterator[tuple[int, int, Callable[[], Any]]]:
    """This process's number, how many there are, and what waits for all of them."""
    from torch import distributed

    made = not distributed.is_initialized()
    if made:
        # nothing but waiting is done together, so no accelerator needs to take part
        distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
    try:
        yield distributed.get_rank(), distributed.get_world_size(), distributed.barrier
    finally:
        if made:
            distributed.destroy_process_group()


def _gather(bank: GradientBank, parts: Backend) -> None:
    """Merge the banks of all processes, and remove them."""
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
    """Encode with a pool of Ray Data's actors, each with a model of its own; this process alone writes to the bank.

    Args:
        load: Makes what an actor encodes with; called once in each of them.
        encoder: The same, for this process; words and counts passages here.
        bank: Where gradients go; open for writing.
        passages: The work list; streamed.
        workers: Actors.
        cpus_per_worker: Processors of each actor.
        gpus_per_worker: Accelerators of each actor.
        replace: Let an id that is there stand for its new text.
        total: Passages that are missing, if known.

    Raises:
        MissingExtraError: If Ray is not installed.
        ConfigError: If the actors would take every processor, so that Ray could not read for them and would wait for
            ever.
    """
    ray = _ray()
    _check_room(ray, workers, cpus_per_worker)
    with Progress("encode", total) as progress:
        writer = BankWriter(bank, replace=replace, progress=progress)
        rest = iter(passages)
        while chunk := list(islice(rest, CHUNK)):
            documents = by_text(encoder, chunk, writer)
            missing = missing_documents([one for same in documents.values() for one in same], writer)
            wanted: dict[str, list[Document]] = {}
            for document in missing:
                wanted.setdefault(document.key, []).append(document)
            held = bank.holds(wanted)
            writer.add([under_own_id(document, None) for key in sorted(held) for document in wanted.pop(key)])
            firsts = [same[0] for same in wanted.values()]
            for rows in _mapped(ray, load, firsts, workers, num_cpus=cpus_per_worker, num_gpus=gpus_per_worker):
                writer.add([under_own_id(document, row) for row in rows for document in wanted[row.id]])
            writer.commit()
        return writer.result()


class _Actor:
    """One of the pool: a model, and the batches that it is given."""

    def __init__(self, load: Callable[[], PassageEncoder]) -> None:
        self.encoder = load()

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
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
    """Gradients under the names of their texts' records, in whatever order they come."""
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
        _Actor,
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


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError:
        raise MissingExtraError("ray", "ray") from None
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


def _check_room(ray: Any, workers: int, cpus_per_worker: float) -> None:
    there = float(ray.cluster_resources().get("CPU", 0))
    if workers < 1 or there - workers * cpus_per_worker < 1:
        raise ConfigError(
            f"Found {workers} workers of {cpus_per_worker:g} processors, and {there:g} processors; expected one to "
            "be left for reading, because Ray waits for ever without. Take fewer workers, or a smaller share for each."
        )
