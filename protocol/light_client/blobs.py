"""Fetch blobs without joining the swarm: py-libp2p against `/lutetia/blob/1`, every chunk verified on arrival.

Several peers send at the same time. What has arrived is kept in a folder until all is there, so that a fetch that was killed goes
on where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import trio

from lutetia.protocol.blobs.chunk_table import HASH, ChunkTable, chunk_count
from lutetia.protocol.light_client.dial import LightStream, dial
from lutetia.protocol.light_client.transfer import ArrivingFolder, ChunkBatch, Transfers
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.ticket import Ticket
from lutetia.system.errors import IntegrityError, LutetiaError, UnreachableError

BLOB = "/lutetia/blob/1"
PEERS_AT_ONCE = 4
_ACK, _OK = b"\x06", 0
_PIECE = 1 << 18

OnBytes = Callable[[int, int], None]
"""(bytes arrived, bytes in all)"""


def fetch_blobs(
    ticket: Ticket, refs: Iterable[BlobRef], folder: ArrivingFolder, timeout: float = 20.0, on_bytes: OnBytes | None = None
) -> None:
    """Fetch blobs from the ticket's peers into `folder`, up to PEERS_AT_ONCE at a time; one that fails is replaced by the next.

    Args:
        ticket: The peers to ask.
        refs: The blobs.
        folder: Keeps what has arrived. Chunks of an earlier fetch are used if their hashes match.
        timeout: Seconds without progress after which a peer counts as failed.
        on_bytes: Called with (bytes arrived, bytes in all), those of an earlier fetch included.

    Raises UnreachableError (no peer serves them; the text names each address with its reason), IntegrityError (all bytes served
    were wrong) or DiskError.
    """
    transfers = Transfers(folder, refs, on_bytes or (lambda done, total: None))
    failures: dict[str, LutetiaError | str] = {}
    try:
        if not transfers.done:
            trio.run(_fetch_from_all, ticket.addresses, transfers, timeout, failures)
    finally:
        transfers.close()
    if not transfers.done:
        reasons = "; ".join(f"{address}: {reason}" for address, reason in failures.items())
        wrong = failures and all(isinstance(reason, IntegrityError) for reason in failures.values())
        problem = IntegrityError if wrong else UnreachableError
        raise problem(f"no peer of the ticket could serve the files ({reasons}); try again later, what has arrived is kept")


async def _fetch_from_all(
    addresses: tuple[str, ...], transfers: Transfers, patience: float, failures: dict[str, LutetiaError | str]
) -> None:
    waiting = iter(addresses)

    async def worker() -> None:
        for address in waiting:
            try:
                await _Session(transfers, patience).fetch(address)
                return
            except (UnreachableError, IntegrityError) as error:
                failures[address] = error
            except ConnectionError as error:
                failures[address] = str(error)

    async with trio.open_nursery() as nursery:
        for _ in range(min(PEERS_AT_ONCE, len(addresses))):
            nursery.start_soon(worker)
        await transfers.finished_or(nursery)


class _Session:
    """Transfers from one peer."""

    def __init__(self, transfers: Transfers, timeout: float) -> None:
        self._transfers, self._timeout = transfers, timeout
        self._absent: set[str] = set()

    async def fetch(self, address: str) -> None:
        """Return when all is here. Raises UnreachableError, IntegrityError or ConnectionError when the peer is of no use."""
        try:
            with trio.fail_after(self._timeout) as limit:
                async with dial(address) as connection:
                    stream = await connection.open_stream(BLOB)
                    limit.deadline = math.inf  # from here on `_read` limits the time without progress
                    while not self._transfers.done:
                        await self._fetch_some(stream)
                    await stream.close()
        except trio.TooSlowError as error:
            raise UnreachableError(f"no answer within {self._timeout:.0f} s") from error

    async def _fetch_some(self, stream: LightStream) -> None:
        """Fetch a table or some chunks; wait if other peers are fetching all that is left."""
        if (ref := self._transfers.without_table(self._absent)) is not None:
            await self._fetch_table(stream, ref)
        elif (batch := self._transfers.take(self._absent)) is not None:
            try:
                await self._fetch_chunks(stream, batch)
            finally:
                self._transfers.give_back(batch)
        elif self._transfers.only(self._absent):
            raise UnreachableError(f"it does not serve blob {min(self._absent)[:12]}")
        else:
            await self._transfers.change()

    async def _fetch_table(self, stream: LightStream, ref: BlobRef) -> None:
        hashes = await self._ask(stream, ref, 0, 0, HASH * chunk_count(ref.size))
        if hashes is not None:
            self._transfers.set_table(ref, ChunkTable.checked(ref, await self._read(stream, HASH * chunk_count(ref.size))))
            await stream.write(_ACK)

    async def _fetch_chunks(self, stream: LightStream, batch: ChunkBatch) -> None:
        sizes = [batch.table.chunk_size(index) for index in batch.chunks]
        if await self._ask(stream, batch.ref, batch.chunks[0], len(sizes), sum(sizes)) is None:
            return
        for index, size in zip(list(batch.chunks), sizes, strict=True):
            self._transfers.arrived(batch, index, await self._read(stream, size))
        await stream.write(_ACK)

    async def _ask(self, stream: LightStream, ref: BlobRef, first: int, count: int, expected: int) -> bool | None:
        """Ask for chunks, or with `count` 0 for the table. True: `expected` bytes follow. None: the peer lacks the blob."""
        await stream.write(bytes.fromhex(ref.digest) + first.to_bytes(4, "big") + count.to_bytes(4, "big"))
        header = await self._read(stream, 9)
        if header[0] != _OK:
            self._absent.add(ref.digest)
            return None
        if int.from_bytes(header[1:], "big") != expected:
            raise IntegrityError(f"it announced a wrong length for blob {ref.digest[:12]}")
        return True

    async def _read(self, stream: LightStream, count: int) -> bytes:
        """Read exactly `count` bytes. Each _PIECE may take `timeout` seconds."""
        data = bytearray()
        while len(data) < count:
            with trio.fail_after(self._timeout):
                data += await stream.read_exactly(min(_PIECE, count - len(data)))
        return bytes(data)
