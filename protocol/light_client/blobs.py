"""Fetch blobs without joining the swarm: py-libp2p against `/lutetia/blob/1`, every chunk verified on arrival."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import trio

from lutetia.protocol.blobs.chunk_table import HASH, ChunkTable, chunk_count
from lutetia.protocol.light_client.dial import LightStream, dial
from lutetia.protocol.schema.manifest import BlobRef
from lutetia.protocol.schema.ticket import Ticket
from lutetia.system.errors import IntegrityError, LutetiaError, UnreachableError
from lutetia.system.files import atomic_path

BLOB = "/lutetia/blob/1"
_ACK, _OK = b"\x06", 0
_BATCH = 8  # chunks asked for at once
_PIECE = 1 << 18

OnBytes = Callable[[int, int], None]
"""(bytes arrived, bytes in all)"""


def fetch_blobs(ticket: Ticket, files: Mapping[Path, BlobRef], timeout: float = 20.0, on_bytes: OnBytes | None = None) -> None:
    """Fetch blobs from the first of the ticket's peers that has all of them. Files are whole or absent.

    Args:
        ticket: The peers to ask.
        files: Which blob goes into which file.
        timeout: Seconds without progress after which a peer counts as failed.
        on_bytes: Called with (bytes arrived, bytes in all).

    Raises UnreachableError (no peer serves them; the text names each address with its reason), IntegrityError (all bytes served
    were wrong) or DiskError.
    """
    failures: dict[str, LutetiaError | str] = {}
    trio.run(_fetch_from_any, ticket.addresses, dict(files), timeout, on_bytes or (lambda done, total: None), failures)
    if len(failures) == len(ticket.addresses):
        reasons = "; ".join(f"{address}: {reason}" for address, reason in failures.items())
        problem = IntegrityError if all(isinstance(reason, IntegrityError) for reason in failures.values()) else UnreachableError
        raise problem(f"no peer of the ticket could serve the files ({reasons}); try again later")


async def _fetch_from_any(
    addresses: tuple[str, ...], files: dict[Path, BlobRef], patience: float, on_bytes: OnBytes, failures: dict[str, Any]
) -> None:
    for address in addresses:
        try:
            await _Session(patience, on_bytes).fetch(address, files)
            return
        except (UnreachableError, IntegrityError) as error:
            failures[address] = error
        except ConnectionError as error:
            failures[address] = str(error)


class _Session:
    """Transfers from one peer."""

    def __init__(self, timeout: float, on_bytes: OnBytes) -> None:
        self._timeout, self._on_bytes = timeout, on_bytes
        self._done = self._total = 0

    async def fetch(self, address: str, files: dict[Path, BlobRef]) -> None:
        self._total = sum(ref.size for ref in files.values())
        try:
            with trio.fail_after(self._timeout) as limit:
                async with dial(address) as connection:
                    stream = await connection.open_stream(BLOB)
                    limit.deadline = math.inf  # from here on `_read` limits the time without progress
                    for path, ref in files.items():
                        await self._fetch_one(stream, path, ref)
                    await stream.close()
        except trio.TooSlowError as error:
            raise UnreachableError(f"no answer within {self._timeout:.0f} s") from error

    async def _fetch_one(self, stream: LightStream, path: Path, ref: BlobRef) -> None:
        table = ChunkTable.checked(ref, await self._ask(stream, ref, 0, 0, HASH * chunk_count(ref.size)))
        await stream.write(_ACK)
        with atomic_path(path) as part, part.open("wb") as file:
            for first in range(0, table.count, _BATCH):
                await self._fetch_chunks(stream, ref, table, first, file)

    async def _fetch_chunks(self, stream: LightStream, ref: BlobRef, table: ChunkTable, first: int, file: BinaryIO) -> None:
        count = min(_BATCH, table.count - first)
        sizes = [table.chunk_size(index) for index in range(first, first + count)]
        await self._ask(stream, ref, first, count, sum(sizes), read=False)
        for index, size in enumerate(sizes, first):
            chunk = await self._read(stream, size)
            table.verify(index, chunk)
            file.write(chunk)
            self._done += size
            self._on_bytes(self._done, self._total)
        await stream.write(_ACK)

    async def _ask(self, stream: LightStream, ref: BlobRef, first: int, count: int, expected: int, read: bool = True) -> bytes:
        await stream.write(bytes.fromhex(ref.digest) + first.to_bytes(4, "big") + count.to_bytes(4, "big"))
        header = await self._read(stream, 9)
        if header[0] != _OK:
            raise UnreachableError(f"it does not serve blob {ref.digest[:12]}")
        if int.from_bytes(header[1:], "big") != expected:
            raise IntegrityError(f"it announced a wrong length for blob {ref.digest[:12]}")
        return await self._read(stream, expected) if read else b""

    async def _read(self, stream: LightStream, count: int) -> bytes:
        """Read exactly `count` bytes. Each _PIECE may take `timeout` seconds."""
        data = bytearray()
        while len(data) < count:
            with trio.fail_after(self._timeout):
                data += await stream.read_exactly(min(_PIECE, count - len(data)))
        return bytes(data)
