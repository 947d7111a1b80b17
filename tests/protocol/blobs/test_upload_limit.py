"""A slow upload is shared among as many requests as it can serve. The others are refused as busy, so it never collapses."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lutetia.protocol.blobs.chunk_table import CHUNK
from lutetia.protocol.blobs.download import Provider, fetch_blob, serve_blobs
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.blobs.stream import MAX_STREAMS, PIECE, STALL_TIMEOUT, TURN_TIMEOUT, AnswerSlots, RateLimit
from lutetia.protocol.schema.identity import Identity
from lutetia.system.errors import UnreachableError
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
        assert await turns.take("198.51.100.7")
        turns.give_back("203.0.113.5")
        assert await requests[2]
        start = loop.time()
        requests[3].cancel()
        assert not await requests[4]
        assert loop.time() - start == pytest.approx(TURN_TIMEOUT - 1)
        for origin in ("203.0.113.5", "203.0.113.5", "198.51.100.7"):
            turns.give_back(origin)
        assert not turns._taken
        assert not turns._waiting

    run_virtual(scenario)


def test_the_next_slot_goes_to_the_prefix_with_the_fewest() -> None:
    async def scenario() -> None:
        turns = AnswerSlots(4)
        for number in range(2):
            assert await turns.take(f"8.8.4.{number}")
            assert await turns.take(f"9.9.9.{number}")
        crowd = [asyncio.ensure_future(turns.take(f"9.9.9.{number}")) for number in range(2, 9)]
        await asyncio.sleep(1)
        newcomer = asyncio.ensure_future(turns.take("1.1.1.1"))
        await asyncio.sleep(1)
        turns.give_back("9.9.9.0")
        assert await newcomer
        assert not any(request.done() for request in crowd)
        for request in crowd:
            request.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)

    run_virtual(scenario)


def test_a_cancelled_request_gives_its_slot_back() -> None:
    async def scenario() -> None:
        turns = AnswerSlots(1)
        assert await turns.take("a")
        waiting = asyncio.ensure_future(turns.take("b"))
        await asyncio.sleep(1)
        turns.give_back("a")
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert not turns._taken
        assert await turns.take("c")

    run_virtual(scenario)
