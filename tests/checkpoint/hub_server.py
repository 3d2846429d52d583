"""A small stand-in for a hub: repositories, revisions, redirects, ranges, and lines that break."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = (".bin", ".safetensors", ".model")


def commit_name(files: dict[str, bytes]) -> str:
    digest = hashlib.sha1(usedforsecurity=False)
    for name, data in sorted(files.items()):
        digest.update(name.encode() + b"\0" + data)
    return digest.hexdigest()


@dataclass
class Hub:
    """What the server holds and how it misbehaves; `requests` lists (method, path, headers)."""

    url: str = ""
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    breaks_after: dict[str, list[int]] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    knows_ranges: bool = True
    refuses: str = ""
    status: int = 0
    hides_etags: bool = False

    def push(self, files: dict[str, bytes], branch: str = "main") -> str:
        commit = commit_name(files)
        self.commits[commit] = dict(files)
        self.branches[branch] = commit
        return commit

    def fetched(self) -> dict[str, int]:
        """Bodies asked for, by file name."""
        counts: dict[str, int] = {}
        for method, path, _ in self.requests:
            if method == "GET" and not path.startswith("/api"):
                name = path.rsplit("/", 1)[-1]
                if not (path.startswith("/owner") and name.endswith(LARGE)):  # that one was a redirect
                    counts[name] = counts.get(name, 0) + 1
        return counts


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.hub.requests.append((self.command, self.path, dict(self.headers)))
        if self.hub.status:
            self.reply(self.hub.status, b"broken", {})
        elif self.hub.refuses:
            status = {"RepoNotFound": 401, "GatedRepo": 403}[self.hub.refuses]
            self.reply(status, b"{}", {"X-Error-Code": self.hub.refuses, "X-Error-Message": "no"})
        elif found := re.fullmatch(r"/api/models/owner/model(?:/revision/([^/?]+))?(?:\?.*)?", self.path):
            self.describe(found[1] or "main")
        elif found := re.fullmatch(r"/owner/model/resolve/([^/]+)/([^/?]+)", self.path):
            self.resolve(found[1], found[2])
        elif found := re.fullmatch(r"/storage/([^/]+)/([^/?]+)", self.path):
            self.send_file(found[2], self.hub.commits[found[1]][found[2]], {})
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def commit(self, revision: str) -> str | None:
        commit = self.hub.branches.get(revision, revision)
        return commit if commit in self.hub.commits else None

    def describe(self, revision: str) -> None:
        commit = self.commit(revision)
        if commit is None:
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [{"rfilename": name} for name in self.hub.commits[commit]]
        self.reply(200, json.dumps({"id": "owner/model", "sha": commit, "siblings": siblings}).encode(), {})

    def resolve(self, revision: str, name: str) -> None:
        commit = self.commit(revision)
        if commit is None or name not in self.hub.commits[commit]:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit or ""})
            return
        data = self.hub.commits[commit][name]
        headers = {"X-Repo-Commit": commit}
        if not name.endswith(LARGE):
            git = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
            self.send_file(name, data, headers | ({} if self.hub.hides_etags else {"ETag": f'"{git}"'}))
            return
        headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"'}
        port = self.server.server_address[1]
        headers["Location"] = f"http://localhost:{port}/storage/{commit}/{name}"  # another host than 127.0.0.1
        self.reply(302, b"", headers)

    def send_file(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        start = 0
        asked = self.headers.get("Range")
        if name in self.hub.damaged:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if asked and self.hub.knows_ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            headers = headers | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        cuts = self.hub.breaks_after.get(name, [])
        cut = cuts.pop(0) if cuts and self.command == "GET" else None
        self.reply(206 if start else 200, data[start:], headers, cut)

    def reply(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.close_connection = True


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
