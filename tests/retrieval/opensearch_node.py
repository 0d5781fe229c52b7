"""A real OpenSearch node for the tests, and a proxy that makes it look like Elasticsearch to that client."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

SECONDS = 120.0
"""Time in which a node must answer; a busy machine needs much longer than the usual 5 seconds."""


class OpenSearchNode:
    """One node in a temporary folder, on a free port.

    Args:
        folder: Folder of its data, log and settings.
    """

    def __init__(self, folder: Path) -> None:
        shared = Path(os.environ.get("GRAFTWORK_SHARED") or Path(__file__).parents[2].parent / "shared")
        self.program = shared / "servers" / "opensearch" / "start"
        if not self.program.exists():
            pytest.skip(f"no OpenSearch in {self.program}; set GRAFTWORK_OPENSEARCH_URL to the address of a server")
        if shutil.which("java") is None:
            pytest.skip("no Java runtime, which the OpenSearch node needs; install openjdk-17-jre-headless")
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.port = taken.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the node and wait until it answers."""
        with (self.folder / "node.log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(self.program), str(self.folder / "data"), str(self.port)], stdout=log, stderr=log
            )
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            assert self.process.poll() is None, (self.folder / "node.log").read_text()[-2000:]
            try:
                health = httpx.get(f"{self.url}/_cluster/health", params={"wait_for_status": "yellow"}, timeout=30)
                if health.status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        raise AssertionError("the node did not start in time")

    def kill(self) -> None:
        """Kill the node as a crash does; `start` runs it again on the same data."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)

    def stop(self) -> None:
        """Stop the node."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)


class HeaderProxy:
    """Forwards requests to a server, translates content types, and adds Elasticsearch's product header.

    Args:
        target: Address of the server.
    """

    def __init__(self, target: str) -> None:
        host = urlsplit(target)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                """Discard log messages."""

            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                given = {name: self.headers[name] for name in ("Content-Type", "Accept") if name in self.headers}
                # OpenSearch does not know Elasticsearch's own content types
                headers = {
                    name: "application/x-ndjson" if "ndjson" in value else "application/json"
                    for name, value in given.items()
                }
                connection = http.client.HTTPConnection(host.hostname or "", host.port, timeout=60)
                connection.request(self.command, self.path, body, headers)
                reply = connection.getresponse()
                data = reply.read()
                connection.close()
                self.send_response(reply.status)
                self.send_header("X-Elastic-Product", "Elasticsearch")
                self.send_header("Content-Type", reply.getheader("Content-Type") or "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward  # noqa: N815

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
