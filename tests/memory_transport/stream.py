"""Byte streams inside one process, with latency, bandwidth and back-pressure."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from lutetia.protocol.transport.base import Stream

WINDOW = 1 << 20

Link = Callable[[int], tuple[float, float]]
"""size in bytes -> (seconds until the first byte arrives, seconds that the bytes occupy the link)"""


class Pipe:
    """One direction of a stream."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._in_flight: deque[tuple[float, bytes]] = deque()
        self._ready = bytearray()
        self._unread = 0
        self._last_arrival = 0.0
        self._ended: str | None = None
        self._changed: asyncio.Future[None] | None = None

    async def write(self, data: bytes | memoryview) -> None:
        while self._unread >= WINDOW and self._ended is None:
            await self._change()
        if self._ended is not None:
            raise ConnectionError(self._ended)
        latency, busy = self._link(len(data))
        now = asyncio.get_running_loop().time()
        self._last_arrival = max(self._last_arrival, now + latency) + busy
        self._in_flight.append((self._last_arrival, bytes(data)))
        self._unread += len(data)
        self._notify()

    async def read_exactly(self, count: int) -> bytes:
        while len(self._ready) < count:
            if self._in_flight:
                await self._receive()
            elif self._ended is not None:
                raise ConnectionError(f"{self._ended} ({count - len(self._ready)} bytes early)")
            else:
                await self._change()
        data = bytes(self._ready[:count])
        del self._ready[:count]
        self._unread -= count
        self._notify()
        return data

    def end(self, reason: str, lose: bool = False) -> None:
        """Write no more bytes. With `lose`, those on their way are lost too."""
        if self._ended is None:
            self._ended = reason
        if lose:
            self._in_flight.clear()
        self._notify()

    async def _receive(self) -> None:
        """Take the earliest bytes in flight, or wait until they arrive."""
        delay = self._in_flight[0][0] - asyncio.get_running_loop().time()
        if delay > 0:
            await asyncio.sleep(delay)
        else:
            self._ready += self._in_flight.popleft()[1]

    async def _change(self) -> None:
        if self._changed is None or self._changed.done():
            self._changed = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._changed)

    def _notify(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)


class MemoryStream(Stream):
    """One end of a stream to `peer_id`."""

    def __init__(self, peer_id: str, inbound: Pipe, outbound: Pipe) -> None:
        self.peer_id = peer_id
        self._inbound, self._outbound = inbound, outbound
        self.closed = False

    async def read_exactly(self, count: int) -> bytes:
        if self.closed:
            raise ConnectionError("this stream was closed")
        data = await self._inbound.read_exactly(count)
        self.moved = asyncio.get_running_loop().time()
        return data

    async def write(self, data: bytes | memoryview) -> None:
        await self._outbound.write(data)
        self.moved = asyncio.get_running_loop().time()

    async def close(self) -> None:
        self.closed = True
        self._outbound.end("the peer closed the stream")
        self._inbound.end("the peer closed the stream", lose=True)

    def break_(self, reason: str) -> None:
        """Both directions fail at once, as when the peer or the link to it dies."""
        self.closed = True
        self._outbound.end(reason, lose=True)
        self._inbound.end(reason, lose=True)
