"""Answers of the web API: entity tags, compression that is done once, and a limit on requests per origin."""

from __future__ import annotations

import gzip
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from lutetia.coordinator.web.connections import origin_of_host
from lutetia.protocol.schema.canonical import Frozen

REQUESTS_PER_SECOND = 20.0
BURST = 200
"""Requests that one origin may make at once."""
_MOST_ORIGINS = 4096
_PIECE = 65536
_KEPT = 512
_COMPRESS_FROM = 1024
SAFE = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'", "Cache-Control": "no-cache"}


@dataclass
class _Bucket:
    left: float
    at: float


async def document_pieces(data: bytes) -> AsyncIterator[bytes]:
    """`data` in pieces, so that a slow client holds no more than one of them in memory."""
    for start in range(0, len(data), _PIECE):
        yield data[start : start + _PIECE]


class RequestLimit:
    """A token bucket per origin (an IPv4 address or an IPv6 /64). `clock` gives seconds that never go back."""

    def __init__(self, clock: Callable[[], float], rate: float = REQUESTS_PER_SECOND, burst: int = BURST) -> None:
        self._clock, self._rate, self._burst = clock, rate, burst
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, origin: str) -> bool:
        """Whether a request of `origin` may be answered now."""
        now = self._clock()
        bucket = self._buckets.pop(origin, None) or _Bucket(self._burst, now)
        bucket.left, bucket.at = min(self._burst, bucket.left + (now - bucket.at) * self._rate), now
        self._buckets[origin] = bucket
        if len(self._buckets) > _MOST_ORIGINS:
            self._buckets.popitem(last=False)
        if bucket.left < 1:
            return False
        bucket.left -= 1
        return True


class Answers:
    """Renders documents as JSON, once for each address and entity tag however many ask, and compresses them once."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[str, bytes, bytes | None]] = OrderedDict()

    def answer(self, request: Request, tag: str, build: Callable[[], Frozen]) -> Response:
        """The document that `build` makes, or 304 if the client has it.

        Args:
            request: its path and query name the document.
            tag: changes whenever the document does.
            build: makes the document.
        """
        tag = f'W/"{tag}"'
        headers = {**SAFE, "ETag": tag, "Vary": "Accept-Encoding"}
        if tag in [given.strip() for given in request.headers.get("if-none-match", "").split(",")]:
            return Response(status_code=304, headers=headers)
        plain, small = self._rendered(f"{request.url.path}?{request.url.query}", tag, build)
        data = plain
        if small is not None and takes_gzip(request.headers.get("accept-encoding", "")):
            data, headers["Content-Encoding"] = small, "gzip"
        headers["Content-Length"] = str(len(data))
        return StreamingResponse(document_pieces(data), media_type="application/json", headers=headers)

    def _rendered(self, address: str, tag: str, build: Callable[[], Frozen]) -> tuple[bytes, bytes | None]:
        kept = self._kept.pop(address, None)
        if kept is None or kept[0] != tag:
            plain = build().model_dump_json().encode()
            kept = tag, plain, gzip.compress(plain, 5, mtime=0) if len(plain) >= _COMPRESS_FROM else None
        self._kept[address] = kept
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return kept[1], kept[2]


def takes_gzip(accepted: str) -> bool:
    """Whether an Accept-Encoding header allows gzip."""
    for part in accepted.split(","):
        coding, _, quality = part.strip().partition(";")
        if coding.strip() in ("gzip", "*"):
            return quality.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False


def origin_of(request: Request) -> str:
    """The network that a request comes from."""
    return origin_of_host(request.client.host if request.client else "")
