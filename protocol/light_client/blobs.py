"""Blobs for whoever is no part of the swarm: py-libp2p against `/lutetia/blob/1`, every chunk verified as it arrives."""

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
"""(bytes that arrived so far, bytes in all)"""


def fetch_blobs(ticket: Ticket, files: Mapping[Path, BlobRef], timeout: float = 20.0, on_bytes: OnBytes | None = None) -> None:
    """Fetch every blob into its file from the first of the ticket's peers that has them; files are whole or absent.

    `timeout` seconds without progress count as a failure. Raises UnreachableError, naming each address with its reason, when no
    peer serves them; IntegrityError when all that was served was wrong; DiskError.
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
                    limit.deadline = math.inf  # from here on, `_read` limits the time without progress
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
        """Exactly `count` bytes; `timeout` seconds without a further _PIECE are too many."""
        data = bytearray()
        while len(data) < count:
            with trio.fail_after(self._timeout):
                data += await stream.read_exactly(min(_PIECE, count - len(data)))
        return bytes(data)
