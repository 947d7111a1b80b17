"""Bytes are counted at the transport and kept across restarts; the cap is not passed, and no answer is cut."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from lutetia.node.traffic.meter import OVERHEAD, Traffic
from lutetia.node.traffic.policy import ByteCaps, DeviceBytes
from lutetia.protocol.blobs.download import Provider, fetch_blob, serve_blobs
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.transport.metered import MeteredTransport
from lutetia.system.errors import UnreachableError
from tests.memory_transport.network import MemoryNetwork
from tests.protocol.networks import Anything

NOON = datetime.datetime(2026, 11, 29, 12).timestamp()
DAY = 86_400.0


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_counts_last_over_a_restart_and_begin_again_at_midnight(tmp_path: Path, clock: Clock):
    traffic = Traffic(tmp_path / "traffic.json", ByteCaps(10_000, 50_000), clock)
    traffic.sent(1000)
    traffic.received(2000)
    traffic.save(now=True)
    again = Traffic(tmp_path / "traffic.json", ByteCaps(10_000, 50_000), clock)
    assert (again.counts.sent, again.counts.received, again.counts.month) == (1050, 2100, 3150)
    assert again.left.bytes == 10_000 - 3150
    clock.now += DAY
    assert (again.counts.sent, again.counts.received, again.counts.month) == (0, 0, 3150)
    clock.now += DAY
    assert again.counts.month == 0, "December"


def test_clock_that_is_set_back_forgets_nothing(tmp_path: Path, clock: Clock):
    traffic = Traffic(tmp_path / "traffic.json", ByteCaps(10_000), clock)
    traffic.sent(1000)
    clock.now -= 3 * DAY
    traffic.save(now=True)
    assert Traffic(tmp_path / "traffic.json", ByteCaps(10_000), clock).counts.sent == 1050


def test_spent_cap_stays_spent_until_the_day_ends(tmp_path: Path, clock: Clock):
    traffic = Traffic(tmp_path / "traffic.json", ByteCaps(10_000), clock)
    traffic.devices = [DeviceBytes(result=3000, begun=2)]
    midnight = clock.now + DAY / 2
    traffic.sent(500)
    assert traffic.spent_until == midnight
    assert traffic.why
    assert traffic.why.endswith("training goes on at midnight")
    traffic.devices = [DeviceBytes(result=3000)]
    assert traffic.spent_until == midnight, "a verdict gives no bytes back; a shard is not handed back and taken again"
    clock.now = midnight
    assert traffic.spent_until is None
    assert traffic.why is None


def test_bytes_that_are_under_way_are_not_given_out_twice(tmp_path: Path, clock: Clock):
    traffic = Traffic(tmp_path / "traffic.json", ByteCaps(10_000), clock)
    with traffic.sending(6000, own=True) as first, traffic.sending(6000, own=True) as second:
        assert (first, second) == (True, False)
        with pytest.raises(UnreachableError, match="raise bytes_per_day"), traffic.fetching(6000):
            pass
    with traffic.sending(6000, own=True) as third:
        assert third
    with traffic.fetching(9000):
        pass


async def test_cap_at_the_transport_serves_results_whole_and_others_not_at_all(tmp_path: Path, clock: Clock):
    network, check = MemoryNetwork(), Anything()
    served, theirs, stranger = (BlobStore(tmp_path / name) for name in ("node", "coordinator", "stranger"))
    result = served.add_bytes(b"r" * 3_000_000)
    other = served.add_bytes(b"o" * 3_000_000)
    traffic = Traffic(tmp_path / "traffic.json", ByteCaps(10_000_000), clock)
    traffic.devices = [DeviceBytes(result=3_000_000, begun=1)]
    node = MeteredTransport(network.peer(Identity.derived("node"), check), traffic)
    coordinator = network.peer(Identity.derived("coordinator"), check)
    peer = network.peer(Identity.derived("stranger"), check)
    await serve_blobs(node, served, room=lambda who, count: traffic.sending(count, own=who == coordinator.peer_id))
    here = [Provider(node.peer_id)]
    await fetch_blob(peer, stranger, other, here)
    assert 3_000_000 <= traffic.counts.sent / OVERHEAD < 3_010_000
    again = served.add_bytes(b"a" * 3_000_000)
    with pytest.raises(UnreachableError, match="is busy"):
        await fetch_blob(peer, stranger, again, here)
    await fetch_blob(coordinator, theirs, result, here)
    assert theirs.has(result.digest)
    before = traffic.counts.sent
    too_much = served.add_bytes(b"t" * 5_000_000)
    with pytest.raises(UnreachableError, match="is busy"):
        await fetch_blob(coordinator, theirs, too_much, here)
    assert traffic.counts.sent + traffic.counts.received <= 10_000_000
    assert traffic.counts.sent - before < 1_000, "nothing of it was sent"
