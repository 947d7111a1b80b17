"""Many identities at one address get a share of the places, never all of them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from lutetia.coordinator.acceptance.intake.rate_limits import Admission
from lutetia.coordinator.ledger.events import PeerQuarantined
from lutetia.protocol.blobs import stream as blob_stream
from lutetia.protocol.blobs.download import Provider, fetch_blob, serve_blobs
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.transport.base import Stream
from lutetia.protocol.transport.inbound_limits import HandlerTasks, StreamPace
from lutetia.protocol.transport.network_origin import PREFIX_FACTOR, origin_of, prefix_of
from tests.attacks.hivemind_swarm import manifest_of_now, network
from tests.coordinator.acceptance import judge_driver


@pytest.mark.parametrize(
    ("address", "origin"),
    [
        ("/ip4/203.0.114.5/tcp/4001", "203.0.114.5"),
        ("/ip6/2001:db8:1:2:3:4:5:6/tcp/1", "2001:db8:1:2::/64"),
        ("/ip6/::ffff:203.0.114.5/tcp/1", "203.0.114.5"),
        ("/ip4/203.0.114.5/tcp/1/p2p/12D3KooW/p2p-circuit", ""),
        ("/ip4/999.1.1.1/tcp/1", ""),
        ("/dns4/example.org/tcp/1", ""),
        ("", ""),
    ],
)
def test_an_origin_is_an_ipv4_address_or_a_64_prefix(address: str, origin: str) -> None:
    assert origin_of(address) == origin


@pytest.mark.parametrize(
    ("origin", "prefix"),
    [
        ("8.8.4.4", "8.8.4.0/24"),
        ("2606:4700:1:2::/64", "2606:4700:1::/48"),
        ("127.0.0.2", "127.0.0.2"),
        ("192.168.1.5", "192.168.1.5"),
        ("fd00:1:2:3::/64", "fd00:1:2:3::/64"),
        ("", ""),
    ],
)
def test_a_prefix_is_a_24_or_48_of_public_addresses(origin: str, prefix: str) -> None:
    assert prefix_of(origin) == prefix


class Waiting(Stream):
    """An inbound stream that never sends anything."""

    def __init__(self, peer_id: str, origin: str) -> None:
        self.peer_id, self.origin = peer_id, origin
        self.closed = False

    async def read_exactly(self, count: int) -> bytes:
        return await asyncio.get_running_loop().create_future()

    async def write(self, data: bytes | memoryview) -> None:
        return None

    async def close(self) -> None:
        self.closed = True


async def _listen(stream: Stream) -> None:
    await stream.read_exactly(1)


async def open_streams(tasks: HandlerTasks, protocol: str, origin: str, count: int) -> list[Waiting]:
    """The streams of `count` identities at `origin` that got a place, each a little later than the one before."""
    streams = [Waiting(f"{origin} {number}", origin) for number in range(count)]
    taken = [stream for stream in streams if tasks.start(protocol, _listen, stream)]
    await asyncio.sleep(0)
    return taken


async def test_silent_streams_of_a_crowd_give_way_to_others() -> None:
    """Identities at two addresses take all places. Those of 40 other networks get theirs none the less."""
    tasks = HandlerTasks(places=64)
    for origin in ("203.0.114.5", "198.51.99.7"):
        await open_streams(tasks, "/x/1", origin, 200)
    honest = [await open_streams(tasks, "/x/1", f"8.8.{number}.1", 1) for number in range(40)]
    assert all(honest)
    await asyncio.sleep(0)
    assert not any(stream.closed for (stream,) in honest)
    await tasks.close()


async def test_addresses_of_one_prefix_are_one_crowd() -> None:
    tasks = HandlerTasks(places=64)
    crowd = [(await open_streams(tasks, "/x/1", f"203.0.114.{number}", 1))[0] for number in range(48)]
    other = await open_streams(tasks, "/x/1", "198.51.99.7", 10)
    assert len(other) == 10
    assert [stream.closed for stream in crowd] == [True] * 10 + [False] * 38, "the oldest silent ones ended"
    assert not await open_streams(tasks, "/x/1", "203.0.114.99", 5)
    await tasks.close()


async def test_a_flooded_protocol_leaves_the_others_alone() -> None:
    tasks = HandlerTasks(places=64)
    await open_streams(tasks, "/x/1", "203.0.114.5", 200)
    assert len(await open_streams(tasks, "/y/1", "203.0.114.5", 20)) == 20
    await tasks.close()


async def test_peers_with_accepted_work_get_a_place_in_any_crowd() -> None:
    tasks = HandlerTasks(places=64)
    tasks.known = lambda peer_id: peer_id.startswith("203.0.114.5 1")
    crowd = [stream for n in range(200) for stream in await open_streams(tasks, "/x/1", f"8.{n}.1.1", 1)]
    assert sum(not stream.closed for stream in crowd) == 48
    taken = await open_streams(tasks, "/x/1", "203.0.114.5", 20)
    assert {stream.peer_id for stream in taken} == {f"203.0.114.5 {number}" for number in (1, *range(10, 20))}
    assert not any(stream.closed for stream in taken)
    await tasks.close()


def test_places_are_kept_for_authors_of_accepted_results() -> None:
    driver = judge_driver.drive_judge()
    author, stranger = judge_driver.PEERS[:2]
    driver.accept(author)
    assert driver.state.run.has_accepted_work(author.public_key)
    assert not driver.state.run.has_accepted_work(stranger.public_key)
    caught = PeerQuarantined(time=driver.now, owner=author.public_key, shard=0, epoch=1, checkpoint="c" * 64)
    banned = {author.public_key: caught}
    quarantined = replace(driver.state.run, quarantined=banned)
    assert not quarantined.has_accepted_work(author.public_key)


def test_streams_of_one_origin_are_answered_at_a_pace_and_those_of_others_at_once() -> None:
    pace, now = StreamPace(at_once=128, per_second=32.0), 1000.0
    waits = [pace.delay("8.8.8.8", now) for _ in range(400)]
    assert waits[:128] == [0.0] * 128
    assert waits[128:288] == pytest.approx([(number + 1) / 32 for number in range(160)])
    assert waits[288:] == [None] * 112, "whoever would wait for longer than five seconds is refused, and not counted"
    assert pace.delay("1.1.1.1", now) == 0.0
    assert pace.delay("8.8.8.8", now + 4.5) == pytest.approx(0.5 + 1 / 32)
    crowd = [pace.delay(f"9.9.9.{number}", now) for number in range(200) for _ in range(4)]
    assert crowd.count(0.0) == PREFIX_FACTOR * 128, "a prefix has four times as much as an address"


async def test_streams_beyond_the_pace_of_their_origin_wait_unless_accepted_work_speaks_for_them() -> None:
    loop, began = asyncio.get_running_loop(), dict[str, float]()

    async def note(stream: Stream) -> None:
        began[stream.peer_id] = loop.time()

    async def after(pace: StreamPace, names: tuple[str, ...]) -> HandlerTasks:
        tasks = HandlerTasks(pace=pace)
        tasks.known = lambda peer_id: peer_id == "old hand"
        assert all(tasks.start("/x/1", note, Waiting(name, "8.8.8.8")) for name in names)
        await asyncio.sleep(0)
        return tasks

    slow = await after(StreamPace(at_once=1, per_second=0.25), ("first", "second", "old hand"))
    assert set(began) == {"first", "old hand"}
    await slow.close()
    start = loop.time()
    await after(StreamPace(at_once=1, per_second=20.0), ("one", "two"))
    await asyncio.wait([one for one in asyncio.all_tasks() if one is not asyncio.current_task()])
    assert began["two"] - start >= 0.049, "it came at once and was answered after its time"


async def test_one_peer_gets_a_quarter_of_the_places() -> None:
    tasks = HandlerTasks(places=64)
    greedy = [Waiting("one peer", "198.51.100.7") for _ in range(100)]
    assert sum(tasks.start("/x/1", _listen, stream) for stream in greedy) == 16
    await tasks.close()
    await asyncio.sleep(0)
    assert sum(tasks.start("/x/1", _listen, stream) for stream in greedy) == 16  # ended streams are forgotten
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
        if admission.refusal(peer, "203.0.114.5", waiting, 0.0) is None:
            waiting.add(peer)
    assert len(waiting) == 3
    assert admission.refusal("sybil 0", "203.0.114.5", waiting, 1.0) is None  # asks for the state of its own result
    assert admission.refusal("honest", "198.51.100.7", waiting, 1.0) is None
    assert admission.refusal("sybil 9", "203.0.114.5", set(), 2.0) is None  # decided results free their places


def test_results_of_one_key_count_each_at_the_judge() -> None:
    """One key may hold several shards; it must not thereby have more results under check than many keys of its address."""
    admission, waiting = Admission(offers_per_minute=20, undecided=3), list[str]()
    for _ in range(10):
        if admission.refusal("many cards", "203.0.114.5", waiting, 0.0) is None:
            waiting.append("many cards")
    assert len(waiting) == 3
    assert admission.refusal("many cards", "203.0.114.5", waiting[1:], 1.0) is None


def test_addresses_of_one_prefix_share_four_quotas_at_the_judge() -> None:
    admission, waiting = Admission(offers_per_minute=20, undecided=3), set[str]()
    for number in range(100):
        if admission.refusal(f"sybil {number}", f"8.8.4.{number}", waiting, 0.0) is None:
            waiting.add(f"sybil {number}")
    assert len(waiting) == PREFIX_FACTOR * 3
    assert admission.refusal("honest", "9.9.9.9", waiting, 0.0) is None
    pace = Admission(offers_per_minute=20)
    admitted = [pace.refusal(f"sybil {n}", f"8.8.4.{n % 50}", set(), 0.0) is None for n in range(200)]
    assert sum(admitted) == PREFIX_FACTOR * 20


def test_offers_of_one_origin_are_limited_for_a_minute() -> None:
    admission = Admission(offers_per_minute=20, undecided=8)
    replies = [admission.refusal(f"peer {number}", "203.0.114.5", set(), number / 10) for number in range(50)]
    assert [reply is None for reply in replies] == [True] * 20 + [False] * 30
    reply = replies[-1]
    assert reply is not None
    assert reply.retry_after == pytest.approx(55.1)
    assert admission.refusal("peer 0", "203.0.114.5", set(), 61.0) is None
    for number in range(10_000):
        admission.refusal(f"other {number}", f"10.0.{number >> 8}.{number & 255}", set(), 62.0)
    assert len(admission._origins) <= 4096


def test_dht_records_leave_places_of_a_shard_free() -> None:
    driver = judge_driver.drive_judge(limits=False, rules={"candidates_per_shard": 8})
    sybils = [Identity.derived(f"sybil {number}") for number in range(20)]
    for peer in sybils:
        driver.offer(judge_driver.make_record(driver.manifest, peer), via="poll")
    assert len(driver.state.run.shards[0].candidates) == 4
    honest = judge_driver.make_record(driver.manifest, Identity.derived("honest"))
    assert driver.offer(honest).verdict == "queued"
