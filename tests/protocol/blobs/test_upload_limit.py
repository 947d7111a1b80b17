"""A slow upload is shared among as many requests as it can serve. The others are refused as busy, so it never collapses."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from lutetia.protocol.blobs.chunk_table import CHUNK
from lutetia.protocol.blobs.download import Provider, fetch_blob, serve_blobs
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.blobs.stream import BLOB, BlobClient
from lutetia.protocol.blobs.upload_limit import (
    HELD_SECONDS,
    MAX_STREAMS,
    PIECE,
    STALL_TIMEOUT,
    TURN_TIMEOUT,
    AnswerSlot,
    AnswerSlots,
    RateLimit,
    yields,
)
from lutetia.protocol.schema.identity import Identity
from lutetia.system.errors import UnreachableError
from tests.memory_transport.transport import MemoryTransport
from tests.memory_transport.virtual_time import run_virtual
from tests.protocol.blobs.transfers import Swarm as Receivers
from tests.protocol.blobs.transfers import any_record

RATE, SECONDS, SIZE = 128 << 10, 900.0, 8 * CHUNK


@pytest.mark.parametrize("receivers", [1, 8, 24])
def test_a_slow_upload_serves_many_requests(receivers: int, tmp_path: Path) -> None:
    """The receivers give up after STALL_TIMEOUT without a PIECE and try again, as nodes do."""

    async def scenario() -> None:
        swarm = Receivers(tmp_path)
        ref = swarm.source.add_bytes(bytes(SIZE))
        peer = swarm.network.peer(Identity.derived("slow"), any_record)
        await serve_blobs(peer, swarm.source, rate_bytes_per_s=RATE)
        arrived = 0

        async def receive(number: int) -> None:
            nonlocal arrived

            def count(here: int, total: int) -> None:
                nonlocal arrived
                arrived, seen[0] = arrived + max(0, here - seen[0]), max(here, seen[0])

            seen, me = [0], swarm.network.peer(Identity.derived(f"receiver {number}"), any_record)
            done = False
            while not done:
                try:
                    await fetch_blob(me, BlobStore(tmp_path / f"receiver {number}"), ref, [Provider(peer.peer_id)], count)
                    done = True
                except UnreachableError:
                    await asyncio.sleep(5)

        tasks = [asyncio.ensure_future(receive(number)) for number in range(receivers)]
        await asyncio.wait(tasks, timeout=SECONDS)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert arrived >= 0.7 * min(receivers * SIZE, RATE * SECONDS)

    run_virtual(scenario)


@pytest.mark.parametrize(("rate", "places"), [(None, MAX_STREAMS), (1, 1), (RATE, 5), (416 << 10, 16), (1 << 40, MAX_STREAMS)])
def test_each_answer_gets_twice_the_slowest_rate(rate: float | None, places: int) -> None:
    assert RateLimit(rate).answers_at_once == places
    if rate and places > 1 and places < MAX_STREAMS:
        assert rate / places >= 2 * PIECE / STALL_TIMEOUT


def test_cancelled_bytes_are_not_charged() -> None:
    async def scenario() -> None:
        rate, loop = RateLimit(100.0), asyncio.get_running_loop()
        given_up = [asyncio.ensure_future(rate.take(1000)) for _ in range(10)]
        await asyncio.sleep(1)
        for task in given_up:
            task.cancel()
        await asyncio.gather(*given_up, return_exceptions=True)
        start = loop.time()
        await rate.take(100)
        assert loop.time() - start <= 1

    run_virtual(scenario)


def test_an_origin_gets_half_of_the_slots_in_order() -> None:
    async def scenario() -> None:
        turns, loop = AnswerSlots(4), asyncio.get_running_loop()
        requests = [asyncio.ensure_future(turns.take("203.0.113.5")) for _ in range(5)]
        await asyncio.sleep(1)
        assert [task.done() for task in requests] == [True, True, False, False, False]
        other = await turns.take("198.51.100.7")
        assert other
        first = requests[0].result()
        assert first
        turns.give_back(first)
        third = await requests[2]
        start = loop.time()
        requests[3].cancel()
        assert not await requests[4]
        assert loop.time() - start == pytest.approx(TURN_TIMEOUT - 1)
        for slot in (requests[1].result(), third, other):
            assert slot
            turns.give_back(slot)
        assert not turns._taken
        assert not turns._waiting

    run_virtual(scenario)


def test_the_next_slot_goes_to_the_prefix_with_the_fewest() -> None:
    async def scenario() -> None:
        turns = AnswerSlots(4)
        taken = [await turns.take(f"{prefix}.{number}") for number in range(2) for prefix in ("8.8.4", "9.9.9")]
        crowd = [asyncio.ensure_future(turns.take(f"9.9.9.{number}")) for number in range(2, 9)]
        await asyncio.sleep(1)
        newcomer = asyncio.ensure_future(turns.take("1.1.1.1"))
        await asyncio.sleep(1)
        assert taken[1]
        turns.give_back(taken[1])
        assert await newcomer
        assert not any(request.done() for request in crowd)
        for request in crowd:
            request.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)

    run_virtual(scenario)


def test_a_cancelled_request_gives_its_slot_back() -> None:
    async def scenario() -> None:
        turns = AnswerSlots(1)
        first = await turns.take("a")
        assert first
        waiting = asyncio.ensure_future(turns.take("b"))
        await asyncio.sleep(1)
        turns.give_back(first)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert not turns._taken
        assert await turns.take("c")

    run_virtual(scenario)


def at(swarm: Receivers, name: str, host: str) -> MemoryTransport:
    peer = swarm.network.peer(Identity.derived(name), any_record)
    peer._address = f"/ip4/{host}/tcp/1/p2p/{peer.peer_id}"
    return peer


def slots_of(*held: tuple[str, float, int], task: asyncio.Task[object]) -> list[AnswerSlot]:
    return [AnswerSlot(origin, since, task, sent) for origin, since, sent in held]


def test_least_progress_of_the_crowded_or_slow_gives_way() -> None:
    async def scenario() -> None:
        task, now, share = asyncio.current_task(), HELD_SECONDS + 100.0, 1000.0
        assert task
        fast, slow, young = ("8.8.4.1", 0.0, 10**6), ("8.8.4.2", 0.0, 10**5), ("8.8.4.3", now - 1, 0)
        held = slots_of(fast, slow, young, task=task)
        assert yields(held, "1.1.1.1", now, share) is held[1], "the slowest of a prefix with more"
        assert yields(slots_of(fast, young, task=task), "8.8.4.9", now, share) is None, "who is as crowded waits"
        lone = slots_of(("9.9.9.9", 0.0, int(0.4 * share * now)), task=task)
        assert yields(lone, "1.1.1.1", now, share) is lone[0], "slower than half of its share"
        assert yields(slots_of(("9.9.9.9", 0.0, int(0.6 * share * now)), task=task), "1.1.1.1", now, share) is None

    run_virtual(scenario)


@pytest.mark.parametrize("rate", [RATE, 1 << 20])
def test_two_slow_networks_do_not_keep_the_slots_of_an_upload(rate: int, tmp_path: Path) -> None:
    """Eight receivers of each of two networks read a MiB in 75 s, as slowly as is allowed; then an honest one comes."""

    async def scenario() -> None:
        swarm, loop = Receivers(tmp_path), asyncio.get_running_loop()
        ref = swarm.source.add_bytes(bytes(64 * CHUNK))
        peer = swarm.network.peer(Identity.derived("source"), any_record)
        await serve_blobs(peer, swarm.source, rate_bytes_per_s=rate)

        async def crawl(number: int) -> None:
            liar = at(swarm, f"liar {number}", f"{(8, 9)[number % 2]}.8.4.{number}")
            while True:
                with contextlib.suppress(ConnectionError, EOFError):
                    client = BlobClient(await liar.open_stream(peer.peer_id, BLOB), ref)
                    await client.ask_chunks(0, 64)
                    while True:
                        await client.read_into(memoryview(bytearray(PIECE)))
                        await asyncio.sleep(0.94 * STALL_TIMEOUT)
                await asyncio.sleep(1)

        crowd = [asyncio.ensure_future(crawl(number)) for number in range(16)]
        await asyncio.sleep(HELD_SECONDS)
        me, small = at(swarm, "me", "1.1.1.1"), swarm.source.add_bytes(bytes(CHUNK))
        began = loop.time()
        while True:
            try:
                await fetch_blob(me, BlobStore(tmp_path / "me"), small, [Provider(peer.peer_id)])
                break
            except UnreachableError:
                await asyncio.sleep(5)
        waited = loop.time() - began
        for task in crowd:
            task.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)
        assert waited < 2 * HELD_SECONDS

    run_virtual(scenario)
