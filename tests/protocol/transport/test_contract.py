"""The contract of every `Transport`. Each test runs over the memory transport and over real libp2p."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import pytest_asyncio

from lutetia.protocol.dht_records import publish, read_records
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.records import ClaimRecord, claim_key, seal
from lutetia.protocol.transport.base import Stream, Transport
from tests.protocol.networks import Anything, Hivemind, Memory, Network, honest, manifest_of_now, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

ANNA, BEN, CLEO, LIAR = (Identity.derived(name) for name in ("anna", "ben", "cleo", "liar"))
_numbers = itertools.count()


@dataclass
class Swarm:
    """Three honest peers, and a liar that stores records which the others refuse."""

    network: Network
    run: Manifest
    anna: Transport
    ben: Transport
    cleo: Transport
    liar: Transport
    anything: Anything

    def claim(self, owner: Identity, shard: int, **changes: object) -> ClaimRecord:
        fields = {
            "run": self.run.run_id, "owner": owner.public_key, "issued": time.time(), "shard": shard, "epoch": 0, "samples": 0,
            "state": "training", **changes,
        }  # fmt: skip
        return ClaimRecord.model_validate(fields)

    async def lie(self, key: str, subkey: str, value: bytes, expires: float) -> bool:
        """Let the liar store a record. True if an honest peer took it or returns it."""
        self.anything.key = key
        taken = await self.liar.store(key, subkey, value, expires)
        shown = [subkey in found and found[subkey].value == value for found in [await p.get(key) for p in (self.anna, self.ben)]]
        return taken or any(shown)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["memory", "hivemind"])
async def swarm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Swarm]:
    network = Memory() if request.param == "memory" else Hivemind(tmp_path_factory.mktemp("swarm"))
    run, anything = manifest_of_now(), Anything()
    peers = [await network.peer(name, honest(run)) for name in ("anna", "ben", "cleo")]
    peers.append(await network.peer("liar", anything))
    anna, ben, cleo, liar = peers
    yield Swarm(network, run, anna, ben, cleo, liar, anything)
    for peer in reversed(peers):
        await peer.close()


def fresh() -> str:
    return f"/test/{next(_numbers)}"


async def test_a_record_is_found_by_every_peer_with_its_exact_expiry(swarm: Swarm) -> None:
    record = swarm.claim(ANNA, 0)
    expires = time.time() + 20.123456789
    sealed = seal(record, ANNA, expires)
    assert await swarm.anna.store(record.key(), record.owner, sealed, expires)
    for peer in (swarm.anna, swarm.ben, swarm.cleo):
        found = await peer.get(record.key())
        assert (found[record.owner].value, found[record.owner].expires) == (sealed, expires)


async def test_owners_share_a_key_and_the_later_expiry_replaces(swarm: Swarm) -> None:
    key = claim_key(swarm.run.run_id, 1)
    assert await publish(swarm.anna, ANNA, swarm.claim(ANNA, 1, samples=1), 10)
    assert await publish(swarm.ben, BEN, swarm.claim(BEN, 1, samples=7), 10)
    assert await publish(swarm.anna, ANNA, swarm.claim(ANNA, 1, samples=2), 20)
    records = {record.owner: record for record, _ in await read_records(swarm.cleo, key) if isinstance(record, ClaimRecord)}
    assert records[ANNA.public_key].samples == 2
    assert records[BEN.public_key].samples == 7


async def test_a_shorter_lived_record_still_replaces_when_published(swarm: Swarm) -> None:
    key = claim_key(swarm.run.run_id, 1)
    assert await publish(swarm.cleo, CLEO, swarm.claim(CLEO, 1), 30)
    assert await publish(swarm.cleo, CLEO, swarm.claim(CLEO, 1, samples=5), 5)
    records = {record.owner: record for record, _ in await read_records(swarm.ben, key) if isinstance(record, ClaimRecord)}
    assert records[CLEO.public_key].samples == 5


async def test_a_record_vanishes_when_it_expires(swarm: Swarm) -> None:
    record = swarm.claim(BEN, 2)
    expires = time.time() + 1.5
    assert await swarm.ben.store(record.key(), record.owner, seal(record, BEN, expires), expires)
    assert BEN.public_key in await swarm.anna.get(record.key())

    async def gone() -> bool:
        return not any([BEN.public_key in await peer.get(record.key()) for peer in (swarm.anna, swarm.ben, swarm.cleo)])

    await until(gone, 10)
    assert time.time() >= expires


async def test_storing_an_older_record_again_keeps_the_newer(swarm: Swarm) -> None:
    """Any peer that has seen the record can do that, and replicas that missed the newer one do it in good faith."""
    old, new = swarm.claim(CLEO, 0), swarm.claim(CLEO, 0, samples=9)
    ends, later = time.time() + 2, time.time() + 40
    sealed = seal(old, CLEO, ends)
    assert await swarm.cleo.store(old.key(), old.owner, sealed, ends)
    assert await swarm.cleo.store(new.key(), new.owner, seal(new, CLEO, later), later)
    swarm.anything.key = old.key()
    for _ in range(3):
        await swarm.liar.store(old.key(), old.owner, sealed, ends)

    async def ended() -> bool:
        return time.time() > ends + 0.2

    await until(ended, 10)
    for peer in (swarm.anna, swarm.ben, swarm.cleo):
        found = await peer.get(new.key())
        assert found[CLEO.public_key].expires == later


async def test_an_unknown_key_is_empty(swarm: Swarm) -> None:
    assert await swarm.anna.get(claim_key(swarm.run.run_id, 3999)) == {}


async def test_forged_owners_are_refused_and_do_not_hide_the_honest(swarm: Swarm) -> None:
    record = swarm.claim(ANNA, 3)
    expires = time.time() + 20
    assert await publish(swarm.anna, ANNA, record, 15)
    swarm.anything.key = record.key()
    assert await publish(swarm.liar, LIAR, swarm.claim(LIAR, 3), 15)
    assert not await swarm.lie(record.key(), ANNA.public_key, seal(record, LIAR, expires), expires)  # signed by another
    mine = swarm.claim(LIAR, 3)
    assert not await swarm.lie(mine.key(), ANNA.public_key, seal(mine, LIAR, expires), expires)  # stored under another
    assert {ANNA.public_key, LIAR.public_key} == set(await swarm.ben.get(record.key()))


async def test_a_record_under_the_wrong_key_is_refused(swarm: Swarm) -> None:
    record, expires = swarm.claim(LIAR, 0), time.time() + 20
    assert not await swarm.lie(claim_key(swarm.run.run_id, 2), record.owner, seal(record, LIAR, expires), expires)


async def test_a_record_of_another_run_is_refused(swarm: Swarm) -> None:
    record, expires = swarm.claim(LIAR, 0, run="cd" * 32), time.time() + 20
    assert not await swarm.lie(record.key(), record.owner, seal(record, LIAR, expires), expires)


async def test_a_prolonged_record_is_refused(swarm: Swarm) -> None:
    record, expires = swarm.claim(LIAR, 2), time.time() + 20
    assert not await swarm.lie(record.key(), record.owner, seal(record, LIAR, expires), expires + 1)


@pytest.mark.parametrize("junk", [b"", b"\xff\x00junk", b"{}", b"x" * 5000, b"x" * 200_000], ids=len)
async def test_junk_and_oversize_are_refused(swarm: Swarm, junk: bytes) -> None:
    assert not await swarm.lie(claim_key(swarm.run.run_id, 2), LIAR.public_key, junk, time.time() + 20)


async def test_a_year_long_record_is_refused(swarm: Swarm) -> None:
    record, expires = swarm.claim(LIAR, 2), time.time() + 365 * 86400
    assert not await swarm.lie(record.key(), record.owner, seal(record, LIAR, expires), expires)


async def test_a_future_dated_record_is_refused(swarm: Swarm) -> None:
    record, expires = swarm.claim(LIAR, 2, issued=time.time() + 300), time.time() + 20
    assert not await swarm.lie(record.key(), record.owner, seal(record, LIAR, expires), expires)


async def test_a_peer_does_not_send_an_invalid_record(swarm: Swarm) -> None:
    record, expires = swarm.claim(ANNA, 2), time.time() + 20
    assert not await swarm.anna.store(record.key(), record.owner, seal(record, BEN, expires), expires)


async def test_a_latecomer_finds_what_was_stored_before(swarm: Swarm) -> None:
    assert await publish(swarm.ben, BEN, swarm.claim(BEN, 0, samples=9), 30)
    late = await swarm.network.peer("late", honest(swarm.run))
    try:
        assert BEN.public_key in await late.get(claim_key(swarm.run.run_id, 0))
    finally:
        await late.close()


async def test_a_lone_peer_stores_and_finds_at_once(swarm: Swarm) -> None:
    lone = await swarm.network.alone("lone", honest(swarm.run))
    try:
        async with asyncio.timeout(20):
            assert await publish(lone, ANNA, swarm.claim(ANNA, 0), 30)
            assert ANNA.public_key in await lone.get(claim_key(swarm.run.run_id, 0))
            assert await lone.get(claim_key(swarm.run.run_id, 1)) == {}
    finally:
        await lone.close()


async def test_streams_carry_bytes_both_ways_and_name_the_peer(swarm: Swarm) -> None:
    protocol, data = fresh(), os.urandom(3 << 20)
    callers: list[str] = []

    async def answer(stream: Stream) -> None:
        callers.append(stream.peer_id)
        received = await stream.read_exactly(len(data))
        await stream.write(hashlib.sha256(received).digest())
        await stream.write(received[::-1])
        await stream.read_exactly(1)

    await swarm.anna.serve(protocol, answer)
    for caller, addresses in ((swarm.ben, swarm.anna.addresses()), (swarm.cleo, [])):
        stream = await caller.open_stream(swarm.anna.peer_id, protocol, addresses)
        assert stream.peer_id == swarm.anna.peer_id
        await stream.write(data)
        assert await stream.read_exactly(32) == hashlib.sha256(data).digest()
        target = bytearray(len(data))
        await stream.read_into(memoryview(target))
        assert target == data[::-1]
        await stream.write(b"k")
        await stream.close()
        await stream.close()
    assert callers == [swarm.ben.peer_id, swarm.cleo.peer_id]


async def test_the_answering_side_may_speak_first(swarm: Swarm) -> None:
    protocol = fresh()

    async def greet(stream: Stream) -> None:
        await stream.write(b"hello")
        await stream.read_exactly(1)

    await swarm.ben.serve(protocol, greet)
    stream = await swarm.anna.open_stream(swarm.ben.peer_id, protocol, swarm.ben.addresses())
    async with asyncio.timeout(120):
        assert await stream.read_exactly(5) == b"hello"
    await stream.write(b"k")
    await stream.close()


async def test_bytes_written_before_a_close_arrive(swarm: Swarm) -> None:
    protocol = fresh()

    async def answer(stream: Stream) -> None:
        await stream.write(b"x" * 100_000)

    await swarm.cleo.serve(protocol, answer)
    stream = await swarm.ben.open_stream(swarm.cleo.peer_id, protocol, swarm.cleo.addresses())
    async with asyncio.timeout(120):
        assert await stream.read_exactly(100_000) == b"x" * 100_000
        with pytest.raises(ConnectionError, match="1 bytes early"):
            await stream.read_exactly(1)
    await stream.close()
    with pytest.raises(ConnectionError):
        await stream.write(b"late")


async def test_a_slow_reader_holds_the_writer_back(swarm: Swarm) -> None:
    protocol, release, read, piece = fresh(), asyncio.Event(), asyncio.Event(), bytes(1 << 20)
    written = 0

    async def dawdle(stream: Stream) -> None:
        await release.wait()
        for _ in range(written):
            await stream.read_exactly(len(piece))
        await stream.write(b"k")
        await read.wait()

    await swarm.anna.serve(protocol, dawdle)
    stream = await swarm.ben.open_stream(swarm.anna.peer_id, protocol, swarm.anna.addresses())
    with contextlib.suppress(TimeoutError):
        while written < 128:
            async with asyncio.timeout(1.5):
                await stream.write(piece)
            written += 1
    assert written < 128
    release.set()
    async with asyncio.timeout(120):
        assert await stream.read_exactly(1) == b"k"
    read.set()
    await stream.close()


async def test_a_failing_handler_ends_its_own_stream_only(swarm: Swarm, caplog: pytest.LogCaptureFixture) -> None:
    protocol = fresh()

    async def answer(stream: Stream) -> None:
        if await stream.read_exactly(1) == b"!":
            raise ZeroDivisionError("a bug in a handler")
        await stream.write(b"fine")
        await stream.read_exactly(1)

    await swarm.anna.serve(protocol, answer)
    good = await swarm.ben.open_stream(swarm.anna.peer_id, protocol, swarm.anna.addresses())
    bad = await swarm.cleo.open_stream(swarm.anna.peer_id, protocol, swarm.anna.addresses())
    await bad.write(b"!")
    async with asyncio.timeout(120):
        with pytest.raises(ConnectionError):
            await bad.read_exactly(1)
        await good.write(b".")
        assert await good.read_exactly(4) == b"fine"
    await good.close()
    await bad.close()
    assert swarm.anna.alive()
    assert "a bug in a handler" in caplog.text


async def test_an_unreachable_peer_is_a_connection_error(swarm: Swarm) -> None:
    nobody = Identity.derived("nobody").peer_id
    async with asyncio.timeout(120):
        with pytest.raises(ConnectionError):
            await swarm.anna.open_stream(nobody, "/test/any")
        with pytest.raises(ConnectionError):
            await swarm.anna.open_stream(nobody, "/test/any", [f"/ip4/127.0.0.1/tcp/1/p2p/{nobody}"])
        with pytest.raises(ConnectionError):
            await swarm.anna.open_stream(swarm.ben.peer_id, "/test/nobody-speaks-this", swarm.ben.addresses())


async def test_dialling_names_the_reason_for_each_address_that_failed(swarm: Swarm) -> None:
    dead = f"/ip4/127.0.0.1/tcp/1/p2p/{Identity.derived('nobody').peer_id}"
    async with asyncio.timeout(120):
        refused = await swarm.anna.dial_each([*swarm.ben.addresses(), dead])
    assert list(refused) == [dead]
    assert refused[dead]


async def test_connections_show_where_peers_are(swarm: Swarm) -> None:
    async with asyncio.timeout(120):
        connections = await swarm.ben.connections()
    assert connections[swarm.anna.peer_id] in {address.partition("/p2p/")[0] for address in swarm.anna.addresses()}


async def test_a_peer_without_a_double_finds_none(swarm: Swarm) -> None:
    async with asyncio.timeout(120):
        assert await swarm.anna.find_double(swarm.ben.addresses()) is None


async def test_a_periodic_action_is_repeated_although_it_fails(swarm: Swarm) -> None:
    dan, twice, count = await swarm.network.peer("dan", honest(swarm.run)), asyncio.Event(), 0

    async def act() -> None:
        nonlocal count
        count += 1
        if count == 2:
            twice.set()
        raise ConnectionError("a peer is away")

    dan.every(0.01, act)
    async with asyncio.timeout(120):
        await twice.wait()
    await dan.close()


async def test_a_closed_peer_is_gone(swarm: Swarm) -> None:
    protocol = fresh()
    dan = await swarm.network.peer("dan", honest(swarm.run))
    await dan.serve(protocol, lambda stream: stream.close())
    assert dan.alive()
    assert dan.addresses()[0].endswith(f"/p2p/{dan.peer_id}")
    await dan.close()
    await dan.close()
    assert not dan.alive()
    for attempt in (dan.get("k"), dan.store("k", "s", b"", time.time() + 9), dan.open_stream(swarm.ben.peer_id, "/x")):
        with pytest.raises(ConnectionError):
            await attempt
    with pytest.raises(ConnectionError):
        await swarm.ben.open_stream(dan.peer_id, protocol, dan.addresses())
    back = await swarm.network.peer("dan", honest(swarm.run))
    assert back.peer_id == dan.peer_id
    await back.close()


async def test_records_survive_a_peer_that_vanishes(swarm: Swarm) -> None:
    eve = await swarm.network.peer("eve", honest(swarm.run))
    owner = Identity.derived("eve")
    assert await publish(eve, owner, swarm.claim(owner, 1), 30)
    await eve.close()
    assert owner.public_key in await swarm.cleo.get(claim_key(swarm.run.run_id, 1))
