"""Transfers between peers that lie, lag and leave, on the simulated network; and one over real libp2p."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import random
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from functools import wraps
from pathlib import Path

import pytest
from lutetia.protocol import blob_stream
from lutetia.protocol.blob_stream import ABSENT, BLOB, MALFORMED, MAX_STREAMS_PER_PEER, OK, REQUEST_BYTES
from lutetia.protocol.blobs import CHUNK, ChunkTable
from lutetia.protocol.identity import Identity
from lutetia.protocol.store import BlobStore
from lutetia.protocol.transfer import Provider, fetch_blob, serve_blobs
from lutetia.protocol.transport import Stream
from lutetia.protocol.transport_memory import MemoryNetwork, MemoryTransport
from lutetia.protocol.virtual_time import run_virtual
from lutetia.system.errors import DiskError, IntegrityError, UnreachableError

from .networks import Hivemind

DATA = random.Random(5).randbytes(20 * CHUNK + 777)
TABLE = ChunkTable.of_bytes(DATA)
REF = TABLE.ref


def any_record(key: str | None, subkey: str, value: bytes, expires: float) -> str:
    return key or ""


class Swarm:
    """A receiver with an empty store, and holders of DATA, each behind a line of 8 MiB/s."""

    def __init__(self, folder: Path) -> None:
        self.network = MemoryNetwork(seed=1, latency=0.02)
        self.receiver = self.network.peer(Identity.derived("receiver"), any_record)
        self.store = BlobStore(folder / "receiver")
        self.source = BlobStore(folder / "source")
        self.source.add_bytes(DATA)
        self.holders: list[MemoryTransport] = []

    async def holder(self, rate: float = 8 << 20, store: BlobStore | None = None) -> MemoryTransport:
        peer = self.network.peer(Identity.derived(f"holder {len(self.holders)}"), any_record)
        self.network.throttle(peer.peer_id, rate)
        await serve_blobs(peer, store or self.source)
        self.holders.append(peer)
        return peer

    @property
    def providers(self) -> list[Provider]:
        return [Provider(peer.peer_id) for peer in self.holders]

    async def fetch(self, **more: Callable[[int, int], None]) -> Path:
        return await fetch_blob(self.receiver, self.store, REF, self.providers, **more)

    def arrived(self) -> int:
        """Chunks that a broken transfer has left on disk."""
        partial = self.store.partial(REF)
        missing = len(partial.missing()) if partial.has_table else TABLE.count
        partial.close()
        return TABLE.count - missing


Scenario = Callable[[Swarm], Awaitable[None]]


def simulated(scenario: Scenario) -> Callable[[Path], None]:
    @wraps(scenario)
    def test(tmp_path: Path) -> None:
        run_virtual(lambda: scenario(Swarm(tmp_path)))

    del test.__wrapped__  # type: ignore[attr-defined]  # pytest would read the scenario's parameters
    return test


@simulated
async def test_a_blob_arrives_from_four_peers_faster_than_from_one(swarm: Swarm) -> None:
    await swarm.holder()
    start = swarm.network.now()
    assert (await swarm.fetch()).read_bytes() == DATA
    alone = swarm.network.now() - start
    swarm.store.remove(REF.digest)
    for _ in range(3):
        await swarm.holder()
    start = swarm.network.now()
    assert (await swarm.fetch()).read_bytes() == DATA
    assert swarm.network.now() - start < alone / 2.5
    assert swarm.store.table(REF.digest) == TABLE
    assert list(swarm.store.partial_folder.iterdir()) == []


@simulated
async def test_a_blob_that_is_here_is_not_fetched_and_an_empty_one_costs_nothing(swarm: Swarm) -> None:
    swarm.store.add_bytes(DATA)
    assert (await swarm.fetch()).read_bytes() == DATA
    empty = swarm.source.add_bytes(b"")
    await swarm.holder()
    assert (await fetch_blob(swarm.receiver, swarm.store, empty, swarm.providers)).read_bytes() == b""


@simulated
async def test_progress_ends_at_the_whole(swarm: Swarm) -> None:
    seen: list[tuple[int, int]] = []
    await swarm.holder()
    await swarm.fetch(on_progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[0] == (0, REF.size)
    assert seen[-1] == (REF.size, REF.size)


def damaged(swarm: Swarm, *chunks: int) -> BlobStore:
    """A store whose bytes rotted after they were checked."""
    store = BlobStore(swarm.source.root.parent / f"damaged {len(swarm.holders)}")
    store.add_bytes(DATA)
    with store.path(REF.digest).open("r+b") as file:
        for index in chunks:
            file.seek(index * CHUNK + 5)
            file.write(b"rot")
    return store


@simulated
async def test_one_flipped_chunk_costs_its_sender_the_place_and_nothing_else(swarm: Swarm) -> None:
    await swarm.holder(store=damaged(swarm, *range(TABLE.count)))
    await swarm.holder()
    assert (await swarm.fetch()).read_bytes() == DATA


@simulated
async def test_when_all_lie_the_error_says_so_and_the_good_chunks_stay(swarm: Swarm) -> None:
    await swarm.holder(store=damaged(swarm, 7))
    await swarm.holder(store=damaged(swarm, 7))
    with pytest.raises(IntegrityError, match="chunk 7"):
        await swarm.fetch()
    assert not swarm.store.has(REF.digest)
    kept = swarm.arrived()
    assert kept > 0
    swarm.network.kill(swarm.holders[0])
    swarm.holders = []
    served = await counted(swarm)
    assert (await swarm.fetch()).read_bytes() == DATA
    assert served() == TABLE.count - kept


async def counted(swarm: Swarm) -> Callable[[], int]:
    """A holder that counts the chunks which it is asked for."""
    chunks = 0

    class Counting(BlobStore):
        def read_chunk(self, digest: str, index: int) -> bytes:
            nonlocal chunks
            chunks += 1
            return super().read_chunk(digest, index)

    peer = swarm.network.peer(Identity.derived("counting"), any_record)
    await serve_blobs(peer, Counting(swarm.source.root))
    swarm.holders.append(peer)
    return lambda: chunks


@simulated
async def test_a_table_that_lies_costs_the_liar_its_place(swarm: Swarm) -> None:
    liar = await swarm.holder()

    async def lie(stream: Stream) -> None:
        await stream.read_exactly(REQUEST_BYTES)
        size = len(TABLE.hashes)
        await stream.write(bytes([OK]) + size.to_bytes(8, "big") + bytes(size))
        await stream.read_exactly(1)

    await liar.serve(BLOB, lie)
    with pytest.raises(IntegrityError, match="chunk table"):
        await swarm.fetch()
    await swarm.holder()
    assert (await swarm.fetch()).read_bytes() == DATA


@pytest.mark.parametrize("length", [0, 1, (1 << 64) - 1])
def test_an_answer_of_another_length_is_not_read(tmp_path: Path, length: int) -> None:
    async def scenario() -> None:
        swarm = Swarm(tmp_path)
        liar = await swarm.holder()

        async def lie(stream: Stream) -> None:
            await stream.read_exactly(REQUEST_BYTES)
            await stream.write(bytes([OK]) + length.to_bytes(8, "big"))
            await stream.read_exactly(1)

        await liar.serve(BLOB, lie)
        with pytest.raises(UnreachableError, match="announced"):
            await swarm.fetch()

    run_virtual(scenario)


@simulated
async def test_a_provider_that_vanishes_at_the_end_is_replaced(swarm: Swarm) -> None:
    first = await swarm.holder()
    await swarm.holder(rate=1 << 20)

    def vanish(done: int, total: int) -> None:
        if done > 0.9 * total:
            swarm.network.kill(first)

    assert (await swarm.fetch(on_progress=vanish)).read_bytes() == DATA


@simulated
async def test_a_cut_transfer_goes_on_where_it_ended(swarm: Swarm) -> None:
    first = await swarm.holder()

    def vanish(done: int, total: int) -> None:
        if done > 0.5 * total:
            swarm.network.kill(first)

    with pytest.raises(UnreachableError, match="what is here is kept"):
        await swarm.fetch(on_progress=vanish)
    kept = swarm.arrived()
    assert TABLE.count // 2 <= kept < TABLE.count
    swarm.holders = []
    served = await counted(swarm)
    swarm.store = BlobStore(swarm.store.root)  # as after a restart
    assert (await swarm.fetch()).read_bytes() == DATA
    assert served() == TABLE.count - kept


@simulated
async def test_a_cancelled_transfer_can_be_taken_up(swarm: Swarm) -> None:
    await swarm.holder(rate=4 << 20)
    task = asyncio.ensure_future(swarm.fetch())
    await asyncio.sleep(3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert 0 < swarm.arrived() < TABLE.count
    assert (await swarm.fetch()).read_bytes() == DATA


@simulated
async def test_nobody_waits_for_a_crawling_provider(swarm: Swarm) -> None:
    await swarm.holder(rate=40 << 10)  # would take nine minutes
    await swarm.holder(rate=2 << 20)
    start = swarm.network.now()
    assert (await swarm.fetch()).read_bytes() == DATA
    assert swarm.network.now() - start < 20


@simulated
async def test_a_provider_that_trickles_has_stalled(swarm: Swarm) -> None:
    await swarm.holder(rate=1 << 10)
    start = swarm.network.now()
    with pytest.raises(UnreachableError, match="stalled"):
        await swarm.fetch()
    assert swarm.network.now() - start < 600


@simulated
async def test_a_silent_provider_does_not_hold_up_the_table(swarm: Swarm) -> None:
    silent = await swarm.holder()
    await silent.serve(BLOB, lambda stream: asyncio.sleep(3600))
    await swarm.holder()
    start = swarm.network.now()
    assert (await swarm.fetch()).read_bytes() == DATA
    assert swarm.network.now() - start < 10


@simulated
async def test_more_providers_than_places_step_in_one_by_one(swarm: Swarm) -> None:
    for _ in range(6):
        await swarm.holder(store=damaged(swarm, *range(TABLE.count)))
    await swarm.holder()
    assert (await swarm.fetch()).read_bytes() == DATA


@simulated
async def test_without_any_holder_the_error_names_each_provider(swarm: Swarm) -> None:
    with pytest.raises(UnreachableError, match="nobody offers"):
        await swarm.fetch()
    await swarm.holder(store=BlobStore(swarm.source.root.parent / "empty"))
    gone = Provider(Identity.derived("gone").peer_id)
    with pytest.raises(UnreachableError, match=r"does not hold it.*could not be dialled"):
        await fetch_blob(swarm.receiver, swarm.store, REF, [*swarm.providers, gone])


@simulated
async def test_two_callers_share_one_transfer(swarm: Swarm) -> None:
    served = await counted(swarm)
    paths = await asyncio.gather(*(swarm.fetch() for _ in range(5)))
    assert len(set(paths)) == 1
    assert served() == TABLE.count


@simulated
async def test_one_caller_leaving_does_not_end_the_transfer_for_the_other(swarm: Swarm) -> None:
    await swarm.holder()
    leaving, staying = asyncio.ensure_future(swarm.fetch()), asyncio.ensure_future(swarm.fetch())
    await asyncio.sleep(1)
    leaving.cancel()
    assert (await staying).read_bytes() == DATA


@simulated
async def test_packet_loss_and_jitter_slow_it_but_do_not_break_it(swarm: Swarm) -> None:
    swarm.network = MemoryNetwork(seed=3, latency=lambda rng, a, b: rng.uniform(0.0, 0.5), loss=0.1)
    swarm.receiver = swarm.network.peer(Identity.derived("receiver"), any_record)
    for _ in range(3):
        await swarm.holder()
    assert (await swarm.fetch()).read_bytes() == DATA


@simulated
async def test_the_rate_limit_holds_over_all_streams(swarm: Swarm) -> None:
    peer = await swarm.holder(rate=1e9)
    await serve_blobs(peer, swarm.source, rate_bytes_per_s=1 << 20)
    start = swarm.network.now()
    await swarm.fetch()
    assert swarm.network.now() - start == pytest.approx(REF.size / (1 << 20), rel=0.1)


@simulated
async def test_a_peer_gets_a_limited_number_of_streams(swarm: Swarm) -> None:
    peer = await swarm.holder()
    streams = [await swarm.receiver.open_stream(peer.peer_id, BLOB) for _ in range(MAX_STREAMS_PER_PEER + 1)]
    await streams[-1].write(bytes(REQUEST_BYTES))
    assert await streams[-1].read_exactly(1) == bytes([blob_stream.BUSY])
    for stream in streams:
        await stream.close()
    await asyncio.sleep(1)
    assert (await swarm.fetch()).read_bytes() == DATA


@simulated
async def test_impolite_requests_are_refused(swarm: Swarm) -> None:
    peer = await swarm.holder()
    for digest, first, count, status in (
        ("ab" * 32, 0, 1, ABSENT),
        (REF.digest, TABLE.count, 1, MALFORMED),
        (REF.digest, 0, (1 << 32) - 1, MALFORMED),
    ):
        stream = await swarm.receiver.open_stream(peer.peer_id, BLOB)
        await stream.write(bytes.fromhex(digest) + first.to_bytes(4, "big") + count.to_bytes(4, "big"))
        assert await stream.read_exactly(1) == bytes([status])
        await stream.close()
    assert (await swarm.fetch()).read_bytes() == DATA


@simulated
async def test_an_idle_client_is_dropped(swarm: Swarm) -> None:
    peer = await swarm.holder()
    stream = await swarm.receiver.open_stream(peer.peer_id, BLOB)
    start = swarm.network.now()
    with pytest.raises(ConnectionError):
        await stream.read_exactly(1)
    assert swarm.network.now() - start < 2 * blob_stream.IDLE_TIMEOUT


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(tmp_path: Path, small_disk: Path) -> None:
    async def scenario() -> None:
        swarm = Swarm(tmp_path)
        await swarm.holder()
        swarm.store = BlobStore(small_disk / "blobs")
        with pytest.raises(DiskError, match="no space left on device"):
            await swarm.fetch()
        assert swarm.store.digests() == []

    run_virtual(scenario)
    assert [path for path in small_disk.rglob("*") if path.is_file()] == []


def test_a_disk_that_fills_during_the_transfer_keeps_what_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no room can be reserved (network file systems), a write fails in the middle."""

    async def scenario() -> None:
        swarm = Swarm(tmp_path)
        await swarm.holder()
        real, writes = os.pwrite, 0

        def full(descriptor: int, data: bytes, offset: int) -> int:
            nonlocal writes
            writes += 1
            if writes > 20:
                raise OSError(errno.ENOSPC, "no space")
            return real(descriptor, data, offset)

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(DiskError, match="free space"):
            await swarm.fetch()
        monkeypatch.undo()
        assert not swarm.store.has(REF.digest)
        assert swarm.arrived() == 10
        assert (await swarm.fetch()).read_bytes() == DATA

    run_virtual(scenario)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = shutil.which("mount")
    mounted = (
        mount and os.geteuid() == 0 and subprocess.run([mount, "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder]).returncode == 0
    )
    if not mounted:
        pytest.skip("a small file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", folder], check=True)


async def test_a_blob_crosses_real_libp2p(tmp_path: Path) -> None:
    network = Hivemind(tmp_path)
    source, target = BlobStore(tmp_path / "source"), BlobStore(tmp_path / "target")
    ref = source.add_bytes(DATA)
    giver, taker = await network.peer("giver", any_record), await network.peer("taker", any_record)
    try:
        await serve_blobs(giver, source)
        path = await fetch_blob(taker, target, ref, [Provider(giver.peer_id, tuple(giver.addresses()))])
        assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(DATA).digest()
    finally:
        await taker.close()
        await giver.close()
