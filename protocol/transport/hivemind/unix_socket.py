"""A Unix-socket connection that reads into the caller's memory: one copy per byte, where asyncio streams make three."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

SPARE = 1 << 16
HIGH_WATER = 1 << 18
WRITE_LIMIT = 1 << 20
LINGER = 30.0


class UnixSocket(asyncio.BufferedProtocol):
    """One connection. Bytes that arrive before they are read are buffered up to HIGH_WATER, then the other side has to wait.

    One task at a time may read, and one may write. After a cancelled read, later reads raise ConnectionError.
    """

    def __init__(self, on_connect: Callable[[UnixSocket], None] | None = None) -> None:
        self._on_connect = on_connect
        self._transport: asyncio.Transport | None = None
        self._spare = memoryview(bytearray(SPARE))
        self._buffer = bytearray()
        self._target: memoryview | None = None
        self._filled = 0
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None
        self._reading_paused = False
        self._ended: str | None = None
        self._lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self._transport = transport  # type: ignore[assignment]  # uvloop's transports are not subclasses of asyncio's
        self._wire.set_write_buffer_limits(high=WRITE_LIMIT)
        if self._on_connect:
            self._on_connect(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._spare if self._target is None else self._target[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        if self._target is not None:
            self._filled += nbytes
            if self._filled == len(self._target):
                self._target = None
                _wake(self._reader)
            return
        self._buffer += self._spare[:nbytes]
        if len(self._buffer) > HIGH_WATER and not self._reading_paused:
            self._reading_paused = True
            self._wire.pause_reading()

    def eof_received(self) -> bool:
        self._end("the peer ended the stream")
        return True  # we may still write

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._end(f"the stream broke ({exc})" if exc else "the stream is closed")
        _wake(self._writer)

    def pause_writing(self) -> None:
        self._writer = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        _wake(self._writer)
        self._writer = None

    async def read_exactly(self, count: int) -> bytes:
        """Raises ConnectionError when the stream ends before."""
        data = bytearray(count)
        await self.read_into(memoryview(data))
        return bytes(data)

    async def read_into(self, target: memoryview) -> None:
        """Fill `target`. Raises ConnectionError when the stream ends before."""
        have = min(len(self._buffer), len(target))
        target[:have] = memoryview(self._buffer)[:have]
        del self._buffer[:have]
        if have == len(target):
            return
        if self._ended is not None:
            raise ConnectionError(f"{self._ended}, {len(target) - have} bytes early")
        self._target, self._filled = target, have
        self._reader = asyncio.get_running_loop().create_future()
        if self._reading_paused:
            self._reading_paused = False
            self._wire.resume_reading()
        try:
            await self._reader
        except asyncio.CancelledError:
            self._end("a read was cancelled before")
            raise
        finally:
            self._target = None
        if self._filled < len(target):
            raise ConnectionError(f"{self._ended}, {len(target) - self._filled} bytes early")

    async def write(self, data: bytes | memoryview) -> None:
        """Send `data`. Waits while more than WRITE_LIMIT bytes are buffered. Raises ConnectionError when it is gone."""
        if self.closed:
            raise ConnectionError(self._ended or "the stream is closed")
        self._wire.write(data)
        if self._writer is not None:
            await asyncio.shield(self._writer)
            if self._lost:
                raise ConnectionError(self._ended or "the stream is closed")

    def close(self) -> None:
        """Close. Buffered bytes are still sent, for up to LINGER seconds. Idempotent."""
        if self.closed:
            return
        if self._wire.get_write_buffer_size():
            asyncio.get_running_loop().call_later(LINGER, self._wire.abort)
        self._wire.close()

    @property
    def closed(self) -> bool:
        """Whether this side has closed it, or it is gone."""
        return self._lost or self._wire.is_closing()

    @property
    def _wire(self) -> asyncio.Transport:
        assert self._transport is not None
        return self._transport

    def _end(self, reason: str) -> None:
        self._ended = self._ended or reason
        _wake(self._reader)


def _wake(future: asyncio.Future[None] | None) -> None:
    if future is not None and not future.done():
        future.set_result(None)
