"""What audits and checks have in common: work that a node borrows from a coordinator while it has none of its own."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lutetia.node.pacing import AUDIT_SIGN_SECONDS, AUDIT_WATCH_SECONDS, audit_pause
from lutetia.node.runtime.data_parts import check_index_size
from lutetia.node.runtime.devices.device_shell import DeviceShell
from lutetia.node.runtime.shell import NodeShell
from lutetia.node.services.traffic import epoch_data
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.system.errors import LutetiaError

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Borrowing:
    """Shared by the services that borrow: one borrows at a time.

    `lenders`: the coordinators that said that they lend checks, by peer id. `made`: routers that were made for checks, which the
    coordinator may fetch.
    """

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    lenders: set[str] = field(default_factory=set)
    made: list[BlobRef] = field(default_factory=list)


async def borrow_when_free(
    node: NodeShell, borrowing: Borrowing, what: str, once: Callable[[DeviceShell], Awaitable[float]], ready: Callable[[], bool]
) -> None:
    """Ask for work about once per heartbeat, or after the time that the coordinator names, until cancelled.

    Args:
        node: the node; one of its devices that has nothing to do is taken.
        borrowing: shared by those that borrow.
        what: what is borrowed, for the log.
        once: asks, and does the work if there is any; returns the seconds until the next question.
        ready: whether to ask at all.
    """
    wait = 0.0
    ready_now = lambda device: ready() and node.network.spare_bytes >= borrowed_bytes(device)  # noqa: E731
    while True:
        heartbeat = node.manifest.timing.heartbeat
        await asyncio.sleep(audit_pause(heartbeat, wait, node.rules.jitter(what, int(time.time()))))
        wait, device = 0.0, node.free_device()
        if device is not None and ready_now(device):
            try:
                async with borrowing.lock:
                    wait = await once(device)
            except (LutetiaError, ConnectionError) as error:
                log.debug("no %s now: %s", what, " ".join(str(error).split()))


def borrowed_bytes(shell: DeviceShell) -> int:
    """Bytes that an audit or a lent check may have to fetch: two results, and the data of an epoch."""
    probed = shell.prober.result
    fits = [(shard, fit.result_bytes) for shard, fit in probed.shards.items()] if probed else []
    return max((2 * result + epoch_data(shell.manifest, shard) for shard, result in fits), default=0)


async def fetch_data(shell: DeviceShell, shard: int) -> tuple[Path, list[BlobRef]]:
    """The path of a shard's training data, or of their index, and all blobs that they are; missing ones are fetched.

    Raises UnreachableError, IntegrityError or DiskError.
    """
    spec, store = shell.network.manifest.shards[shard], shell.network.store
    check_index_size(spec)
    keep = {*await asyncio.to_thread(shell.served), spec.train.digest}
    path = await fetch_blob_of(shell, spec.train, keep)
    parts = await asyncio.to_thread(shell.workspace.data.refs, store, spec)
    keep |= {part.digest for part in parts}
    for part in parts:
        await fetch_blob_of(shell, part, keep, listed_by=spec.train)
    return path, [spec.train, *parts]


async def fetch_blob_of(shell: DeviceShell, ref: BlobRef, keep: Collection[str], listed_by: BlobRef | None = None) -> Path:
    """A blob in the node's store; room for it is made by removing others than `keep`."""
    if not await asyncio.to_thread(shell.network.store.has, ref.digest):
        await asyncio.to_thread(shell.workspace.make_room, ref.size, keep)
    return await shell.network.fetch(ref, listed_by=listed_by)


async def clean_up(shell: DeviceShell, shard: int, refs: Iterable[BlobRef]) -> None:
    """Remove what was fetched for borrowed work on the shard, except what this node serves or needs by now."""
    wanted = await asyncio.to_thread(_wanted, shell, shard)
    for ref in refs:
        if ref.digest not in wanted:
            await asyncio.to_thread(shell.network.store.remove, ref.digest)


def _wanted(shell: DeviceShell, shard: int) -> set[str]:
    """Blobs of the shard that this node serves or needs. Blocks on the disk."""
    workspace, wanted = shell.workspace, set(shell.served())
    return wanted | workspace.needed_at_work(shard, shell.network.acceptances.get(shard))


async def in_time(
    work: Coroutine[Any, Any, T], free: Callable[[], bool], until: Callable[[], float], still_lent: Callable[[], Awaitable[bool]]
) -> T | None:
    """The result of `work`; None if it took too long, the node got work of its own, or the work is no longer lent to it.

    Args:
        work: what was borrowed; it is cancelled when it must end.
        free: whether the node has nothing of its own to do.
        until: deadline in Unix seconds, which may move.
        still_lent: asks the coordinator, every AUDIT_SIGN_SECONDS.
    """
    working, asked = asyncio.create_task(work), time.monotonic()
    try:
        while not working.done() and free() and time.time() < until():
            await asyncio.wait([working], timeout=AUDIT_WATCH_SECONDS)
            if not working.done() and time.monotonic() - asked >= AUDIT_SIGN_SECONDS:
                if not await still_lent():
                    return None
                asked = time.monotonic()
        return working.result() if working.done() else None
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


async def send_until_taken(
    send: Callable[[], Awaitable[tuple[float, str]]], pause: Callable[[int], float], until: float, what: str
) -> None:
    """Retry `send` until `until` (Unix seconds): the work is done, and only sending its report may fail.

    Args:
        send: returns the seconds after which to send again and why; 0: it was taken.
        pause: seconds before attempt n, where the coordinator does not answer.
        until: when to give up.
        what: what is sent, for the error.

    Raises ConnectionError when it was not taken in time.
    """
    for attempt in itertools.count(1):
        try:
            wait, why = await send()
            if not wait:
                return
        except ConnectionError as error:
            wait, why = pause(attempt), str(error)
        if time.time() + wait > until:
            raise ConnectionError(f"the coordinator did not take the {what}: {why}")
        await asyncio.sleep(wait)
