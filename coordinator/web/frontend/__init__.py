"""The run's page: static files that read the web API. `make page` builds them from `src/`; installing Lutetia needs no Node."""

from __future__ import annotations

import gzip
from hashlib import sha256
from pathlib import Path

from fastapi import APIRouter, Request, Response

from lutetia.coordinator.web.api.answers import takes_gzip

BUILT = Path(__file__).parent / "built"
_TYPES = {"app.js": "text/javascript; charset=utf-8", "app.css": "text/css; charset=utf-8", "icon.svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def frontend_router() -> APIRouter:
    """`/` and its assets, read once; the entity tag of each is a hash of its bytes."""
    return _router((BUILT / "index.html").read_bytes())


def node_page_router() -> APIRouter:
    """The same page for one node, of which it reads `api/v1/node`."""
    page = (BUILT / "index.html").read_text()
    start = page.index("The same facts without it")
    page = page[:start] + "In a terminal: <code>lutetia status</code>." + page[page.index("</p></noscript>") :]
    return _router(page.replace("<html ", '<html data-view="node" ', 1).encode())


def _router(page: bytes) -> APIRouter:
    router = APIRouter(include_in_schema=False)
    _add(router, "/", page, "text/html; charset=utf-8")
    for name, media_type in _TYPES.items():
        _add(router, f"/assets/{name}", (BUILT / name).read_bytes(), media_type)
    return router


def _add(router: APIRouter, path: str, data: bytes, media_type: str) -> None:
    compressed = gzip.compress(data, 9, mtime=0)
    tag = f'"{sha256(data).hexdigest()[:32]}"'

    @router.api_route(path, methods=["GET", "HEAD"])
    async def asset(request: Request) -> Response:
        headers = {**_HEADERS, "ETag": tag, "Vary": "Accept-Encoding"}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        if takes_gzip(request.headers.get("accept-encoding", "")):
            return Response(compressed, media_type=media_type, headers={**headers, "Content-Encoding": "gzip"})
        return Response(data, media_type=media_type, headers=headers)
