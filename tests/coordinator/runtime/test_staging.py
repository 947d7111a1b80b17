"""Blobs of undecided results take no more disk space than they need, and are removed with the result."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

import pytest

from lutetia.coordinator.acceptance.checks import CheckFailed
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.runtime.check_runner import NetworkCheckRunner
from lutetia.coordinator.runtime.staging import restored_incoming
from lutetia.protocol.blobs.chunk_table import CHUNK, ChunkTable
from lutetia.protocol.blobs.download import serve_blobs
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.blobs.stream import BLOB
from lutetia.protocol.dht_records import publish
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import CheckpointRecord, ProviderRecord
from lutetia.protocol.transport.base import StoredValue, Stream
from tests.coordinator.acceptance.judge_driver import COORDINATOR, PEERS, START, drive_judge, make_manifest, make_record
from tests.memory_transport.network import MemoryNetwork
from tests.memory_transport.transport import MemoryTransport
from tests.memory_transport.virtual_time import run_virtual

MANIFEST = make_manifest()
DATA = os.urandom(4 * CHUNK)


def allocated(store: BlobStore) -> int:
    """Bytes of disk space that the store takes."""
    return sum(path.stat().st_blocks * 512 for path in store.root.rglob("*") if path.is_file())


def offered(number: int) -> CheckpointRecord:
    weights = ChunkTable.of_bytes(DATA + bytes([number])).ref
    return make_record(MANIFEST, PEERS[0], text=str(number), weights=weights)


def at_a_coordinator(tmp_path: Path, scenario: Callable[[NetworkCheckRunner, MemoryTransport], Awaitable[None]]) -> None:
    async def main() -> None:
        network = MemoryNetwork()
        check = record_check(MANIFEST, network.now)
        coordinator, author = network.peer(COORDINATOR, check), network.peer(PEERS[0], check)
        blobs, incoming = BlobStore(tmp_path / "blobs"), BlobStore(tmp_path / "incoming")
        check_runner = NetworkCheckRunner(coordinator, MANIFEST, blobs, incoming, None, None, 65536.0, None)  # pyright: ignore[reportArgumentType]
        await scenario(check_runner, author)

    run_virtual(main, START)


def test_results_without_a_provider_take_no_disk_space(tmp_path: Path):
    async def scenario(check_runner: NetworkCheckRunner, author: MemoryTransport) -> None:
        await serve_blobs(author, BlobStore(tmp_path / "author"))
        for number in range(6):
            with pytest.raises(CheckFailed, match="could not be fetched"):
                await check_runner.fetch(offered(number))
            assert allocated(check_runner.incoming) == 0, "when the fetch failed"

    at_a_coordinator(tmp_path, scenario)


def test_discard_removes_what_arrived_of_a_result(tmp_path: Path):
    """A provider may send a correct table and a correct chunk, and then leave."""

    async def scenario(check_runner: NetworkCheckRunner, author: MemoryTransport) -> None:
        held = BlobStore(tmp_path / "author")
        ref = held.add_bytes(DATA + bytes([0]))
        await serve_blobs(author, held)
        with held.path(ref.digest).open("r+b") as file:
            file.seek(CHUNK)
            file.write(b"rot")
        with pytest.raises(CheckFailed):
            await check_runner.fetch(offered(0))
        assert allocated(check_runner.incoming) >= len(DATA), "the rest may be fetched later"
        check_runner.discard(offered(0), RunState())
        assert allocated(check_runner.incoming) == 0

    at_a_coordinator(tmp_path, scenario)


async def _silent(stream: Stream) -> None:
    await asyncio.sleep(3600)


def _seconds_until_given_up(tmp_path: Path, serve: Callable[[MemoryTransport], Awaitable[None]], patience: float) -> float:
    """Virtual seconds for which the coordinator waits for a result of 5 GB."""
    found: list[float] = []

    async def scenario(check_runner: NetworkCheckRunner, author: MemoryTransport) -> None:
        await serve(author)
        large = offered(0).model_copy(update={"weights": BlobRef(digest="a" * 64, size=5 << 30)})
        began = author.now()
        with pytest.raises(CheckFailed, match="no chunk came for"):
            await check_runner.fetch(large, patience)
        found.append(author.now() - began)

    at_a_coordinator(tmp_path, scenario)
    return found[0]


@pytest.mark.parametrize(("patience", "most"), [(1.0, 27.0), (0.25, 7.0)])
def test_fetch_without_a_first_chunk_is_given_up_within_seconds(tmp_path: Path, patience: float, most: float):
    """At 64 KiB/s 5 GB may take 22 hours; a peer that sends nothing does not get them."""
    assert _seconds_until_given_up(tmp_path, lambda author: author.serve(BLOB, _silent), patience) <= most


def test_fetch_that_makes_progress_goes_on(tmp_path: Path):
    """At 150 kB/s, 4 MiB take 28 s: longer than the wait for one chunk."""

    async def scenario(check_runner: NetworkCheckRunner, author: MemoryTransport) -> None:
        held = BlobStore(tmp_path / "author")
        refs = [held.add_bytes(DATA + bytes([number])) for number in range(3)]
        await serve_blobs(author, held, 150_000.0)
        record = make_record(MANIFEST, PEERS[0], weights=refs[0], state=refs[1], trace=refs[2])
        began = author.now()
        await check_runner.fetch(record)
        assert author.now() - began > 3 * 27.0
        assert all(check_runner.incoming.has(ref.digest) for ref in refs)

    at_a_coordinator(tmp_path, scenario)


@pytest.mark.parametrize("author_serves", [True, False])
def test_fetch_from_an_author_that_sends_needs_no_look_up(tmp_path: Path, author_serves: bool, monkeypatch: pytest.MonkeyPatch):
    """Each look-up of providers takes 8 s, as in a DHT whose neighbours are made up; before, three of them took 24 s."""

    async def scenario(check_runner: NetworkCheckRunner, author: MemoryTransport) -> None:
        coordinator = cast(MemoryTransport, check_runner.transport)
        get, asked = coordinator.get, list[str]()

        async def slow(key: str) -> dict[str, StoredValue]:
            asked.append(key)
            await asyncio.sleep(8)
            return await get(key)

        monkeypatch.setattr(coordinator, "get", slow)
        held = BlobStore(tmp_path / "author")
        refs = [held.add_bytes(bytes([number]) * 1000) for number in range(3)]
        record = make_record(MANIFEST, PEERS[0], weights=refs[0], state=refs[1], trace=refs[2])
        helper = coordinator._network.peer(PEERS[1], record_check(MANIFEST, coordinator.now))
        for ref in refs:
            place = {"run": MANIFEST.run_id, "owner": PEERS[1].public_key, "issued": helper.now(), "peer_id": helper.peer_id}
            assert await publish(helper, PEERS[1], ProviderRecord(**place, blob=ref.digest), 600)
        await serve_blobs(author if author_serves else helper, held)
        began = author.now()
        await check_runner.fetch(record)
        assert all(check_runner.incoming.has(ref.digest) for ref in refs)
        assert author.now() - began < 2.0 if author_serves else author.now() - began > 24.0
        assert len(asked) == (0 if author_serves else 3), "an author that sends needs no look-up"

    at_a_coordinator(tmp_path, scenario)


@pytest.mark.parametrize("waiting", [True, False])
def test_restart_keeps_partial_blobs_of_undecided_results_only(tmp_path: Path, waiting: bool):
    folder, c = RunFolder(tmp_path), drive_judge(limits=False)
    wanted, *given_up = (bytes([number]) + DATA for number in range(3))
    for data in (wanted, *given_up):
        table = ChunkTable.of_bytes(data)
        partial = BlobStore(folder.incoming).partial(table.ref)
        partial.set_table(table)
        partial.write(0, data[:CHUNK])
        partial.close()
    ref = ChunkTable.of_bytes(wanted).ref
    if waiting:
        assert c.offer(make_record(c.manifest, PEERS[0], weights=ref)).verdict == "queued"
    incoming = restored_incoming(folder, BlobStore(folder.blobs), c.state.run)
    assert incoming.arriving() == ([ref.digest] if waiting else [])
    assert incoming.partial(ref).missing() == [*([] if waiting else [0]), 1, 2, 3, 4]
