"""A stand-in of the hub's API on this machine: repositories, branches, commits of small files, and refusals."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "s" * 34


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def at(self, revision: str) -> str | None:
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        before = self.branches.get(branch)
        whole = {**(self.commits[before] if before else {}), **files}
        text = "".join(f"{name}{hashlib.sha1(data).hexdigest()}" for name, data in sorted(whole.items()))
        made = hashlib.sha1(f"{before}{branch}{text}".encode()).hexdigest()
        self.commits[made] = whole
        self.branches[branch] = made
        return made


@dataclass
class Hub:
    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, authorization
    status: int | None = None  # answered to everything


@contextmanager
def stand_in() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self._noted():
            return
        if self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif not self._may_write():
            self._answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            asked = json.loads(data)
            name, known = f"{asked['organization']}/{asked['name']}", self.state.repos
            self._answer(409 if name in known else 200, {"url": f"{self.state.url}/{name}", "id": name})
            known.setdefault(name, Repo(private=asked.get("visibility") == "private"))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", self.path):
            self._write(found[1], found[2], found[3], data)
        else:
            self._answer(404, {})

    def _write(self, name: str, what: str, revision: str, data: bytes) -> None:
        repo = self.state.repos[name]
        if what == "branch":
            repo.branches.setdefault(revision, next(iter(repo.branches.values()), ""))
            self._answer(200, {})
        elif what == "preupload":
            paths = [file["path"] for file in json.loads(data)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            self._answer(200, {"files": modes})
        else:
            lines = [json.loads(line) for line in data.splitlines()]
            files = {row["value"]["path"]: base64.b64decode(row["value"]["content"]) for row in lines[1:]}
            made = repo.commit(revision, files)
            self._answer(200, {"commitUrl": f"{self.state.url}/{name}/commit/{made}", "commitOid": made})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self._noted():
            return
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        repo = None if found is None else self.state.repos.get(found[1])
        if found is None or repo is None or (repo.private and not self._may_write()):
            self._answer(404 if self._may_write() else 401, {}, {"X-Error-Code": "RepoNotFound"})
        elif repo.gated:
            self._answer(403, {}, {"X-Error-Code": "GatedRepo"})
        elif (commit := repo.at(found[2])) is None:
            self._answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        elif (data := repo.commits[commit].get(found[3])) is None:
            self._answer(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        else:
            name = hashlib.sha1(commit.encode() + data).hexdigest()
            self._answer(200, data, {"X-Repo-Commit": commit, "ETag": f'"{name}"'})

    def _noted(self) -> bool:
        """Notes the request; True if everything is answered with one status."""
        self.state.requests.append((self.command, self.path, self.headers.get("Authorization")))
        if self.state.status is not None:
            self._answer(self.state.status, {})
        return self.state.status is not None

    def _may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
