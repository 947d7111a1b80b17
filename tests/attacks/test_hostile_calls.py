"""DHT calls that ask for too much or too often, or that are cancelled: they use up the caller's limit and leave nothing behind.

Real p2pd. The callers send hivemind's wire format by themselves, without Lutetia's own limits.
"""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import msgpack
import pytest

from lutetia.protocol.transport.hivemind.bindings import DHTID, PeerID, dht_messages
from lutetia.protocol.transport.hivemind.dht import rpc_server as answers
from lutetia.protocol.transport.hivemind.dht.ip_diversity import NewcomerLimit
from lutetia.protocol.transport.hivemind.dht.storage import KeyRecords, sample_within
from lutetia.protocol.transport.hivemind.transport import HivemindTransport
from tests.attacks.hivemind_swarm import manifest_of_now, network, until


def by_value(key: str | None, subkey: str, value: bytes, expires: float) -> str:
    """A record check that accepts every record under the key it names."""
    return value.partition(b"|")[0].decode()


async def call(caller: HivemindTransport, callee: HivemindTransport, name: str, request: Any, answer: Any, seconds: float) -> Any:
    assert caller._dht
    calling = caller._dht._p2p.call_protobuf_handler(
        PeerID.from_base58(callee.peer_id), f"DHTProtocol.{name}", request, answer
    )  # fmt: skip
    return await asyncio.wait_for(calling, seconds)


def handling(peer: HivemindTransport) -> int:
    """How many calls of others a peer still holds."""
    assert peer._dht
    client: Any = peer._dht._p2p._client
    return len(client.control._handler_tasks)


async def failure_of(asked: Any) -> str:
    """The class of the error that `asked` raises, also one of hivemind."""
    (error,) = await asyncio.gather(asked, return_exceptions=True)
    assert isinstance(error, BaseException), error
    return type(error).__name__


def keep(peer: HivemindTransport, key: str, owner: str, size: int) -> None:
    """Put a record into the storage of `peer` directly, which is quick."""
    assert peer._dht
    protocol, value = peer._dht._protocol, key.encode() + b"|" + os.urandom(size)
    protocol.storage.store_subkey(DHTID.generate(source=key), owner, protocol.serializer.dumps(value), time.time() + 600)


@pytest.mark.timeout(300)
async def test_a_call_for_thousands_of_keys_is_refused(tmp_path: Path) -> None:
    async with network(tmp_path, manifest_of_now()) as start:
        victim = await start("victim", check=by_value)
        attacker = await start("attacker", check=by_value, bootstrap=victim.addresses(), host="127.0.0.2")
        for name in ("neighbour", "another"):
            await start(name, check=by_value, bootstrap=victim.addresses())
        key = DHTID.generate(source="any").to_bytes()
        for keys in ([os.urandom(20) for _ in range(17)], [key, key], [os.urandom(20) for _ in range(60_000)]):
            request = dht_messages.FindRequest(keys=keys)
            asked = call(attacker, victim, "rpc_find", request, dht_messages.FindResponse, 5.0)
            assert await failure_of(asked) == "P2PHandlerError"
        honest = dht_messages.FindRequest(keys=[os.urandom(20) for _ in range(16)])
        assert len((await call(attacker, victim, "rpc_find", honest, dht_messages.FindResponse, 5.0)).results) == 16
        await until(lambda: handling(victim) == 0, 5)


@pytest.mark.timeout(300)
async def test_cancelled_calls_leave_nothing(tmp_path: Path) -> None:
    """Pings that ask to be called back, by a caller that does not wait, and a find that waits for p2pd."""
    async with network(tmp_path, manifest_of_now()) as start:
        victim = await start("victim", check=by_value)
        attacker = await start("attacker", check=by_value, bootstrap=victim.addresses(), host="127.0.0.2")
        assert attacker._dht
        node = dht_messages.NodeInfo(node_id=attacker._dht._protocol.node_id.to_bytes())
        ping = dht_messages.PingRequest(peer=node, validate=True)
        ping.auth.nonce = bytes(3 << 20)
        for _ in range(10):
            assert await failure_of(call(attacker, victim, "rpc_ping", ping, dht_messages.PingResponse, 0.001)) == "TimeoutError"
        plain = dht_messages.PingRequest(peer=node, validate=True)
        replies = await asyncio.gather(
            *(call(attacker, victim, "rpc_ping", plain, dht_messages.PingResponse, 10.0) for _ in range(20))
        )
        assert not any(reply.available for reply in replies), "the caller is not called back"
        await until(lambda: handling(victim) == 0, 20)
        assert victim.alive()


