"""Serving blobs: limits, invalid requests, full disks, and one transfer over real libp2p."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lutetia.protocol.blobs import stream as blob_stream
from lutetia.protocol.blobs.download import Provider, fetch_blob, serve_blobs
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.blobs.stream import ABSENT, BLOB, MALFORMED, MAX_STREAMS_PER_PEER, REQUEST_BYTES
from lutetia.system.errors import DiskError
from tests.memory_transport.virtual_time import run_virtual
from tests.protocol.blobs.transfers import DATA, REF, TABLE, Swarm, any_record, simulated
from tests.protocol.networks import Hivemind


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
async def test_banned_peer_is_told_so_and_gets_nothing(swarm: Swarm) -> None:
    peer = await swarm.holder()
    await serve_blobs(peer, swarm.source, banned=lambda peer_id: peer_id == swarm.receiver.peer_id)
    stream = await swarm.receiver.open_stream(peer.peer_id, BLOB)
    await stream.write(bytes(REQUEST_BYTES))
    assert await stream.read_exactly(1) == bytes([blob_stream.BANNED])
    assert "which the run's owner has banned" in str(blob_stream.BlobRefused(blob_stream.BANNED))


@simulated
async def test_invalid_requests_are_refused(swarm: Swarm) -> None:
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


def test_a_disk_that_fills_in_a_transfer_keeps_whole_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network file systems cannot reserve space, so a write fails in the middle."""

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
