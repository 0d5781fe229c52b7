"""Fake Elasticsearch server with the endpoints for building and searching an index, and injectable faults."""

from __future__ import annotations

import fnmatch
import json
import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from graftwork.retrieval.analysis import EnglishAnalyser

READ_ONLY = {
    "type": "cluster_block_exception",
    "reason": "index [x] blocked by: [disk usage exceeded flood-stage watermark]",
}


class FakeElasticsearch:
    """In-memory indexes with injectable faults.

    Faults: `lose` acknowledges every passage but reports a count that is one too low; `read_only_after` rejects
    passages after that number; `busy` answers that number of requests with status 429; `busy_items` does the same for
    the first passage of a request; `stall_after` stops responding after that number of passages.
    """

    def __init__(self) -> None:
        self.indexes: dict[str, dict[str, Any]] = {}
        self.aliases: dict[str, str] = {}
        self.faults: dict[str, Any] = {}
        self.requests: list[tuple[str, str, Any]] = []
        self.free = 50e9
        self.headers: list[dict[str, str]] = []
        self.closing = threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                """Discard log messages."""

            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length).decode()
                fake.headers.append({key.lower(): value for key, value in self.headers.items()})
                path = unquote(urlsplit(self.path).path)
                status, value = fake.handle(self.command, path, body)
                data = b"" if value is None or self.command == "HEAD" else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("X-Elastic-Product", "Elasticsearch")
                self.send_header("Content-Type", "application/vnd.elasticsearch+json; compatible-with=8")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer  # noqa: N815

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def handle(self, method: str, path: str, body: str) -> tuple[int, Any]:
        if path == "/":
            return 200, {"version": {"number": "8.19.0"}}
        parts = path.strip("/").split("/")
        lines = "_bulk" in parts or "_msearch" in parts
        value = [json.loads(line) for line in body.splitlines()] if lines else json.loads(body) if body else None
        self.requests.append((method, path, value))
        name = "on" + (next((part for part in parts if part.startswith("_")), "_index")).replace("-", "_")
        return getattr(self, name)(method, parts, value)

    def on_cluster(self, method: str, parts: list[str], value: Any) -> tuple[int, Any]:
        if parts[1] == "health":
            return 200, {"status": "green"}
        return 200, {
            "persistent": {},
            "transient": {},
            "defaults": {
                "cluster.routing.allocation.disk.threshold_enabled": "true",
                "cluster.routing.allocation.disk.watermark.high": "90%",
            },
        }

    def on_nodes(self, method: str, parts: list[str], value: Any) -> tuple[int, Any]:
        return 200, {"nodes": {"a": {"fs": {"total": {"total_in_bytes": 100e9, "available_in_bytes": self.free}}}}}

    def on_alias(self, method: str, parts: list[str], value: Any) -> tuple[int, Any]:
        index = self.aliases.get(parts[1])
        if index is None:
            return 404, {"error": "alias missing", "status": 404}
        return 200, {index: {"aliases": {parts[1]: {}}}}

    def on_aliases(self, method: str, parts: list[str], value: Any) -> tuple[int, Any]:
        for action in value["actions"]:
            for kind, what in action.items():
                if kind == "add":
                    self.aliases[what["alias"]] = what["index"]
        return 200, {"acknowledged": True}

    def on_index(self, method: str, parts: list[str], value: Any) -> tuple[int, Any]:
        name = parts[0]
        if method == "PUT":
            self.indexes[name] = {
                "mappings": value["mappings"],
                "settings": dict(value["settings"]),
                "docs": {},
                "sent": 0,
                "uuid": secrets.token_hex(8),
            }
            return 200, {"acknowledged": True}
        if method == "HEAD":
            return (200 if name in self.indexes else 404), None
        if method == "DELETE":
            del self.indexes[name]
            return 200, {"acknowledged": True}
        found = {
            key: {"mappings": index["mappings"]} for key, index in self.indexes.items() if fnmatch.fnmatch(key, name)
        }
        return 200, found

    def on_mapping(self, method: str, parts: list[str], value: Any) -> tuple[int, Any]:
        index = self.indexes[parts[0]]
        if method == "PUT":
            index["mappings"]["_meta"] = value["_meta"]
            return 200, {"acknowledged": True}
        return 200, {parts[0]: {"mappings": index["mappings"]}}

    def on_settings(self, method: str, parts: list[str], value: Any) -> tuple[int, Any]:
        index = self.indexes[parts[0]]
        if method == "PUT":
            index["settings"].update(value["index"])
            return 200, {"acknowledged": True}
        return 200, {parts[0]: {"settings": {}}}

    def on_refresh(self, method: str, parts: list[str], value: Any) -> tuple[int, Any]:
        return 200, {"_shards": {"total": 1, "successful": 1, "failed": 0}}

    def on_forcemerge(self, method: str, parts: list[str], value: Any) -> tuple[int, Any]:
        return self.on_refresh(method, parts, value)

    on_flush = on_forcemerge

    def on_stats(self, method: str, parts: list[str], value: Any) -> tuple[int, Any]:
        """Return one shard; every passage that was sent has the next sequence number."""
        index = self.indexes[parts[0]]
        count = len(index["docs"])
        found = {
            "uuid": index["uuid"],
            "primaries": {"docs": {"count": count, "deleted": 0}, "merges": {"current": 0}},
            "shards": {"0": [{"seq_no": {"max_seq_no": index["sent"] - 1}}]},
        }
        return 200, {"indices": {parts[0]: found}}

    def on_analyze(self, method: str, parts: list[str], value: Any) -> tuple[int, Any]:
        field = self.indexes[parts[0]]["mappings"]["properties"][value["field"]]
        english = field["analyzer"] == "english" and not self.faults.get("other_english")
        terms = EnglishAnalyser().terms(value["text"]) if english else value["text"].lower().split()
        return 200, {"tokens": [{"token": term} for term in terms]}

    def on_search(self, method: str, parts: list[str], value: Any) -> tuple[int, Any]:
        docs = self.indexes[parts[0]]["docs"]
        after = value.get("search_after", [""])[0]
        names = [name for name in sorted(docs) if name > after][: value["size"]]
        return 200, {"hits": {"hits": [{"_id": name, "_source": docs[name], "sort": [name]} for name in names]}}

    def on_count(self, method: str, parts: list[str], value: Any) -> tuple[int, Any]:
        return 200, {"count": len(self.indexes[parts[0]]["docs"]) - bool(self.faults.get("lose"))}

    def on_mget(self, method: str, parts: list[str], value: Any) -> tuple[int, Any]:
        docs = self.indexes[parts[0]]["docs"]
        return 200, {"docs": [{"_id": name, "found": name in docs, "_source": docs.get(name)} for name in value["ids"]]}

    def on_bulk(self, method: str, parts: list[str], value: list[Any]) -> tuple[int, Any]:
        index, items = self.indexes[parts[0]], []
        if self.faults.get("busy", 0) > 0:
            self.faults["busy"] -= 1
            return 429, {"error": {"type": "es_rejected_execution_exception", "reason": "queue full"}, "status": 429}
        for action, source in zip(value[::2], value[1::2], strict=True):
            name = action["create"]["_id"]
            index["sent"] += 1
            if index["sent"] > self.faults.get("stall_after", 1e9):
                self.closing.wait(5)
                time.sleep(0)
            if index["sent"] > self.faults.get("read_only_after", 1e9):
                items.append({"create": {"_id": name, "status": 403, "error": READ_ONLY}})
            elif not items and self.faults.get("busy_items", 0) > 0:
                self.faults["busy_items"] -= 1
                error = {"type": "es_rejected_execution_exception", "reason": "queue full"}
                items.append({"create": {"_id": name, "status": 429, "error": error}})
            else:
                index["docs"][name] = source
                items.append({"create": {"_id": name, "status": 201}})
        return 200, {"took": 1, "errors": any("error" in item["create"] for item in items), "items": items}

    def on_msearch(self, method: str, parts: list[str], value: list[Any]) -> tuple[int, Any]:
        """Return every passage that contains a word of the query, all with the same score."""
        responses = []
        for header, search in zip(value[::2], value[1::2], strict=True):
            docs = self.indexes[header["index"]]["docs"]
            words = set(search["query"]["multi_match"]["query"].lower().split())
            hits = [
                {"_id": name, "_score": 2.2, "_source": {"title": doc["title"], "txt": doc["txt"]}}
                for name, doc in sorted(docs.items())
                if words & set(doc["txt"].lower().split())
            ]
            responses.append({"hits": {"hits": hits[: search["size"]]}, "status": 200})
        return 200, {"responses": responses}
