"""32 clients for two minutes, with changes, hang-ups, bad bodies and slow connections."""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.servers import eventually, listening, open_decoder

CLIENTS = 32
SECONDS = float(os.environ.get("GRAFTWORK_SOAK_SECONDS", "120"))
"""Duration; the environment variable sets another one, such as 600."""
GROWTH_MB = 150.0
"""Allowed growth of the resident memory after the first fifth of the time; clients and server share the process."""
BAD = (b"{", b"[1]", b'{"question": "\\ud800"}', b"\xff", b'{"question": "a", "strength": 1e300}', b"[" * 5000)


def resident_mb() -> float:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


class Load:
    """One client that sends random requests until it is stopped."""

    def __init__(self, address: str, number: int, stop: threading.Event) -> None:
        self.url, self.number, self.stop = httpx.URL(address), number, stop
        self.draw = random.Random(number)
        self.statuses: Counter[int] = Counter()
        self.unexpected: list[str] = []

    def run(self) -> None:
        """Send requests."""
        with httpx.Client(base_url=self.url, timeout=60) as client:
            while not self.stop.is_set():
                kind = self.draw.random()
                if kind < 0.05:
                    self.hang_up()
                elif kind < 0.06:
                    self.trickle()
                elif kind < 0.16:
                    self.count(client.post("/v1/answer", content=self.draw.choice(BAD), headers=JSON))
                elif kind < 0.20:
                    self.change(client)
                else:
                    self.count(client.post("/v1/answer", json=self.question()))

    def question(self, tokens: int = 3) -> dict[str, Any]:
        """A random question."""
        names = [f"p{number}" for number in self.draw.sample(range(24), self.draw.randint(0, 3))]
        options: list[dict[str, Any]] = [{}, {"strength": -1.0}, {"adapter": False}, {"blind": False}, {"seed": 1}]
        return {
            "question": f"who is number {self.draw.randint(0, 99)} ?",
            "passage_ids": names,
            "max_new_tokens": tokens,
            **self.draw.choice(options),
        }

    def change(self, client: httpx.Client) -> None:
        """Add and delete a passage of this client."""
        name = f"own/{self.number}"
        new = {"passages": [{"id": name, "title": "own", "text": f"the baker {self.draw.random()} is here ."}]}
        self.count(client.post("/v1/passages", json={**new, "replace": True}))
        self.count(client.delete("/v1/passages", params={"id": name}))

    def hang_up(self) -> None:
        """Send a question, complete or in part, and close the connection."""
        content = json.dumps(self.question(60)).encode()
        head = f"POST /v1/answer HTTP/1.1\r\nHost: localhost\r\n{JSON_HEADER}\r\nContent-Length: {len(content)}\r\n\r\n"
        sent = head.encode() + content
        with socket.create_connection((self.url.host, self.url.port or 0)) as connection:
            connection.sendall(sent[: self.draw.choice([10, len(head), len(sent) - 1, len(sent)])])

    def trickle(self) -> None:
        """Send headers too slowly."""
        with socket.create_connection((self.url.host, self.url.port or 0), timeout=20) as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\n")
            answer = connection.recv(4096)
            self.statuses[int(answer.split()[1])] += 1

    def count(self, reply: httpx.Response) -> None:
        """Count a status; a server error is kept with its text."""
        self.statuses[reply.status_code] += 1
        if reply.status_code >= 500:
            self.unexpected.append(reply.text)


JSON_HEADER = "Content-Type: application/json"
JSON = {"Content-Type": "application/json"}


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident memory from /proc")
def test_32_clients_cause_no_server_error_no_growth_and_no_changed_weight(decoder_place, decoder, tmp_path: Path):
    service = open_decoder(decoder_place.copy(tmp_path), decoder, header_timeout=1.0, body_timeout=1.0, check_every=500)
    before, stop = service.answerer.weights_digest(), threading.Event()
    with listening(service) as address:
        loads = [Load(address, number, stop) for number in range(CLIENTS)]
        threads = [threading.Thread(target=load.run) for load in loads]
        for thread in threads:
            thread.start()
        time.sleep(SECONDS / 5)
        early = resident_mb()
        time.sleep(SECONDS * 4 / 5)
        late = resident_mb()
        stop.set()
        for thread in threads:
            thread.join(60)
        eventually(lambda: len(service.queue) == 0)
        assert httpx.get(f"{address}/healthz").status_code == 200
        assert service.queue.run_between_batches(service.answerer.weights_digest).result() == before
    total = sum((load.statuses for load in loads), Counter[int]())
    print(f"{sum(total.values())} requests: {dict(total)}; memory {early:.0f} MB, then {late:.0f} MB")
    assert [text for load in loads for text in load.unexpected] == []
    assert set(total) <= {200, 400, 404, 408, 422, 429}
    assert total[200] > 10 * SECONDS
    assert late - early < GROWTH_MB
