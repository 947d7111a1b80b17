"""Fetch chunks from one provider: ask, read, verify, keep. Retry after failures; drop a provider that sends wrong bytes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from lutetia.protocol.async_helpers import wait_for_thread
from lutetia.protocol.blobs.chunk_table import CHUNK, ChunkTable
from lutetia.protocol.blobs.partial import PartialBlob
from lutetia.protocol.blobs.scheduler import DownloadPlan, Span
from lutetia.protocol.blobs.stream import ABSENT, BANNED, BLOB, MALFORMED, BlobClient, BlobRefused
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.transport.base import Transport
from lutetia.system.errors import IntegrityError
from lutetia.system.log_limit import LimitedLog
from lutetia.system.retry import backoff

_dropped = LimitedLog(logging.getLogger(__name__))

ATTEMPTS = 3
CONNECT_TIMEOUT = 5.0
"""Seconds after which a provider that opens no stream counts as failed."""
FIRST_RETRY = 1.0  # seconds
IDLE_STEP = 1.0

Progress = Callable[[int, int], None]
"""(bytes arrived, bytes in all)"""


@dataclass(frozen=True)
class Provider:
    """A peer that says it holds a blob. Coordinators are `trusted`: a transfer keeps a worker for one of them."""

    peer_id: str
    addresses: tuple[str, ...] = ()
    trusted: bool = False


@dataclass
class SharedDownload:
    """What the workers of one transfer share. `overtake` ends the workers of these numbers, because they are too slow."""

    transport: Transport
    ref: BlobRef
    partial: PartialBlob
    listeners: list[Progress]
    overtake: Callable[[list[int]], None]
    workers: int = 0
    plan: DownloadPlan | None = None
    bytes_here: int = 0
    lost: dict[str, Exception] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def begin(self) -> DownloadPlan:
        """Plan for the missing chunks, once the table is there."""
        self.plan = DownloadPlan(self.partial.missing())
        self.bytes_here = self.partial.arrived_bytes
        self.report(0)
        return self.plan

    def report(self, more: int) -> None:
        self.bytes_here += more
        for listener in self.listeners:
            listener(self.bytes_here, self.ref.size)

    def notify(self) -> None:
        """Wake idle workers: chunks may be pending again, or all are done."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def change(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()


class DownloadWorker:
    """Fetches from `provider` until the blob is complete or the provider is lost."""

    def __init__(self, number: int, provider: Provider, transfer: SharedDownload) -> None:
        self.number, self.provider = number, provider
        self._transfer = transfer
        self._failures = 0
        self._met = provider.trusted

    async def run(self) -> None:
        """Return when the blob is complete or the provider is lost (see `SharedDownload.lost`). Raises DiskError."""
        while True:
            try:
                await self._fetch_spans()
                return
            except IntegrityError as error:
                self._lose(error)
                return
            except (OSError, EOFError, TimeoutError) as error:
                self._failures += 1
                hopeless = isinstance(error, BlobRefused) and error.status in (ABSENT, MALFORMED, BANNED)
                if hopeless or not self._met or self._failures >= ATTEMPTS:  # whom nobody has met may be made up
                    self._lose(error)
                    return
                await asyncio.sleep(backoff(self._failures, first=FIRST_RETRY))

    async def _fetch_spans(self) -> None:
        """Fetch span after span over one stream. A span from which another worker has stolen costs a new stream."""
        plan = self._transfer.plan
        while plan is None or not plan.done:
            client = await self._connect()
            try:
                plan = plan or self._transfer.plan or await self._fetch_table(client)
                reusable = True
                while reusable and not plan.done:
                    if span := self._next_span(plan):
                        reusable = await self._fetch_span(client, plan, span)
                    else:
                        await self._transfer.change(IDLE_STEP)
            finally:
                await client.close()

    async def _connect(self) -> BlobClient:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            stream = await self._transfer.transport.open_stream(self.provider.peer_id, BLOB, self.provider.addresses)
        self._met = True
        return BlobClient(stream, self._transfer.ref)

    async def _fetch_table(self, client: BlobClient) -> DownloadPlan:
        """Several workers may do this at once. The first table that matches the blob's name is kept."""
        table = ChunkTable.checked(self._transfer.ref, await client.table())
        if self._transfer.plan is None:
            # reserves disk space, which can be slow: in a thread, so that closing the transfer never waits for it on the loop
            await wait_for_thread(asyncio.to_thread(self._transfer.partial.set_table, table))
        return self._transfer.plan or self._transfer.begin()

    def _next_span(self, plan: DownloadPlan) -> Span | None:
        now = asyncio.get_running_loop().time()
        return plan.take(self.number, now, self._transfer.workers) or plan.steal(self.number, now)

    async def _fetch_span(self, client: BlobClient, plan: DownloadPlan, span: Span) -> bool:
        """Read chunk n+1 while a thread verifies and writes chunk n. Returns False when the stream cannot be used again."""
        asked, table, loop = span.end, self._transfer.partial.table, asyncio.get_running_loop()
        buffers = [memoryview(bytearray(CHUNK)) for _ in range(2)]  # one is filled while the other is written
        keeping: asyncio.Task[None] | None = None
        try:
            await client.ask_chunks(span.next, span.left)
            while span.left:
                index = span.next
                chunk = buffers[index % 2][: table.chunk_size(index)]
                await client.read_into(chunk)
                plan.advance(span, loop.time())
                if keeping:
                    await keeping
                keeping = loop.create_task(self._keep(plan, span, index, chunk))
            if keeping:
                await keeping
        finally:
            if keeping:
                keeping.cancel()
                await asyncio.gather(keeping, return_exceptions=True)
            plan.release(span)
            self._transfer.notify()
        if span.next == asked:
            client.finished()
        return span.next == asked

    async def _keep(self, plan: DownloadPlan, span: Span, index: int, chunk: memoryview) -> None:
        await asyncio.to_thread(self._transfer.partial.write, index, chunk)
        self._failures = 0
        if plan.is_missing(index):
            self._transfer.overtake(plan.arrived(span, index))
            self._transfer.report(len(chunk))

    def note_slow(self) -> None:
        """Log that another worker was faster."""
        self._log_dropped("too slow")

    def _lose(self, error: Exception) -> None:
        self._log_dropped(error)
        self._transfer.lost[self.provider.peer_id] = error

    def _log_dropped(self, why: object) -> None:
        blob = self._transfer.ref.digest[:12]
        _dropped(logging.WARNING, f"blob {blob}", "dropped provider %s of blob %s: %s", self.provider.peer_id, blob, why)
