"""Many clients that send random requests to a server: questions, changes, lists, bad bodies, slow and lost connections.

    python tests/serving/load.py ADDRESS --seconds 600

Prints the number of responses by status, and the responses that no client should get, as JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx

CLIENTS = 32
BAD: tuple[bytes, ...] = (
    b"{",
    b"[1]",
    b'{"question": "\\ud800"}',
    b"\xff",
    b'{"question": "a", "strength": 1e300}',
    b'{"question": "a", "max_new_tokens": 100000}',
    b"[" * 5000,
    b"",
)
HEAD = "POST {} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
JSON = {"Content-Type": "application/json"}


class Load:
    """One client that sends random requests until the time or the number of requests is over.

    Args:
        address: Address of the server.
        number: Number of the client, and seed of its requests.
        more: Returns False once the client should stop.
    """

    def __init__(self, address: str, number: int, more: Callable[[], bool]) -> None:
        self.url, self.number, self.more = httpx.URL(address), number, more
        self.draw = random.Random(number)
        self.statuses: Counter[int] = Counter()
        self.kinds: Counter[str] = Counter()
        self.unexpected: list[str] = []

    def run(self) -> None:
        """Send requests; exceptions of the client are reported as unexpected."""
        table = {
            self.answer: 60,
            self.chat: 10,
            self.complete: 5,
            self.change: 5,
            self.read: 5,
            self.send_bad_body: 9,
            self.hang_up: 5,
            self.send_slowly: 1,
        }
        try:
            with httpx.Client(base_url=self.url, timeout=120) as client:
                while self.more():
                    action = self.draw.choices(list(table), list(table.values()))[0]
                    action(client)
                    self.kinds[action.__name__] += 1
        except Exception as error:
            self.unexpected.append(f"{type(error).__name__}: {error}")

    def answer(self, client: httpx.Client) -> None:
        """Ask a question, with passages by id or retrieved ones."""
        self.count(client.post("/v1/answer", json=self.question()))

    def chat(self, client: httpx.Client) -> None:
        """Ask a question in OpenAI's format, in one piece or as a stream."""
        asked = self.question()
        body = {
            "model": "decoder",
            "messages": [{"role": "user", "content": asked["question"]}],
            "max_tokens": 3,
            "stream": self.draw.random() < 0.5,
            "regrad": {name: asked[name] for name in asked if name not in ("question", "max_new_tokens")},
        }
        self.count(client.post("/v1/chat/completions", json=body))

    def complete(self, client: httpx.Client) -> None:
        """Continue a prompt in OpenAI's format, with several answers, log-probabilities and stop sequences."""
        body = {
            "model": "decoder",
            "prompt": [f"number {self.draw.randint(0, 99)} is"] * self.draw.randint(1, 2),
            "max_tokens": 5,
            "n": self.draw.randint(1, 2),
            "stream": self.draw.random() < 0.5,
            "logprobs": self.draw.choice([None, 2]),
            "stop": self.draw.choice([None, "a", ["e", "the"]]),
        }
        self.count(client.post("/v1/completions", json=body))

    def read(self, client: httpx.Client) -> None:
        """Read lists and measurements."""
        path = self.draw.choice(["/v1/models", "/v1/bank/stats", "/metrics", "/healthz", "/openapi.json", "/nowhere"])
        self.count(client.get(path))

    def change(self, client: httpx.Client) -> None:
        """Add and delete a passage of this client."""
        name = f"own/{self.number}"
        new = {"passages": [{"id": name, "title": "own", "text": f"the baker {self.draw.random()} is here ."}]}
        self.count(client.post("/v1/passages", json={**new, "replace": True}))
        if self.draw.random() < 0.5:
            self.count(client.delete("/v1/passages", params={"id": name}))
        else:
            self.count(client.delete(f"/v1/passages/{name}"))

    def send_bad_body(self, client: httpx.Client) -> None:
        """Send a body that is no valid request."""
        path = self.draw.choice(["/v1/answer", "/v1/passages", "/v1/chat/completions"])
        self.count(client.post(path, content=self.draw.choice(BAD), headers=JSON))

    def hang_up(self, client: httpx.Client) -> None:
        """Send a question or a passage, complete or in part, and close the connection."""
        path, body = self.draw.choice([("/v1/answer", self.question(60)), ("/v1/passages", {"passages": []})])
        content = json.dumps(body).encode()
        head = HEAD.format(path, len(content)).encode()
        sent = head + content
        with self.connection() as connection:
            connection.sendall(sent[: self.draw.choice([10, len(head), len(sent) - 1, len(sent)])])

    def send_slowly(self, client: httpx.Client) -> None:
        """Send headers or a body too slowly."""
        sent = self.draw.choice([b"GET /healthz HTTP/1.1\r\n", HEAD.format("/v1/answer", 500).encode() + b"{"])
        with self.connection() as connection:
            connection.sendall(sent)
            answer = connection.recv(4096)
            self.statuses[int(answer.split()[1]) if answer else 0] += 1

    def connection(self) -> socket.socket:
        """A new connection without HTTP."""
        return socket.create_connection((self.url.host, self.url.port or 0), timeout=120)

    def question(self, tokens: int = 3) -> dict[str, Any]:
        """A random question."""
        names = [f"p{number}" for number in self.draw.sample(range(24), self.draw.randint(0, 3))]
        options: list[dict[str, Any]] = [{}, {"strength": -1.0}, {"adapter": False}, {"blind": False}, {"top_k": 2}]
        sampling: list[dict[str, Any]] = [{}, {}, {"temperature": 2.0, "seed": 1, "top_p": 0.9}]
        passages: dict[str, Any] = {"passage_ids": names} if self.draw.random() < 0.7 else {}
        return {
            "question": f"who is number {self.draw.randint(0, 99)} ?",
            "max_new_tokens": tokens,
            **passages,
            **self.draw.choice(options),
            **self.draw.choice(sampling),
        }

    def count(self, reply: httpx.Response) -> None:
        """Count a status; a server error is kept with its text."""
        self.statuses[reply.status_code] += 1
        if reply.status_code >= 500:
            self.unexpected.append(reply.text)


def send(address: str, *, seconds: float | None = None, requests: int | None = None) -> dict[str, Any]:
    """Run all clients.

    Args:
        address: Address of the server.
        seconds: Duration; None for no limit.
        requests: Number of responses after which the clients stop; None for no limit.
    """
    end = None if seconds is None else time.monotonic() + seconds
    loads: list[Load] = []

    def more() -> bool:
        if requests is not None and sum(load.statuses.total() for load in loads) >= requests:
            return False
        return end is None or time.monotonic() < end

    loads += [Load(address, number, more) for number in range(CLIENTS)]
    threads = [threading.Thread(target=load.run) for load in loads]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = sum((load.statuses for load in loads), Counter[int]())
    kinds = sum((load.kinds for load in loads), Counter[str]())
    unexpected = [text for load in loads for text in load.unexpected]
    return {"statuses": statuses, "kinds": kinds, "unexpected": unexpected}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--requests", type=int)
    options = parser.parse_args()
    print(json.dumps(send(options.address, seconds=options.seconds, requests=options.requests)))


if __name__ == "__main__":
    main()
