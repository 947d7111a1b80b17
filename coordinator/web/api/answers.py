"""Answers of the web API: entity tags, compression that is done once, and limits on what one origin may cost.

A query is free to write and a document costs time and memory. So the processor time of a document is charged to who had it made,
unknown parameters name no document of their own, and what is kept or being sent is bounded in bytes.
"""

from __future__ import annotations

import asyncio
import gzip
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from fastapi import HTTPException
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from lutetia.coordinator.web.api.histories.pieces import Piece, gzip_of
from lutetia.coordinator.web.connections import origin_of_host
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.transport.network_origin import quotas_of

REQUESTS_PER_SECOND = 20.0
BURST = 200
"""Requests that one origin may make at once."""
REQUESTS_OF_A_SECOND = 200.0
"""A second of processor time costs as much as so many requests: in the long run one origin gets a tenth of a processor."""
_MOST_ORIGINS = 4096
_PIECE = 65536
_KEPT = 512
KEPT_BYTES = 64 << 20
"""Documents that are kept take at most so much memory, and the newest."""
SENT_BYTES = 256 << 20
"""No document is begun while others that are being sent take more memory."""
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
    """A token bucket per origin (an IPv4 address or an IPv6 /64), and one four times as large per prefix around it.

    `clock` gives seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float], rate: float = REQUESTS_PER_SECOND, burst: int = BURST) -> None:
        self._clock, self._rate, self._burst = clock, rate, burst
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, origin: str) -> bool:
        """Whether a request of `origin` may be answered now."""
        if self.exhausted(origin):
            return False
        for name, share in quotas_of(origin):
            self._bucket(name, share).left -= 1
        return True

    def exhausted(self, origin: str) -> bool:
        """Whether `origin` has used up what it may cost now."""
        return any(self._bucket(name, share).left < 1 for name, share in quotas_of(origin))

    def charge(self, origin: str, seconds: float) -> None:
        """Count processor time that a request of `origin` has taken, besides the request itself."""
        for name, share in quotas_of(origin):
            self._bucket(name, share).left -= REQUESTS_OF_A_SECOND * seconds

    def _bucket(self, name: str, share: int) -> _Bucket:
        now, most = self._clock(), share * self._burst
        bucket = self._buckets.pop(name, None) or _Bucket(most, now)
        bucket.left, bucket.at = min(most, bucket.left + (now - bucket.at) * share * self._rate), now
        self._buckets[name] = bucket
        if len(self._buckets) > _MOST_ORIGINS:
            self._buckets.popitem(last=False)
        return bucket


@dataclass
class _Sending:
    """The documents that are being sent. One that several clients get counts once."""

    bytes: int = 0
    _receivers: dict[int, int] = field(default_factory=dict)

    def fits(self, data: bytes) -> bool:
        return id(data) in self._receivers or self.bytes == 0 or self.bytes + len(data) <= SENT_BYTES

    async def pieces(self, data: bytes) -> AsyncIterator[bytes]:
        self.bytes += 0 if id(data) in self._receivers else len(data)
        self._receivers[id(data)] = self._receivers.get(id(data), 0) + 1
        try:
            async for piece in document_pieces(data):
                yield piece
        finally:
            self._receivers[id(data)] -= 1
            if not self._receivers[id(data)]:
                del self._receivers[id(data)]
                self.bytes -= len(data)


@dataclass(frozen=True)
class _Document:
    """A rendered document: as it is (None: nobody has asked for that) and compressed (None: it is too small)."""

    tag: str
    plain: bytes | None
    small: bytes | None


class Answers:
    """Renders documents as JSON, once for each address and entity tag however many ask, and compresses them once.

    Args:
        limit: is charged for what documents cost.
        clock: seconds of processor time.
    """

    def __init__(self, limit: RequestLimit, clock: Callable[[], float] = time.thread_time) -> None:
        self._limit, self._clock, self._sending = limit, clock, _Sending()
        self._kept: OrderedDict[str, _Document] = OrderedDict()
        self.kept_bytes = 0
        self._rendering = asyncio.Lock()

    async def answer_pieces(self, request: Request, tag: str, build: Callable[[], Sequence[Piece] | None]) -> Response:
        """As `answer`, for a document of megabytes. `build` makes its pieces; None: it made some and is to be called again.

        Others are answered in between, and documents are made one at a time.
        """
        address, seconds = _address(request), 0.0
        if _has(request, tag):
            return Response(status_code=304, headers=_headers(tag))
        async with self._rendering:
            kept = self._kept.get(address)
            if kept is None or kept.tag != tag:
                pieces = None
                while pieces is None:
                    began = self._clock()
                    pieces = build()
                    small = gzip_of(pieces) if pieces is not None else b""
                    seconds += self._clock() - began
                    await asyncio.sleep(0)
                kept = _Document(tag, None, small)
            if kept.plain is None and not takes_gzip(request.headers.get("accept-encoding", "")):
                kept = _Document(tag, await asyncio.to_thread(gzip.decompress, kept.small or b""), kept.small)
            self._keep(address, kept)
        self._limit.charge(origin_of(request), seconds)
        return self._sent(request, kept)

    def answer(self, request: Request, tag: str, build: Callable[[], Frozen]) -> Response:
        """The document that `build` makes, or 304 if the client has it.

        Args:
            request: its path and the parameters that its route knows name the document.
            tag: changes whenever the document does.
            build: makes the document.

        Raises HTTPException 503: too much is being sent already.
        """
        if _has(request, tag):
            return Response(status_code=304, headers=_headers(tag))
        began, address = self._clock(), _address(request)
        kept = self._kept.get(address)
        if kept is None or kept.tag != tag:
            plain = build().model_dump_json().encode()
            kept = _Document(tag, plain, gzip.compress(plain, 5, mtime=0) if len(plain) >= _COMPRESS_FROM else None)
        self._keep(address, kept)
        self._limit.charge(origin_of(request), self._clock() - began)
        return self._sent(request, kept)

    def _sent(self, request: Request, kept: _Document) -> Response:
        headers, data = _headers(kept.tag), kept.plain
        if kept.small is not None and takes_gzip(request.headers.get("accept-encoding", "")):
            data, headers["Content-Encoding"] = kept.small, "gzip"
        assert data is not None
        if not self._sending.fits(data):
            raise HTTPException(503, "too many clients read large documents; try again later", {"Retry-After": "30"})
        headers["Content-Length"] = str(len(data))
        return StreamingResponse(self._sending.pieces(data), media_type="application/json", headers=headers)

    def _keep(self, address: str, kept: _Document) -> None:
        self.kept_bytes -= _size(self._kept.pop(address, None))
        self._kept[address] = kept
        self.kept_bytes += _size(kept)
        while len(self._kept) > _KEPT or (self.kept_bytes > KEPT_BYTES and len(self._kept) > 1):
            self.kept_bytes -= _size(self._kept.popitem(last=False)[1])


def _headers(tag: str) -> dict[str, str]:
    return {**SAFE, "ETag": f'W/"{tag}"', "Vary": "Accept-Encoding"}


def _has(request: Request, tag: str) -> bool:
    """Whether the client has the document with this tag, by the weak comparison (RFC 9110, section 13.1.2)."""
    given = {each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")}
    return "*" in given or f'"{tag}"' in given


def _size(kept: _Document | None) -> int:
    return len(kept.plain or b"") + len(kept.small or b"") if kept else 0


def _address(request: Request) -> str:
    """The path, and the parameters that the route knows: others could give one document any number of addresses."""
    route = request.scope.get("route")
    known = sorted(given.alias for given in route.dependant.query_params) if isinstance(route, APIRoute) else ()
    return f"{request.url.path}?{'&'.join(f'{name}={request.query_params.get(name)}' for name in known)}"


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
