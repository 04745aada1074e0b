"""A stand-in for the Hub on this machine: as much of its HTTP API as pushing and pulling a model needs, kept in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"
USER = "me"

_LARGE = (".safetensors", ".bin", ".pt", ".pth", ".png")
"""How names of files end that go through the large file storage, as the Hub's default `.gitattributes` has it."""


@dataclass(frozen=True)
class Commit:
    """A state of a repository, and how it came about."""

    oid: str
    summary: str
    files: dict[str, bytes]


class Missing(Exception):
    """Something that the Hub answers by 404; the argument is its error code."""


@dataclass
class StandIn:
    """What the server holds, for a test to look at and to meddle with.

    Attributes:
        repos: Commits of each model repository, oldest first.
        failures: How the next commits fail, in order: "500", "closed" (no answer at all), "lost" (committed, but no answer);
            "" is for one that does not.
        unknown: Requests that no part of this stand-in knows.
        requests: All requests, as "METHOD path".
    """

    endpoint: str = ""
    repos: dict[str, list[Commit]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)
    lock: Any = field(default_factory=Lock)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Contents of a revision by path."""
        return self.commit(repo, revision).files

    def summaries(self, repo: str) -> list[str]:
        """Messages of all commits, oldest first, without the empty one that every repository begins with."""
        return [commit.summary for commit in self.repos[repo][1:]]

    def commit(self, repo: str, revision: str) -> Commit:
        """A revision: ``main`` or the hash of a commit."""
        if repo not in self.repos:
            raise Missing("RepoNotFound")
        if revision == "main":
            return self.repos[repo][-1]
        for commit in self.repos[repo]:
            if commit.oid == revision:
                return commit
        raise Missing("RevisionNotFound")

    def create(self, repo: str) -> bool:
        """Make an empty repository; False if it is there already."""
        if repo in self.repos:
            return False
        self.repos[repo] = [Commit(_oid(repo, "initial commit"), "initial commit", {".gitattributes": b""})]
        return True

    def add(self, repo: str, lines: bytes) -> Commit:
        """Commit what a body of newline-delimited JSON says."""
        entries = [json.loads(line) for line in lines.splitlines()]
        files, summary = dict(self.files(repo)), ""
        for entry in entries:
            value = entry["value"]
            if entry["key"] == "header":
                summary = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise ValueError(entry["key"])
        commit = Commit(_oid(self.repos[repo][-1].oid, summary, *sorted(files)), summary, files)
        self.repos[repo].append(commit)
        return commit


def _oid(*parts: str) -> str:
    return hashlib.sha1("\0".join(parts).encode()).hexdigest()


def _etag(path: str, content: bytes) -> str:
    if path.endswith(_LARGE) and content:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    large = {"oid": _etag(path, content), "size": len(content), "pointerSize": 130}
    entry = {"type": "file", "path": path, "size": len(content), "oid": _etag(path, content)[:40]}
    return {**entry, "lfs": large} if path.endswith(_LARGE) and content else entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandIn

    def log_message(self, *_: Any) -> None:
        """Keep the test's output clean."""

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            try:
                self._route(path, body)
            except Missing as problem:
                self._answer({"error": str(problem)}, 404, {"X-Error-Code": str(problem)})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _route(self, path: str, body: bytes) -> None:
        hub = self.hub
        if self.command == "PUT" and (found := re.fullmatch(r"/storage/(\w+)", path)):
            # Like the Hub's storage, the address is the permission.
            good = hashlib.sha256(body).hexdigest() == found[1]
            if good:
                hub.large[found[1]] = body
            return self._answer({}, 200 if good else 400)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid credentials"}, 401)
        if path == "/api/whoami-v2":
            return self._answer({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            value = json.loads(body)
            repo = f"{value.get('organization') or USER}/{value['name']}"
            return self._answer({"url": f"{hub.endpoint}/{repo}"}, 200 if hub.create(repo) else 409)
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._answer({"transfer": "basic", "objects": [self._large(o) for o in json.loads(body)["objects"]]})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(*found.groups())
        if found := re.fullmatch(
            r"/api/models/([^/]+/[^/]+?)(?:/(preupload|commit|tree|revision)/([^/]+)(/.*)?)?", path
        ):
            return self._model(*found.groups(), body=body)
        hub.unknown.append(f"{self.command} {path}")
        return self._answer({"error": "not part of this stand-in"}, 404)

    def _large(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.hub.large:
            return wanted
        return {**wanted, "actions": {"upload": {"href": f"{self.hub.endpoint}/storage/{wanted['oid']}"}}}

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        commit = self.hub.commit(repo, revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            return self._answer({}, 404, {**headers, "X-Error-Code": "EntryNotFound"})
        content = commit.files[path]
        return self._answer(content, headers={**headers, "ETag": f'"{_etag(path, content)}"'})

    def _model(self, repo: str, action: str | None, revision: str | None, below: str | None, body: bytes) -> None:
        commit = self.hub.commit(repo, revision or "main")
        if action in (None, "revision"):
            siblings = [{"rfilename": path} for path in commit.files]
            return self._answer({"id": repo, "sha": commit.oid, "siblings": siblings, "tags": [], "private": False})
        if action == "tree":
            prefix = f"{(below or '').strip('/')}/".lstrip("/")
            return self._answer([_entry(path, c) for path, c in commit.files.items() if path.startswith(prefix)])
        if action == "preupload":
            return self._answer({"files": [self._mode(file["path"], commit) for file in json.loads(body)["files"]]})
        failure = self.hub.failures.pop(0) if self.hub.failures else ""
        if failure == "500":
            return self._answer({"error": "Internal Error - We're working hard to fix this as soon as possible!"}, 500)
        if failure != "closed":
            commit = self.hub.add(repo, body)
        if failure:
            self.close_connection = True
            return None
        return self._answer({"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{commit.oid}", "commitOid": commit.oid})

    def _mode(self, path: str, commit: Commit) -> dict[str, Any]:
        mode: dict[str, Any] = {"path": path, "uploadMode": "lfs" if path.endswith(_LARGE) else "regular"}
        if path in commit.files:
            mode["oid"] = _etag(path, commit.files[path])
        return {**mode, "shouldIgnore": False}


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """Run the server in a thread of this process, on a free port of the loopback interface."""
    hub = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
