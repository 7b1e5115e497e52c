"""A small model hub on a real port: what huggingface_hub's own client asks of one, with faults on demand."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "5" * 40
LARGE = (".safetensors", "tokenizer.json", ".bin")


@dataclass
class FakeHub:
    """One repository, `acme/tiny`, with the files of a folder."""

    folder: Path
    port: int = 0
    licence: str = "apache-2.0"
    token: str = ""  # without it every answer is 401
    gated: bool = False
    private: bool = False
    status: int = 0  # of every answer
    cut_after: int | None = None  # bytes of a weights file, then the connection breaks
    other_bytes: bool = False  # weights of the listed size, but others
    sizes: dict[str, int] = field(default_factory=dict)  # that are listed instead of the true ones
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)  # method, path, headers

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def page(self) -> str:
        return f"{self.url}/acme/tiny"

    def fetched(self) -> list[str]:
        return [path.rpartition("/")[2] for method, path, _ in self.asked if method == "GET" and "/resolve/" in path]


@contextmanager
def serving(folder: Path, **options: Any) -> Iterator[FakeHub]:
    hub = FakeHub(folder, **options)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        return

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, dict(self.headers.items())))
        if (problem := self._problem(path)) is not None:
            self._send(*problem, b"{}")
        elif path.startswith("/api/models/acme/tiny"):
            self._send(200, {"Content-Type": "application/json"}, json.dumps(self._listing()).encode())
        else:
            self._file(self.hub.folder / path.rpartition("/")[2])

    def _problem(self, path: str) -> tuple[int, dict[str, str]] | None:
        hub = self.hub
        if hub.status:
            return hub.status, {}
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return 401, {"X-Error-Message": "Invalid credentials"}
        last = path.rpartition("/")[2]
        codes = {
            "RepoNotFound": hub.private or "/acme/tiny" not in path,
            "RevisionNotFound": "/revision/" in path and last not in {"main", "v1", COMMIT},
            "GatedRepo": hub.gated,
            "EntryNotFound": "/resolve/" in path and not (hub.folder / last).is_file(),
        }
        code = next((code for code, wrong in codes.items() if wrong), "")
        return (403 if code == "GatedRepo" else 404, {"X-Error-Code": code}) if code else None

    def _listing(self) -> dict[str, Any]:
        files = sorted(path for path in self.hub.folder.rglob("*") if path.is_file())
        return {
            "id": "acme/tiny",
            "modelId": "acme/tiny",
            "sha": COMMIT,
            "private": False,
            "disabled": False,
            "gated": False,
            "tags": [],
            "downloads": 1,
            "likes": 0,
            "cardData": {"license": self.hub.licence} if self.hub.licence else {},
            "siblings": [self._sibling(path) for path in files],
        }

    def _sibling(self, path: Path) -> dict[str, Any]:
        data = path.read_bytes()
        size = self.hub.sizes.get(path.name, len(data))
        found: dict[str, Any] = {"rfilename": str(path.relative_to(self.hub.folder)), "size": size}
        found["blobId"] = git_digest(data)
        if path.name.endswith(LARGE):
            found["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 130}
        return found

    def _file(self, path: Path) -> None:
        data = path.read_bytes()
        large = path.name.endswith(LARGE)
        digest = hashlib.sha256(data).hexdigest() if large else git_digest(data)
        weights = path.suffix == ".safetensors"
        if self.hub.other_bytes and weights:
            data = data[:-4] + b"\1\2\3\4"
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if large:
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        self._send(200, headers, data, cut=self.hub.cut_after if weights else None)

    def _send(self, status: int, headers: dict[str, str], data: bytes, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(data[:cut])
        if cut is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


def git_digest(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
