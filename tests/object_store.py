"""In-process object store (moto's S3 over HTTP) with injectable faults, and access to the files of a bank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any
from urllib.request import Request, urlopen

from graftwork.methods.regrad.bank.backends import Backend, LocalBackend
from graftwork.methods.regrad.bank.object_store import ObjectStoreBackend

Fault = Callable[[dict[str, Any]], str | None]


class ObjectStore:
    """S3 server with one bucket on a free port of the loopback device."""

    bucket = "bucket"

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Handler(WSGIRequestHandler):
            # keep-alive connections, as in real stores
            protocol_version = "HTTP/1.1"

            def log(self, *_: Any, **__: Any) -> None:
                pass

        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.port}"
        self.fault: Fault = lambda request: None
        """Fault injection: receives each request, may modify it, and returns an error status or None."""
        self.requests: list[tuple[str, str]] = []
        with urlopen(Request(f"{self.url}/{self.bucket}", method="PUT")):
            pass

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
        }

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: dict[str, Any]) -> int:
        """Execute a request without returning its response; return the status."""
        from io import BytesIO

        body, status = request["wsgi.input"].read(int(request.get("CONTENT_LENGTH") or 0)), []
        again = {**request, "wsgi.input": BytesIO(body)}
        request["wsgi.input"] = BytesIO(body)
        for _ in self._app(again, lambda line, *_: status.append(int(line[:3]))):
            pass
        return status[0]

    def _answer(self, request: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        self.requests.append((request["REQUEST_METHOD"], request["PATH_INFO"]))
        status = self.fault(request)
        if status is None:
            return self._app(request, start)
        # an unread body would remain in the connection
        request["wsgi.input"].read(int(request.get("CONTENT_LENGTH") or 0))
        start(status, [("Content-Type", "application/xml")])
        return [f"<Error><Code>{status[4:].replace(' ', '')}</Code></Error>".encode()]


class Files:
    """Files of a bank by their relative names."""

    def __init__(self, backend: Backend) -> None:
        from obstore.store import LocalStore

        if isinstance(backend, LocalBackend):
            self.store: Any = LocalStore(backend.folder)
        else:
            assert isinstance(backend, ObjectStoreBackend)
            self.store = backend.store

    def names(self, under: str | None = None) -> list[str]:
        return sorted(one["path"] for part in self.store.list(under) for one in part)

    def read(self, name: str) -> bytes:
        return bytes(self.store.get(name).bytes())

    def write(self, name: str, content: bytes) -> None:
        self.store.put(name, content)

    def remove(self, name: str) -> None:
        self.store.delete(name)

    def size(self, under: str | None = None) -> int:
        return sum(one["size"] for part in self.store.list(under) for one in part)
