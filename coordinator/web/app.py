"""An optional HTTP server beside the libp2p services: status, metrics and blobs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse, HTMLResponse, Response

from lutetia.coordinator.web.metrics import metrics_text
from lutetia.coordinator.web.page import render_page
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.status import SwarmStatus
from lutetia.system.errors import ConfigError, UnreachableError

_log = logging.getLogger(__name__)

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SAFE = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def build_app(produce: Callable[[], SwarmStatus], blobs: BlobStore) -> FastAPI:
    """The read-only routes `/`, `/status.json`, `/metrics` and `/blobs/{digest}` (with ranges).

    `produce` makes the status document of a request.
    """
    app = FastAPI(title="Lutetia coordinator", docs_url=None, redoc_url=None, openapi_url=None)
    metrics = metrics_text(produce)

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(render_page(produce()), headers=_SAFE)

    @app.get("/status.json")
    async def status() -> Response:
        return Response(canonical(produce()), media_type="application/json", headers=_SAFE)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics(), media_type="text/plain; version=0.0.4; charset=utf-8", headers=_SAFE)

    @app.get("/blobs/{digest}")
    async def blob(digest: str) -> FileResponse:
        if not _DIGEST.fullmatch(digest) or not blobs.has(digest):
            raise HTTPException(404, "this coordinator does not have the blob")
        headers = {"Cache-Control": "public, max-age=31536000, immutable", "ETag": f'"{digest}"'}
        return FileResponse(blobs.path(digest), media_type="application/octet-stream", headers=headers)

    return app


class _QuietServer(uvicorn.Server):
    """A server that leaves the process's signals to the coordinator."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(address: str) -> socket.socket:
    """Listen on `host:port`.

    Raises:
        ConfigError: `address` is malformed.
        UnreachableError: the port is in use, or the host is not an address of this machine.
    """
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname or "127.0.0.1", parts.port or 0
    except ValueError as error:
        raise ConfigError(f"the HTTP address {address} has no port between 0 and 65535; correct it") from error
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        reason = (error.strerror or str(error)).lower()
        raise UnreachableError(f"cannot serve HTTP on {address}: {reason}; choose another port or stop its user") from error
    return listener


async def serve_http(listener: socket.socket, app: FastAPI) -> None:
    """Serve until cancelled."""
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1)
    server = _QuietServer(config)
    _log.info("HTTP on http://%s:%d", *listener.getsockname()[:2])
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await asyncio.shield(serving)
    except asyncio.CancelledError:
        server.should_exit = True
        await serving
        raise
    finally:
        listener.close()
