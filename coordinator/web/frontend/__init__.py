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
    """`/` and its two assets, read once; the entity tag of each is a hash of its bytes."""
    router = APIRouter(include_in_schema=False)
    _add(router, "/", "index.html", "text/html; charset=utf-8")
    for name, media_type in _TYPES.items():
        _add(router, f"/assets/{name}", name, media_type)
    return router


def _add(router: APIRouter, path: str, name: str, media_type: str) -> None:
    data = (BUILT / name).read_bytes()
    compressed = gzip.compress(data, 9, mtime=0)
    tag = f'"{sha256(data).hexdigest()[:32]}"'

    @router.get(path)
    async def asset(request: Request) -> Response:
        headers = {**_HEADERS, "ETag": tag, "Vary": "Accept-Encoding"}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        if takes_gzip(request.headers.get("accept-encoding", "")):
            return Response(compressed, media_type=media_type, headers={**headers, "Content-Encoding": "gzip"})
        return Response(data, media_type=media_type, headers=headers)
