"""The stream `/lutetia/blob/1`. One stream carries any number of requests, one after another.

    request   32 bytes digest, 4 bytes first chunk, 4 bytes count (0: the chunk table)
    answer    1 byte status, 8 bytes length, that many bytes
    receiver  1 byte, once everything has arrived

All numbers are big-endian. The receiver knows the length of each answer from the size of the blob.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, aclosing, nullcontext

from lutetia.protocol.blobs.chunk_table import CHUNK, HASH, chunk_count
from lutetia.protocol.blobs.store import BlobMissing, BlobStore
from lutetia.protocol.blobs.upload_limit import PIECE, STALL_TIMEOUT, AnswerSlot, AnswerSlots, RateLimit
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.transport.base import Stream
from lutetia.protocol.transport.network_origin import prefix_of

BLOB = "/lutetia/blob/1"
OK, ABSENT, BUSY, MALFORMED, BANNED = range(5)
ACK = b"\x06"
REQUEST_BYTES = 40
ANSWER_BYTES = 9

MAX_STREAMS_PER_PEER = 8
MAX_STREAMS_PER_PREFIX = 32
IDLE_TIMEOUT = 60.0


Room = Callable[[str, int], AbstractContextManager[bool]]
"""(peer id, bytes) -> whether they may be sent to it; they are kept for it until the block ends."""


def unlimited(peer_id: str, count: int) -> AbstractContextManager[bool]:
    """The `Room` of a peer that counts no bytes."""
    return nullcontext(True)


class BlobRefused(ConnectionError):
    """The provider refused the request; `status` is the reason."""

    def __init__(self, status: int) -> None:
        reasons = {ABSENT: "does not hold it", BUSY: "is busy", MALFORMED: "does not understand the request",
            BANNED: "serves nothing to this peer, which the run's owner has banned",
        }  # fmt: skip
        super().__init__(reasons.get(status, f"answered with status {status}"))
        self.status = status


class BlobServer:
    """Answers blob streams from a store.

    Args:
        store: what every peer may fetch.
        rate: over all streams.
        lent: the store of a blob that the peer of this id may fetch although others may not; None: it may not.
        banned: whether the run's owner has banned the peer of this id.
        room: whether so many bytes may be sent to the peer of this id: an answer is sent whole or not at all.
    """

    def __init__(
        self, store: BlobStore, rate: RateLimit, lent: Callable[[str, str], BlobStore | None] = lambda peer_id, digest: None,
        banned: Callable[[str], bool] = lambda peer_id: False, room: Room = unlimited,
    ) -> None:  # fmt: skip
        self._store, self._rate, self._lent, self._banned, self._room = store, rate, lent, banned, room
        self._streams: Counter[str] = Counter()
        self._prefixes: Counter[str] = Counter()
        self._turns = AnswerSlots(rate.answers_at_once, rate.bytes_per_second)

    async def answer(self, stream: Stream) -> None:
        """The stream handler. Answers requests until the peer closes or stalls; refuses a peer with too many streams."""
        peer, prefix = stream.peer_id, prefix_of(stream.origin)
        crowded = self._streams[peer] >= MAX_STREAMS_PER_PEER or self._prefixes[prefix] >= MAX_STREAMS_PER_PREFIX
        if crowded or self._banned(peer):
            async with asyncio.timeout(STALL_TIMEOUT):  # closing on an unread request resets the stream and loses the answer
                await stream.read_exactly(REQUEST_BYTES)
            await _refuse(stream, BUSY if crowded else BANNED)
            return
        self._streams[peer] += 1
        self._prefixes[prefix] += 1
        try:
            while await self._answer_one(stream):
                pass
        finally:
            self._streams[peer] -= 1
            self._prefixes[prefix] -= 1
            self._streams += Counter()  # forget peers without a stream
            self._prefixes += Counter()

    async def _answer_one(self, stream: Stream) -> bool:
        async with asyncio.timeout(IDLE_TIMEOUT):
            try:
                request = await stream.read_exactly(1)
            except ConnectionError:
                return False  # the client closes between two requests
            request += await stream.read_exactly(REQUEST_BYTES - 1)
        digest, first, count = request[:32].hex(), int.from_bytes(request[32:36], "big"), int.from_bytes(request[36:], "big")
        store = self._lent(stream.peer_id, digest) or self._store
        try:
            size = store.path(digest).stat().st_size
        except (BlobMissing, FileNotFoundError):
            await _refuse(stream, ABSENT)
            return False
        if count and first + count > chunk_count(size):
            await _refuse(stream, MALFORMED)
            return False
        length = min(size, (first + count) * CHUNK) - first * CHUNK if count else HASH * chunk_count(size)
        with self._room(stream.peer_id, length) as allowed:
            slot = await self._turns.take(stream.origin) if allowed else None
            if slot is None:
                await _refuse(stream, BUSY)
                return False
            try:
                if count == 0:
                    await self._send_table(stream, slot, store, digest)
                else:
                    await self._send_chunks(stream, slot, store, digest, length, first, count)
            finally:
                self._turns.give_back(slot)
        async with asyncio.timeout(STALL_TIMEOUT):
            return await stream.read_exactly(1) == ACK

    async def _send_table(self, stream: Stream, slot: AnswerSlot, store: BlobStore, digest: str) -> None:
        hashes = store.table(digest).hashes
        await stream.write(bytes([OK]) + len(hashes).to_bytes(8, "big"))
        await self._send(stream, slot, hashes)

    async def _send_chunks(
        self, stream: Stream, slot: AnswerSlot, store: BlobStore, digest: str, length: int, first: int, count: int
    ) -> None:
        await stream.write(bytes([OK]) + length.to_bytes(8, "big"))
        async with aclosing(self._read_ahead(store, digest, first, count)) as chunks:
            async for chunk in chunks:
                await self._send(stream, slot, chunk)

    async def _read_ahead(self, store: BlobStore, digest: str, first: int, count: int) -> AsyncGenerator[bytes]:
        """Read chunk n+1 from disk in a thread while chunk n is sent."""
        coming = asyncio.ensure_future(asyncio.to_thread(store.read_chunk, digest, first))
        try:
            for index in range(first + 1, first + count + 1):
                chunk = await coming
                if index < first + count:
                    coming = asyncio.ensure_future(asyncio.to_thread(store.read_chunk, digest, index))
                yield chunk
        finally:
            coming.cancel()

    async def _send(self, stream: Stream, slot: AnswerSlot, data: bytes) -> None:
        view = memoryview(data)
        for start in range(0, len(view), PIECE):
            piece = view[start : start + PIECE]
            await self._rate.take(len(piece))
            async with asyncio.timeout(STALL_TIMEOUT):
                await stream.write(piece)
            slot.sent += len(piece)


class BlobClient:
    """The asking side of one stream. Methods raise ConnectionError: refused, cut, stalled, or a wrong length."""

    def __init__(self, stream: Stream, ref: BlobRef) -> None:
        self._stream, self._ref = stream, ref
        self._owed = b""

    async def table(self) -> bytes:
        """Fetch the chunk hashes, which are not verified here."""
        await self._ask(0, 0, HASH * chunk_count(self._ref.size))
        data = bytearray(HASH * chunk_count(self._ref.size))
        await self.read_into(memoryview(data))
        self._owed = ACK
        return bytes(data)

    async def ask_chunks(self, first: int, count: int) -> None:
        """Request chunks. Then call `read_into` for each of them, and `finished`."""
        await self._ask(first, count, min(self._ref.size, (first + count) * CHUNK) - first * CHUNK)

    def finished(self) -> None:
        """Note that all requested chunks have been read. The ACK goes out with the next request or with `close`."""
        self._owed = ACK

    async def read_into(self, target: memoryview) -> None:
        """Read the next bytes of the answer. No PIECE may take longer than STALL_TIMEOUT."""
        try:
            for start in range(0, len(target), PIECE):
                async with asyncio.timeout(STALL_TIMEOUT):
                    await self._stream.read_into(target[start : start + PIECE])
        except TimeoutError as error:
            raise ConnectionError(f"stalled for {STALL_TIMEOUT:.0f} s") from error

    async def close(self) -> None:
        """Send an ACK that is still owed and end the stream."""
        try:
            if self._owed:
                async with asyncio.timeout(STALL_TIMEOUT):
                    await self._stream.write(self._owed)
        finally:
            await self._stream.close()

    async def _ask(self, first: int, count: int, expected: int) -> None:
        request = bytes.fromhex(self._ref.digest) + first.to_bytes(4, "big") + count.to_bytes(4, "big")
        owed, self._owed = self._owed, b""
        await self._stream.write(owed + request)
        header = bytearray(ANSWER_BYTES)
        await self.read_into(memoryview(header))
        if header[0] != OK:
            raise BlobRefused(header[0])
        if (length := int.from_bytes(header[1:], "big")) != expected:
            raise ConnectionError(f"announced {length} bytes instead of {expected}")


async def _refuse(stream: Stream, status: int) -> None:
    async with asyncio.timeout(STALL_TIMEOUT):
        await stream.write(bytes([status]) + bytes(8))
        await stream.read_exactly(1)
