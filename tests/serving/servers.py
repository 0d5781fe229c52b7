"""Helpers of the server tests: start servers, wait for conditions, read metrics."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from graftwork.grafting.converted import Converted
from graftwork.methods.regrad.answering.answerer import Answerer
from graftwork.methods.regrad.bank.gradient_bank import GradientBank
from graftwork.methods.regrad.encoding.encoder import PassageEncoder, encode_passages
from graftwork.retrieval.embedded import EmbeddedIndex, build_embedded
from graftwork.retrieval.retriever import Passage
from graftwork.serving.launch import open_service, server_config
from graftwork.serving.service import Service
from graftwork.serving.settings import ServeSettings
from graftwork.serving.tenants import Tenant
from regrad_toy import CITIES

GROWTH_MB = 60.0
"""Allowed growth of the resident memory between the first and the last measurement."""
ENTITIES = range(100, 140)


@dataclass(frozen=True)
class Place:
    """Paths of a run, its bank and its index."""

    run: Path
    bank: Path
    index: Path

    def copy(self, folder: Path) -> Place:
        """Copy bank and index, so that a test may change them."""
        for part in ("bank", "index"):
            shutil.copytree(getattr(self, part), folder / part)
        return Place(self.run, folder / "bank", folder / "index")


def resident_mb() -> float:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def city_of(entity: int) -> str:
    return f"c{entity * 5 % CITIES}"


def home_of(entity: int, city: str | None = None) -> Passage:
    return Passage(f"p{entity}", f"e{entity} lives in {city or city_of(entity)} .", f"home of e{entity}")


def fill(place: Place, encoder: PassageEncoder, passages: list[Passage]) -> None:
    corpus = place.bank.with_name("corpus.jsonl")
    rows = [{"_id": one.id, "text": one.text, "title": one.title} for one in passages]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_embedded(str(corpus), place.index)
    encode_passages(encoder, encoder.open_bank(place.bank), passages)


def open_toy(place: Place, **settings: Any) -> Service:
    """Service of the toy; answers are limited to one token."""
    chosen = ServeSettings(**{"default_new_tokens": 1, **settings})
    return open_service(str(place.run), chosen, bank=str(place.bank), index=str(place.index))


def open_decoder(place: Place, converted: Converted, **settings: Any) -> Service:
    config: Any = converted.methods[-1].config
    chosen = ServeSettings(**{"page": False, **settings})
    answerer = Answerer(
        converted.model,
        converted.tokenizer,
        GradientBank(place.bank, "a"),
        EmbeddedIndex(place.index),
        config=config,
        batch_size=chosen.batch_size,
    )
    return Service(answerer, chosen, name="decoder")


@contextmanager
def listening(service: Service, token: str | None = None, tenants: Sequence[Tenant] = ()) -> Iterator[str]:
    """Run a server on a free port; yields its address."""
    config = server_config(service, token, tenants)
    config.port = 0
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        eventually(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def eventually(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true in time"
        time.sleep(0.01)


def count_of(client: httpx.Client, name: str) -> float:
    """Value of a metric by its name and labels in /metrics; 0 if absent."""
    for line in client.get("/metrics").text.splitlines():
        if line.startswith(f"{name} "):
            return float(line.rpartition(" ")[2])
    return 0.0


@contextmanager
def blocked_model_thread(service: Service) -> Iterator[None]:
    """Block the model thread, so that requests wait in the queue."""
    free, begun = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        free.wait(60)

    done = service.queue.run_between_batches(wait)
    begun.wait(60)
    try:
        yield
    finally:
        free.set()
        done.result(60)
