"""Messages on streams: a length of four bytes, big-endian, then that many bytes. The reader sets the longest length."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from lutetia.protocol.transport.base import Stream

LENGTH = 4


def framed(data: bytes) -> bytes:
    return len(data).to_bytes(LENGTH, "big") + data


async def read_framed(read_exactly: Callable[[int], Awaitable[bytes]], limit: int) -> bytes:
    """Read the next message. Raises ConnectionError before reading any of it when it is longer than `limit` bytes."""
    size = int.from_bytes(await read_exactly(LENGTH), "big")
    if size > limit:
        raise ConnectionError(f"a message of {size} bytes is larger than {limit}; refused")
    return await read_exactly(size)


async def write_message(stream: Stream, data: bytes) -> None:
    await stream.write(framed(data))


async def read_message(stream: Stream, limit: int) -> bytes:
    """Raises ConnectionError when the message is longer than `limit` bytes or the stream ends within it."""
    return await read_framed(stream.read_exactly, limit)
