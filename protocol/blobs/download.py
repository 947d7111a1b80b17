"""Serve blobs, and fetch a blob from several peers at once with every chunk verified on arrival."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path

from lutetia.protocol.async_helpers import wait_for_thread
from lutetia.protocol.blobs.partial import PartialBlob
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.blobs.stream import BLOB, BlobServer, Room, unlimited
from lutetia.protocol.blobs.upload_limit import RateLimit
from lutetia.protocol.blobs.worker import DownloadWorker, Progress, Provider, SharedDownload
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.transport.base import Transport
from lutetia.protocol.transport.network_origin import origin_of, prefix_of
from lutetia.system.errors import IntegrityError, LutetiaError, UnreachableError

__all__ = ["Progress", "Provider", "fetch_blob", "serve_blobs"]

PARALLEL = 4
TRUSTED_DELAY = 1.0
"""Seconds after which a trusted provider sends, too, so that the others cannot hold up a transfer."""
PER_NETWORK = 2
"""Providers of one prefix that a transfer uses. Records name their addresses, so this is no proof of where they are."""
_REASONS_NAMED = 4


async def serve_blobs(
    transport: Transport, store: BlobStore, rate_bytes_per_s: float | None = None,
    banned: Callable[[str], bool] = lambda peer_id: False, room: Room = unlimited,
) -> None:  # fmt: skip
    """Serve every whole blob of `store` to any peer that is not `banned`, as far as there is `room` for so many bytes.

    `rate_bytes_per_s` limits all streams together; None is no limit.
    """
    await transport.serve(BLOB, BlobServer(store, RateLimit(rate_bytes_per_s), banned=banned, room=room).answer)


async def fetch_blob(
    transport: Transport,
    store: BlobStore,
    ref: BlobRef,
    providers: Sequence[Provider],
    on_progress: Progress | None = None,
) -> Path:
    """Fetch `ref` into `store` and return its file, at once if it is there already.

    Up to PARALLEL providers send at a time, and after TRUSTED_DELAY seconds a trusted one besides. One that sends wrong bytes,
    fails or is too slow is replaced by the next. What has arrived stays on disk, so a later call continues there. Concurrent
    calls for one blob share one transfer.

    Args:
        transport: How to reach the providers.
        store: Where the blob goes.
        ref: The blob.
        providers: Peers that say they hold it, the preferred ones first.
        on_progress: Called with (bytes arrived, bytes in all).

    Raises UnreachableError (no provider could serve it), IntegrityError (all of them sent wrong bytes) or DiskError.
    """
    if store.has(ref.digest):
        return store.path(ref.digest)
    key = (store.root, ref.digest)
    shared = _running.get(key)
    if shared is None or shared.ending:
        shared = _running[key] = _Shared(key, _Fetch(transport, store, ref, providers), after=shared)
    return await shared.join(on_progress)


class _Fetch:
    """One transfer. Keeps up to PARALLEL workers running."""

    def __init__(self, transport: Transport, store: BlobStore, ref: BlobRef, providers: Sequence[Provider]) -> None:
        self.listeners: list[Progress] = []
        self._transport, self._store, self._ref = transport, store, ref
        unique = {provider.peer_id: provider for provider in providers if provider.peer_id != transport.peer_id}.values()
        self._standby = deque(few_per_network([provider for provider in unique if not provider.trusted]))
        self._trusted = deque(provider for provider in unique if provider.trusted)
        self._active: dict[int, tuple[DownloadWorker, asyncio.Task[None]]] = {}

    async def run(self) -> Path:
        if await asyncio.to_thread(self._store.has, self._ref.digest):
            return self._store.path(self._ref.digest)  # a transfer that was cancelled at its very end has stored it
        partial = await self._opened()
        try:
            await self._gather(partial)
            return await wait_for_thread(asyncio.to_thread(self._store.finish, partial))
        finally:
            partial.close()

    async def _opened(self) -> PartialBlob:
        """Open the partial blob, which first hashes what has arrived. On a cancellation stop that and close its files."""
        given_up = threading.Event()
        opening = asyncio.ensure_future(asyncio.to_thread(self._store.partial, self._ref, given_up))
        try:
            return await wait_for_thread(opening, given_up)
        except asyncio.CancelledError:
            opening.add_done_callback(_close)
            raise

    async def _gather(self, partial: PartialBlob) -> None:
        """Run workers until all chunks are there. Raises an error when all providers are lost."""
        transfer = SharedDownload(self._transport, self._ref, partial, self.listeners, self._overtake)
        plan = transfer.begin() if partial.has_table else None
        loop, numbers = asyncio.get_running_loop(), count()
        trusted_at = loop.time() + TRUSTED_DELAY
        try:
            while plan is None or not plan.done:
                for provider in self._to_start(loop.time() >= trusted_at):
                    number = next(numbers)
                    worker = DownloadWorker(number, provider, transfer)
                    self._active[number] = worker, loop.create_task(worker.run())
                if not self._active:
                    raise self._failure(transfer)
                transfer.workers = len(self._active)
                wait = max(0.0, trusted_at - loop.time()) if self._trusted and loop.time() < trusted_at else None
                tasks = [task for _, task in self._active.values()]
                await asyncio.wait(tasks, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
                self._reap()
                plan = transfer.plan
        finally:
            for _, task in self._active.values():
                task.cancel()
            await asyncio.gather(*(task for _, task in self._active.values()), return_exceptions=True)

    def _to_start(self, waited: bool) -> Iterator[Provider]:
        """The providers that begin to send now. `waited`: whether it is time for a trusted one."""
        trusted = sum(worker.provider.trusted for worker, _ in self._active.values())
        for _ in range(PARALLEL - (len(self._active) - trusted)):
            if self._standby:
                yield self._standby.popleft()
        if self._trusted and not trusted and (waited or not self._active):
            yield self._trusted.popleft()

    def _overtake(self, numbers: list[int]) -> None:
        """End the workers that were slower at a chunk than another worker that began it later."""
        for number in numbers:
            if number in self._active:
                worker, task = self._active[number]
                worker.note_slow()
                task.cancel()

    def _reap(self) -> None:
        """Forget workers that have ended. Raises an error that ends the whole transfer (a full disk)."""
        for number, (_, task) in list(self._active.items()):
            if task.done():
                del self._active[number]
                if not task.cancelled():
                    task.result()

    def _failure(self, transfer: SharedDownload) -> LutetiaError:
        name = f"blob {self._ref.digest[:12]} ({transfer.bytes_here} of {self._ref.size} bytes are here)"
        if not transfer.lost:
            return UnreachableError(f"no peer offers {name}; wait until one that holds it is online")
        named = list(transfer.lost.items())[:_REASONS_NAMED]
        more = f"; {len(transfer.lost) - len(named)} more" if len(transfer.lost) > len(named) else ""
        reasons = "; ".join(f"peer …{peer_id[-8:]}: {str(error) or 'no answer in time'}" for peer_id, error in named) + more
        if all(isinstance(error, IntegrityError) for error in transfer.lost.values()):
            return IntegrityError(f"every provider of {name} sent wrong bytes ({reasons}); ask other peers")
        return UnreachableError(f"no provider is left for {name} ({reasons}); try again later, the bytes here are kept")


def few_per_network(providers: Sequence[Provider]) -> list[Provider]:
    """Those of `providers` that are among the first PER_NETWORK of their prefix. Those without an IP address stay."""
    used = Counter[str]()
    few: list[Provider] = []
    for provider in providers:
        origin = next((origin for address in provider.addresses if (origin := origin_of(address))), "")
        prefix = prefix_of(origin)
        if not prefix or used[prefix] < PER_NETWORK:
            used[prefix] += 1
            few.append(provider)
    return few


def _close(opening: asyncio.Future[PartialBlob]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


class _Shared:
    """One transfer that several callers wait for. It starts when `after` has ended, and is cancelled with its last caller."""

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
