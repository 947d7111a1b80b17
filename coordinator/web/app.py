"""An optional HTTP server beside the libp2p services: status, metrics and blobs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse, PlainTextResponse, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from lutetia.coordinator.web.api.answers import RequestLimit, document_pieces
from lutetia.coordinator.web.api.routes import api_router, disk_free
from lutetia.coordinator.web.api.source import RunSource
from lutetia.coordinator.web.connections import (
    BACKLOG,
    LIMITS,
    HttpLimits,
    LimitedConfig,
    LimitedProtocol,
    end_overdue,
    origin_of_host,
)
from lutetia.coordinator.web.frontend import frontend_router
from lutetia.coordinator.web.metrics import ServerFacts, metrics_text
from lutetia.coordinator.web.page import render_page
from lutetia.coordinator.web.rendered import Rendered
from lutetia.coordinator.web.request_pace import RequestPace
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.blobs.upload_limit import AnswerSlots, RateLimit
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.status import SwarmStatus

_log = logging.getLogger(__name__)

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SAFE = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


API_VERSION = "1.0.0"


def build_app(
    produce: Callable[[], SwarmStatus],
    blobs: BlobStore,
    rate: RateLimit,
    source: RunSource | None = None,
    limit: RequestLimit | None = None,
) -> FastAPI:
    """The read-only routes `/`, `/plain`, `/status.json`, `/metrics`, `/blobs/{digest}` (with ranges) and those below `/api/v1`.

    Args:
        produce: makes the status document of a request. Equal documents are rendered once.
        blobs: what `/blobs` serves.
        rate: limit of the bytes per second that `/blobs` sends, shared with the coordinator's other streams.
        source: the run that `/` and `/api/v1` show; None: `/` is the page without scripts.
        limit: of the requests of one origin to `/api/v1`; None: the usual one.
    """
    app = FastAPI(
        title="Lutetia coordinator", version=API_VERSION, docs_url=None, redoc_url=None,
        openapi_url="/api/v1/openapi.json" if source else None,
    )  # fmt: skip
    app.add_middleware(RequestPace, rate=rate)
    slots = AnswerSlots(max(1, rate.answers_at_once // 2))
    pages, texts = Rendered(produce, _page), Rendered(produce, canonical)
    metrics = Rendered(produce, lambda status: metrics_text(status, _server_facts(rate, source)))

    @app.get("/plain", include_in_schema=False)
    async def plain_page() -> StreamingResponse:
        return _document(pages.latest(), "text/html; charset=utf-8")

    @app.get("/status.json", include_in_schema=False)
    async def status() -> StreamingResponse:
        return _document(texts.latest(), "application/json")

    @app.get("/metrics", include_in_schema=False)
    async def prometheus() -> StreamingResponse:
        if source:
            await source.up_to_date()
        return _document(metrics.latest(), "text/plain; version=0.0.4; charset=utf-8")

    @app.head("/blobs/{digest}", include_in_schema=False)
    @app.get("/blobs/{digest}", response_class=FileResponse, responses={404: {"description": "There is no such blob here"}})
    async def blob(digest: str) -> FileResponse:
        """Send a blob by its digest. Answers a range with status 206. A client checks the bytes by the blob's chunk hashes."""
        if not _DIGEST.fullmatch(digest) or not blobs.has(digest):
            raise HTTPException(404, "this coordinator does not have the blob")
        headers = {"Cache-Control": "public, max-age=31536000, immutable", "ETag": f'"{digest}"'}
        return _LimitedFile(blobs.path(digest), media_type="application/octet-stream", headers=headers).within(slots, rate)

    if source is None:
        app.add_api_route("/", plain_page, include_in_schema=False)
    else:
        app.include_router(api_router(source, limit))
        app.include_router(frontend_router())
    return app


def _server_facts(rate: RateLimit, source: RunSource | None) -> ServerFacts:
    if source is None:
        return ServerFacts(rate.taken)
    return ServerFacts(
        rate.taken, source.history, source.manifest().expires, disk_free(source.folder.root), len(source.bootstrap()),
        source.process,
    )  # fmt: skip


def _page(status: SwarmStatus) -> bytes:
    return render_page(status).encode()


def _document(data: bytes, media_type: str) -> StreamingResponse:
    headers = {**_SAFE, "Content-Length": str(len(data))}
    return StreamingResponse(document_pieces(data), media_type=media_type, headers=headers)


class _LimitedFile(FileResponse):
    """A file that is sent in its turn and within a rate."""

    def within(self, slots: AnswerSlots, rate: RateLimit) -> _LimitedFile:
        self._slots, self._rate = slots, rate
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def paced(message: Message) -> None:
            if body := message.get("body"):
                await self._rate.take(len(body))
            await send(message)

        origin = origin_of_host((scope["client"] or ("",))[0])
        slot = await self._slots.take(origin, may_end=False)
        if slot is None:
            await PlainTextResponse("too many blobs are being sent; try again later", 503)(scope, receive, send)
            return
        try:
            await super().__call__(scope, receive, paced)
        finally:
            self._slots.give_back(slot)


class _LimitedServer(uvicorn.Server):
    """A server that ends overdue connections and leaves the process's signals to the coordinator."""

    async def on_tick(self, counter: int) -> bool:
        end_overdue(self.server_state.connections, asyncio.get_running_loop().time())
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve_http(listener: socket.socket, app: FastAPI, limits: HttpLimits = LIMITS) -> None:
    """Serve within `limits` until cancelled."""
    config = LimitedConfig(
        app, http=LimitedProtocol, ws="none", log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1,
        backlog=BACKLOG,
    )  # fmt: skip
    config.limits = limits
    server = _LimitedServer(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await asyncio.shield(serving)
    except asyncio.CancelledError:
        server.should_exit = True
        await serving
        raise
    finally:
        listener.close()
