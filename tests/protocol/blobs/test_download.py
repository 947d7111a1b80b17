"""Transfers from providers that send wrong bytes, are slow or vanish, on the memory network."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lutetia.protocol.blobs.chunk_table import CHUNK
from lutetia.protocol.blobs.download import PER_NETWORK, Provider, fetch_blob, few_per_network, serve_blobs
from lutetia.protocol.blobs.partial import PartialBlob
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.blobs.stream import BLOB, OK, REQUEST_BYTES
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.transport.base import Stream
from lutetia.system.errors import IntegrityError, UnreachableError
from tests.memory_transport.network import MemoryNetwork
from tests.memory_transport.virtual_time import run_virtual
from tests.protocol.blobs.transfers import DATA, REF, TABLE, Swarm, any_record, simulated


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
async def test_a_held_or_empty_blob_is_not_fetched(swarm: Swarm) -> None:
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
    """A store whose bytes were damaged after they were checked."""
    store = BlobStore(swarm.source.root.parent / f"damaged {len(swarm.holders)}")
    store.add_bytes(DATA)
    with store.path(REF.digest).open("r+b") as file:
        for index in chunks:
            file.seek(index * CHUNK + 5)
            file.write(b"rot")
    return store


@simulated
async def test_a_provider_of_a_wrong_chunk_is_replaced(swarm: Swarm) -> None:
    await swarm.holder(store=damaged(swarm, *range(TABLE.count)))
    await swarm.holder()
    assert (await swarm.fetch()).read_bytes() == DATA


@simulated
async def test_all_providers_wrong_is_an_error_and_good_chunks_stay(swarm: Swarm) -> None:
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
    """A provider that counts the chunks it is asked for."""
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
async def test_a_provider_of_a_wrong_table_is_replaced(swarm: Swarm) -> None:
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
async def test_an_interrupted_transfer_continues(swarm: Swarm) -> None:
    first = await swarm.holder()

    def vanish(done: int, total: int) -> None:
        if done > 0.5 * total:
            swarm.network.kill(first)

    with pytest.raises(UnreachableError, match="the bytes here are kept"):
        await swarm.fetch(on_progress=vanish)
    kept = swarm.arrived()
    assert TABLE.count // 2 <= kept < TABLE.count
    swarm.holders = []
    served = await counted(swarm)
    swarm.store = BlobStore(swarm.store.root)  # as after a restart
    assert (await swarm.fetch()).read_bytes() == DATA
    assert served() == TABLE.count - kept


@simulated
async def test_a_cancelled_transfer_continues(swarm: Swarm) -> None:
    await swarm.holder(rate=4 << 20)
    task = asyncio.ensure_future(swarm.fetch())
    await asyncio.sleep(3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert 0 < swarm.arrived() < TABLE.count
    assert (await swarm.fetch()).read_bytes() == DATA


async def test_a_transfer_cancelled_while_hashing_closes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing gigabytes takes long, in a thread that no cancellation reaches. In real time: virtual time has no threads."""
    swarm = Swarm(tmp_path)
    await swarm.holder(rate=1e12)
    partial = swarm.store.partial(REF)
    partial.set_table(TABLE)
    for index in range(TABLE.count - 1):
        partial.write(index, DATA[index * CHUNK : (index + 1) * CHUNK])
    partial.close()
    hashing, cancelled, read, real = threading.Event(), threading.Event(), 0, os.pread

    def slow_read(descriptor: int, count: int, offset: int) -> bytes:
        nonlocal read
        read += count == CHUNK
        if count == CHUNK:
            hashing.set()
            assert cancelled.wait(60)
        return real(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", slow_read)
    leaving = asyncio.ensure_future(swarm.fetch())
    await asyncio.to_thread(hashing.wait, 60)
    leaving.cancel()
    for _ in range(5):  # the caller's cancellation reaches the shared transfer
        await asyncio.sleep(0)
    cancelled.set()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert read < TABLE.count // 2, "it went on hashing after the cancellation"
    monkeypatch.undo()
    assert swarm.arrived() == TABLE.count - 1, "no chunk is lost, and the transfer is not locked"
    assert (await swarm.fetch()).read_bytes() == DATA


async def test_a_transfer_cancelled_while_storing_ends_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the next caller would write into a file that is being moved away."""
    swarm = Swarm(tmp_path)
    await swarm.holder(rate=1e12)
    naming, cancelled, replace = threading.Event(), threading.Event(), os.replace

    def slow_replace(source: Path, target: Path) -> None:
        if Path(target).name == REF.digest:
            naming.set()
            assert cancelled.wait(60)
        replace(source, target)

    monkeypatch.setattr(os, "replace", slow_replace)
    leaving = asyncio.ensure_future(swarm.fetch())
    await asyncio.to_thread(naming.wait, 60)
    leaving.cancel()
    swarm.store.limit_bytes = REF.size + 1
    again = asyncio.ensure_future(swarm.fetch())
    for _ in range(5):
        await asyncio.sleep(0)
    cancelled.set()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert (await again).read_bytes() == DATA, "it is there and needs no space a second time"
    assert list(swarm.store.partial_folder.iterdir()) == []


async def test_a_transfer_cancelled_while_reserving_frees_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems reserve space by writing zeros, which is slow."""
    swarm = Swarm(tmp_path)
    await swarm.holder(rate=1e12)
    reserving, free, reserve = threading.Event(), threading.Event(), PartialBlob._reserve

    def slow_reserve(partial: PartialBlob) -> None:
        reserving.set()
        assert free.wait(30), "the event loop is blocked"
        reserve(partial)

    monkeypatch.setattr(PartialBlob, "_reserve", slow_reserve)
    leaving = asyncio.ensure_future(swarm.fetch())
    await asyncio.to_thread(reserving.wait, 30)
    leaving.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    free.set()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert not swarm.store.has(REF.digest)


@simulated
async def test_a_call_waits_for_the_end_of_a_cancelled_transfer(swarm: Swarm) -> None:
    await swarm.holder()
    leaving = asyncio.ensure_future(swarm.fetch())
    await asyncio.sleep(1)
    leaving.cancel()
    await asyncio.sleep(0)
    assert (await swarm.fetch()).read_bytes() == DATA
    assert leaving.cancelled()


@simulated
async def test_a_blob_without_provider_takes_no_space(swarm: Swarm) -> None:
    await swarm.holder(store=BlobStore(swarm.source.root.parent / "empty"))
    for _ in range(3):
        with pytest.raises(UnreachableError):
            await swarm.fetch()
        assert list(swarm.store.partial_folder.iterdir()) == []


@simulated
async def test_a_very_slow_provider_is_overtaken(swarm: Swarm) -> None:
    await swarm.holder(rate=40 << 10)  # it would take nine minutes
    await swarm.holder(rate=2 << 20)
    start = swarm.network.now()
    assert (await swarm.fetch()).read_bytes() == DATA
    assert swarm.network.now() - start < 20


@simulated
async def test_a_trickling_provider_counts_as_stalled(swarm: Swarm) -> None:
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
async def test_made_up_providers_cannot_hold_up_a_transfer(swarm: Swarm) -> None:
    """128 of them: half swallow dials, half take streams and never answer. The coordinator makes up for them."""
    coordinator = await swarm.holder()
    liars = [Provider(Identity.derived(f"away {number}").peer_id) for number in range(64)]
    for number in range(64):
        silent = swarm.network.peer(Identity.derived(f"silent {number}"), any_record)
        await silent.serve(BLOB, lambda stream: asyncio.sleep(3600))
        liars.append(Provider(silent.peer_id))
    random.Random(3).shuffle(liars)
    start = swarm.network.now()
    path = await fetch_blob(swarm.receiver, swarm.store, REF, [*liars, Provider(coordinator.peer_id, trusted=True)])
    assert path.read_bytes() == DATA
    assert swarm.network.now() - start < 6  # the coordinator alone takes 2.5 s for it


@simulated
async def test_a_trusted_provider_is_spared_by_fast_ones(swarm: Swarm) -> None:
    trusted, *_ = [await swarm.holder(rate=64 << 20) for _ in range(5)]
    asked: list[str] = []
    await trusted.serve(BLOB, lambda stream: _note(asked, stream))
    await fetch_blob(swarm.receiver, swarm.store, REF, [Provider(trusted.peer_id, trusted=True), *swarm.providers[1:]])
    assert asked == []


async def _note(asked: list[str], stream: Stream) -> None:
    asked.append(stream.peer_id)


def test_two_providers_of_a_network_are_used() -> None:
    crowd = [Provider(f"liar {n}", ("/dns4/x/tcp/1/p2p/x", f"/ip4/203.0.114.{n}/tcp/1/p2p/liar{n}")) for n in range(128)]
    honest = [Provider(f"honest {n}", (f"/ip4/8.8.{n}.1/tcp/1/p2p/honest{n}",)) for n in range(3)]
    unknown = [Provider("relayed"), Provider("also relayed"), Provider("a third")]
    assert few_per_network([*crowd, *honest, *unknown]) == [*crowd[:PER_NETWORK], *honest, *unknown]


@simulated
async def test_further_providers_replace_failed_ones(swarm: Swarm) -> None:
    for _ in range(6):
        await swarm.holder(store=damaged(swarm, *range(TABLE.count)))
    await swarm.holder()
    assert (await swarm.fetch()).read_bytes() == DATA


@simulated
async def test_an_absent_blob_is_an_error_that_names_each_provider(swarm: Swarm) -> None:
    with pytest.raises(UnreachableError, match="no peer offers"):
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
async def test_a_leaving_caller_does_not_end_a_shared_transfer(swarm: Swarm) -> None:
    await swarm.holder()
    leaving, staying = asyncio.ensure_future(swarm.fetch()), asyncio.ensure_future(swarm.fetch())
    await asyncio.sleep(1)
    leaving.cancel()
    assert (await staying).read_bytes() == DATA


@simulated
async def test_packet_loss_and_jitter_do_not_break_a_transfer(swarm: Swarm) -> None:
    swarm.network = MemoryNetwork(seed=3, latency=lambda rng, a, b: rng.uniform(0.0, 0.5), loss=0.1)
    swarm.receiver = swarm.network.peer(Identity.derived("receiver"), any_record)
    for _ in range(3):
        await swarm.holder()
    assert (await swarm.fetch()).read_bytes() == DATA
