"""A hub on loopback that speaks as much of the Hugging Face hub's HTTP API as uploads and downloads of a repository need."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

FilesByName = dict[str, bytes]


class FakeHub:
    """Repositories in memory: each has one branch, `main`, and a commit that is the hash of its files."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.repositories: dict[str, FilesByName] = {}
        self.messages: list[str] = []
        self.requests: list[str] = []

    def commit(self, name: str) -> str:
        files = self.repositories[name]
        return hashlib.sha1(b"".join(key.encode() + hashlib.sha1(files[key]).digest() for key in sorted(files))).hexdigest()

    def post(self, path: str, body: bytes) -> Any:
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.repositories.setdefault(name, {})
            return {"url": f"{self.address}/{name}", "name": name}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        name, _, verb = path.removeprefix("/api/models/").partition("/preupload/" if "/preupload/" in path else "/commit/")
        if "/preupload/" in path:
            return {
                "files": [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]
                ]
            }
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                self.messages.append(line["value"]["summary"])
            if line["key"] == "file":
                self.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        oid = self.commit(name)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.address}/{name}/commit/{oid}", "hookOutput": ""}

    def info(self, path: str) -> Any:
        """Of a repository, or of its files."""
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if name not in self.repositories:
            return None
        files, sha = self.repositories[name], self.commit(name)
        if "/tree/" in path:
            return [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for file, data in sorted(files.items())
            ]
        return {"_id": "0", "id": name, "modelId": name, "sha": sha, "private": False, "tags": [], "downloads": 0, "likes": 0,
                "siblings": [{"rfilename": file} for file in sorted(files)]}  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, document: Any) -> None:
        found = document is not None
        headers = {"Content-Type": "application/json"} | ({} if found else {"X-Error-Code": "RepoNotFound"})
        body = document if found else {"error": "Repository not found"}
        self._answer(200 if found else 404, json.dumps(body).encode(), headers)

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"POST {path}")
        length = self.headers.get("Content-Length")
        self._json(self.hub.post(path, self.rfile.read(int(length)) if length else self._chunks()))

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if path.startswith("/api/models/"):
            self._json(self.hub.info(path))
            return
        name, _, rest = path.strip("/").partition("/resolve/")
        data = self.hub.repositories.get(name, {}).get(rest.partition("/")[2])
        if data is None:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound" if name in self.hub.repositories else "RepoNotFound"})
            return
        self._answer(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": self.hub.commit(name)})

    do_HEAD = do_GET


@contextlib.contextmanager
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that huggingface_hub talks to inside the block. It listens on loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {}))
    hub = server.RequestHandlerClass.hub = FakeHub(f"http://127.0.0.1:{server.server_port}")  # pyright: ignore[reportFunctionMemberAccess]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}")
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
