"""The memory network: each fault has its effect, and one seed gives one history."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.transport.base import Stream
from lutetia.system.errors import IdentityError
from tests.memory_transport.network import MemoryNetwork
from tests.memory_transport.stream import WINDOW
from tests.memory_transport.transport import MemoryTransport
from tests.memory_transport.virtual_time import run_virtual


def any_record(key: str | None, subkey: str, value: bytes, expires: float) -> str:
    return key or ""


def peers_of(network: MemoryNetwork, count: int) -> list[MemoryTransport]:
    return [network.peer(Identity.derived(f"peer {number}"), any_record) for number in range(count)]


def in_simulation(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        run_virtual(test)

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@in_simulation
async def test_records_stay_in_their_half_of_a_partition() -> None:
    network = MemoryNetwork()
    peers = peers_of(network, 12)
    left, right = peers[:6], peers[6:]
    network.partition([[p.peer_id for p in left], [p.peer_id for p in right]])
    until = network.now() + 100
    assert await left[0].store("k", "a", b"left", until)
    assert await right[0].store("k", "b", b"right", until)
    assert set(await left[3].get("k")) == {"a"}
    assert set(await right[3].get("k")) == {"b"}
    with pytest.raises(ConnectionError):
        await left[0].open_stream(right[0].peer_id, "/x")
    network.heal()
    assert set(await left[3].get("k")) == {"a", "b"}


@in_simulation
async def test_records_survive_dead_replicas_and_expire() -> None:
    network = MemoryNetwork(seed=3)
    peers = peers_of(network, 10)
    until = network.now() + 60
    assert await peers[9].store("k", "a", b"x", until)
    holders = [peer for peer in peers if peer.held("k") and peer is not peers[9]]
    for holder in holders[:4]:
        network.kill(holder)
    reader = next(peer for peer in peers if peer.alive() and peer not in holders and peer is not peers[9])
    assert (await reader.get("k"))["a"].value == b"x"
    await asyncio.sleep(60)
    assert await reader.get("k") == {}


@in_simulation
async def test_newcomers_hold_the_records_they_are_nearest_to() -> None:
    network = MemoryNetwork()
    first = peers_of(network, 2)
    assert await first[0].store("k", "a", b"x", network.now() + 60)
    many = [network.peer(Identity.derived(f"late {number}"), any_record) for number in range(200)]
    assert (await many[77].get("k"))["a"].value == b"x"


@in_simulation
async def test_a_one_way_block_is_like_a_nat() -> None:
    network = MemoryNetwork()
    a, b = peers_of(network, 2)

    async def echo(stream: Stream) -> None:
        await stream.write(await stream.read_exactly(2))

    await a.serve("/echo", echo)
    await b.serve("/echo", echo)
    network.block(a.peer_id, b.peer_id)
    with pytest.raises(ConnectionError, match="could not be dialled"):
        await a.open_stream(b.peer_id, "/echo")
    stream = await b.open_stream(a.peer_id, "/echo")
    await stream.write(b"hi")
    assert await stream.read_exactly(2) == b"hi"


@in_simulation
async def test_clocks_can_be_skewed() -> None:
    network = MemoryNetwork()
    late = network.peer(Identity.derived("late"), any_record, skew=-10)
    assert late.now() == pytest.approx(network.now() - 10)


@in_simulation
async def test_death_breaks_streams_and_frees_the_identity() -> None:
    network = MemoryNetwork()
    a, b = peers_of(network, 2)
    ended = asyncio.Event()

    async def listen(stream: Stream) -> None:
        with pytest.raises(ConnectionError):
            await stream.read_exactly(1)
        ended.set()

    await b.serve("/listen", listen)
    stream = await a.open_stream(b.peer_id, "/listen")
    with pytest.raises(IdentityError, match="online already"):
        network.peer(Identity.derived("peer 1"), any_record)
    network.kill(a)
    await ended.wait()
    assert not a.alive()
    with pytest.raises(ConnectionError):
        await stream.read_exactly(1)
    with pytest.raises(ConnectionError):
        await a.get("k")
    network.peer(Identity.derived("peer 0"), any_record)


@in_simulation
async def test_a_throttled_peer_sends_slowly_and_fills_the_window() -> None:
    network = MemoryNetwork(latency=0.1)
    a, b = peers_of(network, 2)
    network.throttle(b.peer_id, 1 << 20)

    async def send(stream: Stream) -> None:
        for _ in range(8):
            await stream.write(bytes(WINDOW))
        await stream.read_exactly(1)

    await b.serve("/send", send)
    start = network.now()
    stream = await a.open_stream(b.peer_id, "/send")
    for _ in range(8):
        await stream.read_exactly(WINDOW)
    assert 8 <= network.now() - start <= 10


def test_one_seed_gives_one_history() -> None:
    async def history(seed: int) -> list[float]:
        network = MemoryNetwork(seed, latency=lambda rng, a, b: rng.uniform(0.01, 0.5), loss=0.2)
        peers, times = peers_of(network, 8), []
        for number, peer in enumerate(peers):
            await peer.store("k", str(number), b"x", network.now() + 1000)
            times.append(network.now())
        times.append(float(len(await peers[0].get("k"))))
        return times

    assert run_virtual(lambda: history(5)) == run_virtual(lambda: history(5))
    assert run_virtual(lambda: history(5)) != run_virtual(lambda: history(6))