@pytest.mark.timeout(300)
async def test_a_key_with_too_many_records_for_a_message_is_readable(tmp_path: Path) -> None:
    async with network(tmp_path, manifest_of_now()) as start:
        replica = await start("replica", check=by_value)
        reader = await start("reader", check=by_value, bootstrap=replica.addresses())
        for number in range(4000):
            keep(replica, "run/nodes/1", f"owner {number}", 2000)
        found = await reader.get("run/nodes/1")
        assert 1000 < len(found) <= 4000
        assert await replica.neighbours() == [reader.peer_id], "and the reader still counts as alive"
        assert await reader.neighbours() == [replica.peer_id]


@pytest.mark.timeout(300)
async def test_a_full_replica_still_admits_newcomers(tmp_path: Path) -> None:
    async with network(tmp_path, manifest_of_now()) as start:
        full = await start("full", check=by_value)
        for number in range(6000):
            keep(full, f"run/claims/{number}", "owner", 1000)
        newcomer = await start("newcomer", check=by_value, bootstrap=full.addresses(), host="127.0.0.2")
        assert newcomer._dht
        kept = newcomer._dht._protocol.storage
        await until(lambda: len(kept) == 6000, 60)
        assert await full.neighbours() == [newcomer.peer_id]


async def test_calls_are_limited_per_origin(tmp_path: Path) -> None:
    async with network(tmp_path, manifest_of_now()) as start:
        victim = await start("victim", check=by_value)
        attacker = await start("attacker", check=by_value, bootstrap=victim.addresses(), host="127.0.0.2")
        honest = await start("honest", check=by_value, bootstrap=victim.addresses(), host="127.0.0.3")
        assert victim._dht
        victim._dht._protocol.calls = NewcomerLimit(at_once=50, per_second=0.001)
        ping = dht_messages.PingRequest()
        replies = await asyncio.gather(
            *(call(attacker, victim, "rpc_ping", ping, dht_messages.PingResponse, 10.0) for _ in range(60)),
            return_exceptions=True,
        )
        answered = sum(not isinstance(reply, BaseException) for reply in replies)
        assert 40 <= answered <= 50, "its own maintenance counts too"
        store = dht_messages.StoreRequest(
            keys=[DHTID.generate(source="run/claims/1").to_bytes()], subkeys=[msgpack.packb("owner")],
            values=[msgpack.packb(b"run/claims/1|x")], expiration_time=[time.time() + 60], in_cache=[False],
        )  # fmt: skip
        reply = await call(attacker, victim, "rpc_store", store, dht_messages.StoreResponse, 10.0)
        assert list(reply.store_ok) == [False], "no error, or a peer that sends records would lose a neighbour"
        reply = await call(honest, victim, "rpc_store", store, dht_messages.StoreResponse, 10.0)
        assert list(reply.store_ok) == [True], "the same record from another origin"
        assert len((await call(honest, victim, "rpc_ping", ping, dht_messages.PingResponse, 10.0)).peer.node_id) == 20


async def test_a_refused_call_looks_nothing_up(tmp_path: Path) -> None:
    async with network(tmp_path, manifest_of_now()) as start:
        victim = await start("victim", check=by_value)
        attacker = await start("attacker", check=by_value, bootstrap=victim.addresses(), host="127.0.0.2")
        assert victim._dht
        for number in range(answers.MAX_KEYS_PER_FIND):
            for owner in range(200):
                keep(victim, f"run/claims/{number}", f"owner {owner}", 100)
        protocol, find = victim._dht._protocol, dht_messages.FindRequest()
        find.keys.extend(DHTID.generate(source=f"run/claims/{n}").to_bytes() for n in range(answers.MAX_KEYS_PER_FIND))
        looked: list[DHTID] = []
        kept = protocol.kept
        protocol.kept = lambda key: looked.append(key) or kept(key)  # type: ignore[method-assign]
        protocol.calls = NewcomerLimit(at_once=3, per_second=0.001)
        await failure_of(call(attacker, victim, "rpc_find", find, dht_messages.FindResponse, 10.0))
        assert looked == []
        protocol.calls = NewcomerLimit(answers.CALLS_AT_ONCE)
        await call(attacker, victim, "rpc_find", find, dht_messages.FindResponse, 10.0)
        assert len(looked) == answers.MAX_KEYS_PER_FIND


def test_an_answer_without_room_for_all_holds_random_records() -> None:
    records = KeyRecords()
    for number in range(300):
        records.store(f"owner {number}", bytes(1000), time.time() + 100 + number)
    chosen = [set(dict(sample_within(records, 50_000)[0].items())) for _ in range(2)]
    assert all(40 < len(each) < 50 for each in chosen)
    assert chosen[0] != chosen[1]
    everything, size = sample_within(records, answers.ANSWER_BYTES)
    assert len(dict(everything.items())) == 300
    assert 300_000 < size < answers.ANSWER_BYTES
    assert everything.latest_expiration_time == records.latest_expiration_time
