"""Many identities at one address get a share of the places, never all of them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lutetia.coordinator.acceptance.rate_limits import Admission
from lutetia.protocol.blobs import stream as blob_stream
from lutetia.protocol.blobs.download import Provider, fetch_blob, serve_blobs
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.transport.base import Stream
from lutetia.protocol.transport.inbound_limits import HandlerTasks
from lutetia.protocol.transport.network_origin import origin_of
from tests.attacks.hivemind_swarm import manifest_of_now, network
from tests.coordinator.acceptance import judge_driver


@pytest.mark.parametrize(
    ("address", "origin"),
    [
        ("/ip4/203.0.113.5/tcp/4001", "203.0.113.5"),
        ("/ip6/2001:db8:1:2:3:4:5:6/tcp/1", "2001:db8:1:2::/64"),
        ("/ip6/::ffff:203.0.113.5/tcp/1", "203.0.113.5"),
        ("/ip4/203.0.113.5/tcp/1/p2p/12D3KooW/p2p-circuit", ""),
        ("/ip4/999.1.1.1/tcp/1", ""),
        ("/dns4/example.org/tcp/1", ""),
        ("", ""),
    ],
)
def test_an_origin_is_an_ipv4_address_or_a_64_prefix(address: str, origin: str) -> None:
    assert origin_of(address) == origin


class Waiting(Stream):
    """An inbound stream that never sends anything."""

    def __init__(self, peer_id: str, origin: str) -> None:
        self.peer_id, self.origin = peer_id, origin

    async def read_exactly(self, count: int) -> bytes:
        return await asyncio.get_running_loop().create_future()

    async def write(self, data: bytes | memoryview) -> None:
        return None

    async def close(self) -> None:
        return None


async def _listen(stream: Stream) -> None:
    await stream.read_exactly(1)


async def test_silent_peers_of_one_origin_leave_room_for_others() -> None:
    tasks = HandlerTasks(limit=64)
    swarm = [Waiting(f"sybil {number}", "203.0.113.5") for number in range(1000)]
    assert sum(tasks.start("/x/1", _listen, stream) for stream in swarm) == 32
    greedy = [Waiting("one peer", "198.51.100.7") for _ in range(100)]
    assert sum(tasks.start("/x/1", _listen, stream) for stream in greedy) == 8
    honest = [Waiting(f"honest {number}", f"192.0.2.{number}") for number in range(20)]
    assert all(tasks.start("/x/1", _listen, stream) for stream in honest)
    await tasks.close()
    await asyncio.sleep(0)
    assert all(tasks.start("/x/1", _listen, stream) for stream in swarm[:32])  # ended streams are forgotten
    await tasks.close()


async def test_peers_of_one_origin_get_half_of_the_blob_streams(
    tmp_path: Path,
) -> None:
    """Four identities at one address hold all places of that origin. The fifth gets the answer BUSY."""
    async with network(tmp_path, run := manifest_of_now()) as start:
        assert run
        provider = await start("provider")
        store = BlobStore(tmp_path / "blobs")
        ref = store.add_bytes(b"x" * 1000)
        await serve_blobs(provider, store)
        sybils = [await start(f"sybil {number}", bootstrap=provider.addresses()) for number in range(4)]
        held = [await peer.open_stream(provider.peer_id, blob_stream.BLOB) for peer in sybils for _ in range(8)]
        for stream in held:  # each asks for the table and does not read it, so its place stays taken
            await stream.write(bytes.fromhex(ref.digest) + bytes(8))
            await stream.read_exactly(blob_stream.ANSWER_BYTES)
        late = await start("late", bootstrap=provider.addresses())
        refused = await late.open_stream(provider.peer_id, blob_stream.BLOB)
        await refused.write(bytes.fromhex(ref.digest) + bytes(8))
        assert (await refused.read_exactly(blob_stream.ANSWER_BYTES))[0] == blob_stream.BUSY
        await refused.close()
        for stream in held:
            await stream.close()
        fetched = await fetch_blob(late, BlobStore(tmp_path / "late"), ref, [Provider(provider.peer_id)])
        assert fetched.read_bytes() == b"x" * 1000


def test_peers_of_one_origin_share_its_places_at_the_judge() -> None:
    admission = Admission(offers_per_minute=20, undecided=3)
    sybils = [f"sybil {number}" for number in range(10)]
    waiting: set[str] = set()
    for peer in sybils:
        if admission.refusal(peer, "203.0.113.5", waiting, 0.0) is None:
            waiting.add(peer)
    assert len(waiting) == 3
    assert admission.refusal("sybil 0", "203.0.113.5", waiting, 1.0) is None  # asks for the state of its own result
    assert admission.refusal("honest", "198.51.100.7", waiting, 1.0) is None
    assert admission.refusal("sybil 9", "203.0.113.5", set(), 2.0) is None  # decided results free their places


def test_offers_of_one_origin_are_limited_for_a_minute() -> None:
    admission = Admission(offers_per_minute=20, undecided=8)
    replies = [admission.refusal(f"peer {number}", "203.0.113.5", set(), number / 10) for number in range(50)]
    assert [reply is None for reply in replies] == [True] * 20 + [False] * 30
    reply = replies[-1]
    assert reply is not None
    assert reply.retry_after == pytest.approx(55.1)
    assert admission.refusal("peer 0", "203.0.113.5", set(), 61.0) is None
    for number in range(10_000):
        admission.refusal(f"other {number}", f"10.0.{number >> 8}.{number & 255}", set(), 62.0)
    assert len(admission._origins) <= 4096


def test_dht_records_leave_places_of_a_shard_free() -> None:
    court = judge_driver.court(limits=False, rules={"candidates_per_shard": 8})
    sybils = [Identity.derived(f"sybil {number}") for number in range(20)]
    for peer in sybils:
        court.offer(judge_driver.make_record(court.manifest, peer), via="poll")
    assert len(court.state.run.shards[0].candidates) == 4
    honest = judge_driver.make_record(court.manifest, Identity.derived("honest"))
    assert court.offer(honest).verdict == "queued"
