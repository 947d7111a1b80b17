"""The page of this machine's node: `lutetia status --web`. Read-only, on loopback, behind an address that cannot be guessed."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from lutetia.coordinator.web.app import serve_http
from lutetia.coordinator.web.frontend import node_page_router
from lutetia.coordinator.web.listener import bind, page_address
from lutetia.node.control import ask
from lutetia.system.errors import LutetiaError, UsageError
from lutetia.system.notify import ending_signals

_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'"}
HOSTS = ["127.0.0.1", "localhost"]
"""Names under which a browser may ask: another name that leads to loopback is somebody else's page."""


def node_app(state_folder: Path, secret: str) -> FastAPI:
    """The page below `/SECRET/`, and `/SECRET/api/v1/node`, which asks the daemon of `state_folder` each time."""
    app = FastAPI(title="Lutetia node", docs_url=None, redoc_url=None, openapi_url=None)
    router = APIRouter(prefix=f"/{secret}")

    @router.get("/api/v1/node")
    async def node() -> JSONResponse:
        try:
            status = await ask(state_folder, "status")
            return JSONResponse({"time": time.time(), "status": status, "journal": await _journal(state_folder)}, 200, _HEADERS)
        except LutetiaError as error:
            return JSONResponse({"detail": str(error)}, 503, _HEADERS)

    router.include_router(node_page_router())
    app.include_router(router)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)
    return app


async def _journal(state_folder: Path) -> dict[str, Any] | None:
    """None from a daemon of an earlier version, which keeps none."""
    try:
        return await ask(state_folder, "journal")
    except UsageError:
        return None


async def serve_node_page(state_folder: Path, port: int, on_serving: Callable[[str], None]) -> None:
    """Serve until a signal ends it. `on_serving` gets the address.

    Raises UnreachableError when no daemon runs on `state_folder`, or the port is in use.
    """
    await ask(state_folder, "status")
    listener = bind(f"127.0.0.1:{port}")
    secret = secrets.token_urlsafe(16)
    serving = asyncio.create_task(serve_http(listener, node_app(state_folder, secret)))
    loop, ending = asyncio.get_running_loop(), asyncio.Event()
    for number in ending_signals():
        loop.add_signal_handler(number, ending.set)
    on_serving(f"{page_address(listener)}/{secret}/")
    stopped = asyncio.create_task(ending.wait())
    await asyncio.wait([serving, stopped], return_when=asyncio.FIRST_COMPLETED)
    for task in (serving, stopped):
        task.cancel()
    await asyncio.gather(serving, stopped, return_exceptions=True)
