"""Stand-in for the hub's HTTP API: repositories in memory, with the requests that huggingface_hub sends for them.

Repositories of the owner `gated` are restricted; the token `reader` may read everything else and write nothing, and
`writer` may write repositories of `user`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlparse

import yaml


@dataclass
class Repository:
    """Commits by their id, each with its files, and branches by name."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    messages: list[str] = field(default_factory=list)
    lfs: set[str] = field(default_factory=set)

    def resolve(self, revision: str) -> str | None:
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None


class FakeHub(ThreadingHTTPServer):
    """Server with its repositories, uploaded large files by SHA-256, and the lines of all requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.cards: list[dict[str, Any]] = []
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> FakeHub:
        self.thread.start()
        return self

    def __exit__(self, *about: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request, dispatched by method and path."""

    server: FakeHub
    protocol_version = "HTTP/1.1"
    routes: ClassVar[list[tuple[str, str, str]]] = [
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)", "branch"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/lfs/(?P<oid>\w+)", "upload"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<path>.*))?", "tree"),
        ("GET", r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("HEAD", r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ]

    def handle_request(self) -> None:
        address = urlparse(self.path)
        self.query = parse_qs(address.query)
        self.body = self.read_body()
        self.server.requests.append(f"{self.command} {address.path}")
        for method, pattern, action in self.routes:
            found = re.fullmatch(pattern, address.path)
            if method == self.command and found:
                parts = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
                getattr(self, action)(**parts)
                return
        self.fail(404, "Not Found", f"no route {self.path}")

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def send(self, content: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status: int, code: str, message: str) -> None:
        self.send({"error": message}, status=status, headers={"X-Error-Code": code, "X-Error-Message": message})

    def may_write(self, name: str) -> bool:
        if self.token not in ("writer", "reader"):
            self.fail(401, "", "Invalid username or password.")
        elif self.token != "writer" or not name.startswith("user/"):
            self.fail(403, "", f"You don't have the rights to write to {name}")
        else:
            return True
        return False

    def found(self, name: str, revision: str) -> tuple[Repository, str] | None:
        """Repository and commit; answers the request with an error if there is none."""
        repository = self.server.repositories.get(name)
        if name.startswith("gated/"):
            self.fail(403, "GatedRepo", f"Access to model {name} is restricted.")
        elif repository is None or (repository.private and self.token is None):
            self.fail(401 if self.token is None else 404, "RepoNotFound", "Repository not found")
        elif (commit := repository.resolve(revision)) is None:
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repository, commit
        return None

    def create(self) -> None:
        given = json.loads(self.body)
        name = f"{given.get('organization') or 'user'}/{given['name']}"
        if not self.may_write(name):
            return
        if name in self.server.repositories:
            taken = {"error": "You already created this model repo", "url": f"{self.server.endpoint}/{name}"}
            self.send(taken, status=409)
            return
        self.server.repositories[name] = Repository(given.get("visibility") == "private" or bool(given.get("private")))
        self.send({"url": f"{self.server.endpoint}/{name}", "name": name, "id": name})

    def validate(self) -> None:
        """Check the header of a card as the hub does: known types, ids of models and data sets, results."""
        header = json.loads(self.body)["content"].split("---\n")[1]
        card = yaml.safe_load(header)
        ids = r"[\w.-]+(/[\w.-]+)?"
        faults = [key for key in ("base_model", "library_name") if not re.fullmatch(ids, card.get(key, "a/b"))]
        faults += [one for one in card.get("datasets", []) if not re.fullmatch(ids, one)]
        for model in card.get("model-index", []):
            for result in model["results"]:
                complete = result["task"]["type"] and result["dataset"]["name"] and result["dataset"]["type"]
                numbers = [isinstance(metric["value"], float) and metric["type"] for metric in result["metrics"]]
                faults += [] if complete and all(numbers) else [str(result)]
        self.server.cards.append(card)
        self.send({"errors": [{"message": fault} for fault in faults], "warnings": []}, status=400 if faults else 200)

    def branch(self, name: str, revision: str) -> None:
        if self.may_write(name) and (at := self.found(name, "main")):
            if revision in at[0].branches:
                self.fail(409, "", "Reference already exists")
                return
            at[0].branches[revision] = at[1]
            self.send({})

    def preupload(self, name: str, revision: str) -> None:
        if self.may_write(name) and self.found(name, revision):
            files = json.loads(self.body)["files"]
            modes = {one["path"]: "lfs" if one["path"].endswith(".safetensors") else "regular" for one in files}
            rows = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            self.send({"files": rows})

    def batch(self, name: str) -> None:
        if self.may_write(name):
            objects = json.loads(self.body)["objects"]
            upload = f"{self.server.endpoint}/lfs/"
            rows = [{**one, "actions": {"upload": {"href": upload + one["oid"]}}} for one in objects]
            self.send({"transfer": "basic", "objects": rows})

    def upload(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.objects[oid] = self.body
        self.send({})

    def commit(self, name: str, revision: str) -> None:
        if not (self.may_write(name) and (at := self.found(name, revision))):
            return
        repository, parent = at
        files = dict(repository.commits[parent])
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile", line["key"]
                files[value["path"]] = self.server.objects[value["oid"]]
                repository.lfs.add(value["path"])
        commit = hashlib.sha1(self.body + parent.encode()).hexdigest()
        repository.commits[commit] = files
        answer = {"commitOid": commit, "commitUrl": f"{self.server.endpoint}/{name}/commit/{commit}", "success": True}
        if "create_pr" in self.query:
            repository.branches["refs/pr/1"] = commit
            answer["pullRequestUrl"] = f"{self.server.endpoint}/{name}/discussions/1"
        else:
            repository.branches[revision] = commit
        self.send(answer)

    def info(self, name: str, revision: str = "main") -> None:
        if at := self.found(name, revision):
            siblings = [{"rfilename": path} for path in at[0].commits[at[1]]]
            self.send({"id": name, "sha": at[1], "private": at[0].private, "tags": [], "siblings": siblings})

    def tree(self, name: str, revision: str, path: str = "") -> None:
        if at := self.found(name, revision):
            rows = [
                {
                    "type": "file",
                    "path": file,
                    "size": len(content),
                    "oid": hashlib.sha1(content).hexdigest(),
                    **({"lfs": self.pointer(content)} if file in at[0].lfs else {}),
                }
                for file, content in at[0].commits[at[1]].items()
                if file.startswith(path)
            ]
            self.send(rows)

    def pointer(self, content: bytes) -> dict[str, Any]:
        return {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}

    def resolve(self, name: str, revision: str, path: str) -> None:
        if not (at := self.found(name, revision)):
            return
        content = at[0].commits[at[1]].get(path)
        if content is None:
            self.fail(404, "EntryNotFound", f"{path} does not exist on {revision}")
            return
        tag = hashlib.sha256(content).hexdigest() if path in at[0].lfs else hashlib.sha1(content).hexdigest()
        self.send(content, headers={"ETag": f'"{tag}"', "X-Repo-Commit": at[1], "X-Linked-Etag": f'"{tag}"'})

    def __getattr__(self, name: str) -> Any:
        """Handle every HTTP method alike."""
        if name.startswith("do_"):
            return self.handle_request
        raise AttributeError(name)

    def log_message(self, format: str, *args: Any) -> None:
        """Write no log."""
