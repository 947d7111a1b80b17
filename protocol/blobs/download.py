"""Fetching blobs from several peers at once, every chunk verified on arrival; and serving them."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from lutetia.protocol.async_helpers import wait_for_thread
from lutetia.protocol.blobs.partial import PartialBlob
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.blobs.stream import BLOB, BlobServer, RateLimit
from lutetia.protocol.blobs.worker import DownloadWorker, Progress, Provider, SharedDownload
from lutetia.protocol.schema.manifest import BlobRef
from lutetia.protocol.transport.base import Transport
from lutetia.system.errors import IntegrityError, LutetiaError, UnreachableError

__all__ = ["Progress", "Provider", "fetch_blob", "serve_blobs"]

log = logging.getLogger(__name__)

PARALLEL = 4


async def serve_blobs(transport: Transport, store: BlobStore, rate_bytes_per_s: float | None = None) -> None:
    """Serve every whole blob of `store` to any peer, at most `rate_bytes_per_s` bytes per second over all streams."""
    await transport.serve(BLOB, BlobServer(store, RateLimit(rate_bytes_per_s)).answer)


async def fetch_blob(
    transport: Transport,
    store: BlobStore,
    ref: BlobRef,
    providers: Sequence[Provider],
    on_progress: Progress | None = None,
) -> Path:
    """Bring `ref` into `store` and return its file; at once if it is there already.

    Up to four of `providers` work in parallel, in the order given; one that lies, fails or is overtaken loses its place to the
    next. What arrived stays on disk, so a later call goes on where this one ended. Calls for one blob share one transfer.

    Raises UnreachableError (nobody could serve it), IntegrityError (all that was served was wrong) or DiskError.
    """
    if store.has(ref.digest):
        return store.path(ref.digest)
    key = (store.root, ref.digest)
    shared = _running.get(key)
    if shared is None or shared.ending:
        shared = _running[key] = _Shared(key, _Fetch(transport, store, ref, providers), after=shared)
    return await shared.join(on_progress)


class _Fetch:
    """One transfer: keeps up to PARALLEL workers going."""

    def __init__(self, transport: Transport, store: BlobStore, ref: BlobRef, providers: Sequence[Provider]) -> None:
        self.listeners: list[Progress] = []
        self._transport, self._store, self._ref = transport, store, ref
        unique = {provider.peer_id: provider for provider in providers if provider.peer_id != transport.peer_id}
        self._standby = deque(unique.values())
        self._active: dict[int, tuple[DownloadWorker, asyncio.Task[None]]] = {}

    async def run(self) -> Path:
        if await asyncio.to_thread(self._store.has, self._ref.digest):
            return self._store.path(self._ref.digest)  # a transfer that was given up as it ended has brought it
        partial = await self._opened()
        try:
            await self._gather(partial)
            return await wait_for_thread(asyncio.to_thread(self._store.finish, partial))
        finally:
            partial.close()

    async def _opened(self) -> PartialBlob:
        """What had arrived is hashed first: when cancelled, that is told to end, and its files are closed."""
        given_up = threading.Event()
        opening = asyncio.ensure_future(asyncio.to_thread(self._store.partial, self._ref, given_up))
        try:
            return await wait_for_thread(opening, given_up)
        except asyncio.CancelledError:
            opening.add_done_callback(_close)
            raise

    async def _gather(self, partial: PartialBlob) -> None:
        """Until all chunks are there, or all providers are lost."""
        transfer = SharedDownload(self._transport, self._ref, partial, self.listeners, self._overtake)
        plan = transfer.begin() if partial.has_table else None
        number = 0
        try:
            while plan is None or not plan.done:
                while self._standby and len(self._active) < PARALLEL:
                    worker = DownloadWorker(number, self._standby.popleft(), transfer)
                    self._active[number] = worker, asyncio.get_running_loop().create_task(worker.run())
                    number += 1
                if not self._active:
                    raise self._failure(transfer)
                transfer.workers = len(self._active)
                await asyncio.wait([task for _, task in self._active.values()], return_when=asyncio.FIRST_COMPLETED)
                self._reap()
                plan = transfer.plan
        finally:
            for _, task in self._active.values():
                task.cancel()
            await asyncio.gather(*(task for _, task in self._active.values()), return_exceptions=True)

    def _overtake(self, numbers: list[int]) -> None:
        """End workers that another one was faster than at the same chunk, even though it began later."""
        for number in numbers:
            if number in self._active:
                worker, task = self._active[number]
                log.warning("peer %s loses its place for blob %s: too slow", worker.provider.peer_id, self._ref.digest[:12])
                task.cancel()

    def _reap(self) -> None:
        """Raises what ended a worker for all (a full disk)."""
        for number, (_, task) in list(self._active.items()):
            if task.done():
                del self._active[number]
                if not task.cancelled():
                    task.result()

    def _failure(self, transfer: SharedDownload) -> LutetiaError:
        name = f"blob {self._ref.digest[:12]} ({transfer.bytes_here} of {self._ref.size} bytes are here)"
        if not transfer.lost:
            return UnreachableError(f"nobody offers {name}; wait until a peer that holds it is online")
        reasons = "; ".join(f"peer …{peer_id[-8:]}: {error}" for peer_id, error in transfer.lost.items())
        if all(isinstance(error, IntegrityError) for error in transfer.lost.values()):
            return IntegrityError(f"every provider of {name} sends wrong bytes ({reasons}); ask other peers")
        return UnreachableError(f"no provider is left for {name} ({reasons}); try again later, what is here is kept")


def _close(opening: asyncio.Future[PartialBlob]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


class _Shared:
    """One transfer that several callers wait for; it is cancelled when the last of them is. It begins when `after` has ended."""

    def __init__(self, key: tuple[Path, str], fetch: _Fetch, after: _Shared | None) -> None:
        self._key, self._fetch = key, fetch
        self._task = asyncio.get_running_loop().create_task(self._run(after))
        self._task.add_done_callback(self._forget)
        self._callers = 0
        self.ending = False

    async def join(self, on_progress: Progress | None) -> Path:
        self._callers += 1
        if on_progress:
            self._fetch.listeners.append(on_progress)
        try:
            return await asyncio.shield(self._task)
        finally:
            self._callers -= 1
            if not self._callers:
                self.ending = True
                self._task.cancel()
                await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self, after: _Shared | None) -> Path:
        if after:
            await asyncio.wait([after._task])
        return await self._fetch.run()

    def _forget(self, task: object) -> None:
        if _running.get(self._key) is self:
            del _running[self._key]


_running: dict[tuple[Path, str], _Shared] = {}
