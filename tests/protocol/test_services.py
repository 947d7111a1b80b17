"""Documents, records, their check and the helpers for asyncio, on the memory network."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from lutetia.protocol.async_helpers import gather_quickly, keep_cancellation, wait_for_thread
from lutetia.protocol.dht_records import publish, read_records
from lutetia.protocol.peerstore import MAX_PEERS, Peerstore
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.rpc.introduction import (
    HELLO,
    MANIFEST,
    MAX_DOCUMENT_BYTES,
    PROTOCOL_VERSION,
    SERVE_TIMEOUT,
    Hello,
    ask_document,
    serve_document,
    serve_introduction,
)
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import SignedManifest
from lutetia.protocol.schema.records import NodeRecord, Record, RecordRefused, claim_key, seal
from lutetia.protocol.transport.base import Stream
from tests.memory_transport.network import MemoryNetwork
from tests.memory_transport.transport import MemoryTransport
from tests.memory_transport.virtual_time import run_virtual
from tests.protocol.example_documents import COORDINATOR, NOW, OWNER, PEER, STRANGER, manifest, records

RUN = manifest(4)
KINDS = sorted(records())


def simulated(scenario: Callable[[MemoryTransport, MemoryTransport], Awaitable[None]]) -> Callable[[], None]:
    """Two peers of the run, at the time of the test documents."""

    async def main() -> None:
        network = MemoryNetwork()
        check = record_check(RUN, network.now)
        await scenario(network.peer(PEER, check), network.peer(STRANGER, check))

    def test() -> None:
        run_virtual(main, NOW)

    test.__name__, test.__doc__ = scenario.__name__, scenario.__doc__
    return test


@simulated
async def test_a_document_is_made_at_each_request(peer: MemoryTransport, other: MemoryTransport) -> None:
    await serve_document(peer, "/test/time", lambda: str(peer.now()).encode())
    first = await ask_document(other, peer.peer_id, "/test/time")
    await asyncio.sleep(5)
    assert float(await ask_document(other, peer.peer_id, "/test/time")) > float(first) + 5


@simulated
async def test_documents_are_bounded_in_size(peer: MemoryTransport, other: MemoryTransport) -> None:
    await serve_document(peer, "/test/large", lambda: bytes(100))
    await serve_document(peer, "/test/whole", lambda: bytes(MAX_DOCUMENT_BYTES))
    with pytest.raises(ConnectionError, match="larger than 99"):
        await ask_document(other, peer.peer_id, "/test/large", limit_bytes=99)
    assert len(await ask_document(other, peer.peer_id, "/test/whole")) == MAX_DOCUMENT_BYTES

    async def boast(stream: Stream) -> None:
        await stream.write(b"\xff\xff\xff\xff")
        await stream.read_exactly(1)

    await peer.serve("/test/boast", boast)
    with pytest.raises(ConnectionError, match="refused"):
        await ask_document(other, peer.peer_id, "/test/boast")


@simulated
async def test_documents_are_bounded_in_time(peer: MemoryTransport, other: MemoryTransport) -> None:
    await peer.serve("/test/silent", lambda stream: asyncio.sleep(3600))
    start = peer.now()
    with pytest.raises(ConnectionError, match="did not answer /test/silent within 10 s"):
        await ask_document(other, peer.peer_id, "/test/silent")
    assert peer.now() - start == pytest.approx(10)
    await serve_document(peer, "/test/taken", lambda: bytes(10))
    stream = await other.open_stream(peer.peer_id, "/test/taken")
    await stream.read_exactly(14)
    with pytest.raises(ConnectionError):  # a peer that does not acknowledge is cut off
        await stream.read_exactly(1)
    assert peer.now() - start < 12 + SERVE_TIMEOUT


@simulated
async def test_a_peer_introduces_itself(peer: MemoryTransport, other: MemoryTransport) -> None:
    signed = SignedManifest.sign(RUN, OWNER)
    await serve_introduction(peer, lambda: signed)
    hello = Hello.model_validate_json(await ask_document(other, peer.peer_id, HELLO))
    assert (hello.run, hello.manifest_version, hello.protocol) == (RUN.run_id, 1, PROTOCOL_VERSION)
    assert hello.clock == pytest.approx(peer.now(), abs=1)
    assert SignedManifest.model_validate_json(await ask_document(other, peer.peer_id, MANIFEST)) == signed


@simulated
async def test_records_are_read_in_the_order_of_their_owners(peer: MemoryTransport, other: MemoryTransport) -> None:
    for author, transport in ((PEER, peer), (STRANGER, other)):
        assert await publish(transport, author, records(author, RUN.run_id)["claim"], 30)
    found = await read_records(other, claim_key(RUN.run_id, 3))
    assert [record.owner for record, _ in found] == sorted([PEER.public_key, STRANGER.public_key])
    assert all(expires == pytest.approx(NOW + 30, abs=1) for _, expires in found)


@simulated
async def test_each_publication_replaces_the_one_before(peer: MemoryTransport, other: MemoryTransport) -> None:
    claim = records(PEER, RUN.run_id)["claim"]
    for samples, ttl in ((1, 40.0), (2, 20.0), (3, 20.0)):
        assert await publish(peer, PEER, claim.model_copy(update={"samples": samples}), ttl)
    ((record, _),) = await read_records(other, claim.key())
    assert getattr(record, "samples", None) == 3


@pytest.mark.parametrize("jump", [20.0, 3600.0])
def test_records_are_stored_after_a_clock_jumped_and_returned(jump: float) -> None:
    """Records that were sealed in between stay on the node itself and are refused by all others."""

    @simulated
    async def scenario(peer: MemoryTransport, other: MemoryTransport) -> None:
        claim = records(PEER, RUN.run_id)["claim"]

        async def say(samples: int) -> bool:
            issued = claim.model_copy(update={"samples": samples, "issued": peer.now()})
            return await publish(peer, PEER, issued, 60)

        assert await say(1)
        peer.skew = jump
        assert await say(2) == (jump < 30)
        await asyncio.sleep(5)
        peer.skew = 0.0
        await asyncio.sleep(5)
        assert await say(3)
        ((record, _),) = await read_records(other, claim.key())
        assert getattr(record, "samples", None) == 3

    scenario()


@simulated
async def test_another_node_under_the_same_identity_is_reported(peer: MemoryTransport, other: MemoryTransport) -> None:
    complaints: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: complaints.append(record.getMessage())
    logging.getLogger("lutetia.protocol.dht_records").addHandler(handler)
    ours = records(PEER, RUN.run_id)["node"]
    for _ in range(3):
        await publish(peer, PEER, ours, 30)
        await asyncio.sleep(1)
    assert complaints == []
    await publish(other, PEER, ours, 30)  # a copied key
    await publish(peer, PEER, ours, 30)
    assert len(complaints) == 1
    assert "another node is online under this identity" in complaints[0]


def checked(record: Record, author: Identity, expires: float = NOW + 30, **changes: Any) -> str:
    return record_check(manifest(4, **changes), lambda: NOW)(None, record.owner, seal(record, author, expires), expires)


@pytest.mark.parametrize("kind", KINDS)
def test_only_records_of_this_run_pass(kind: str) -> None:
    author = COORDINATOR if kind == "acceptance" else PEER
    record = records(PEER, RUN.run_id)[kind]
    assert checked(record, author) == record.key()
    with pytest.raises(RecordRefused, match="not of"):
        checked(records()[kind], author)


def test_an_owner_off_the_allowlist_is_refused() -> None:
    guarded = manifest(4, allowlist=(PEER.public_key,))
    check = record_check(guarded, lambda: NOW)
    for author, kind in ((PEER, "claim"), (COORDINATOR, "acceptance")):
        record = records(author, guarded.run_id)[kind]
        assert check(None, record.owner, seal(record, author, NOW + 30), NOW + 30) == record.key()
    record = records(STRANGER, guarded.run_id)["claim"]
    with pytest.raises(RecordRefused, match="allowlist"):
        check(None, record.owner, seal(record, STRANGER, NOW + 30), NOW + 30)


def test_a_shard_that_the_run_does_not_have_is_refused() -> None:
    record = records(PEER, RUN.run_id)["claim"].model_copy(update={"shard": 4})
    with pytest.raises(RecordRefused, match="does not exist: the run has 4"):
        checked(record, PEER)


@pytest.mark.parametrize("kind", ["node", "checkpoint", "provider"])
def test_a_record_that_names_another_peer_is_refused(kind: str) -> None:
    record = records(PEER, RUN.run_id)[kind]
    for changes in (
        {"peer_id": STRANGER.peer_id},
        {"addresses": (f"/ip4/127.0.0.1/tcp/1/p2p/{STRANGER.peer_id}",)},
    ):
        with pytest.raises(RecordRefused, match="names another peer"):
            checked(record.model_copy(update=changes), PEER)


def test_the_peerstore_keeps_the_newest_and_survives_damage(tmp_path: Path) -> None:
    cache = Peerstore(tmp_path / "peers.json")
    assert cache.load() == []
    addresses = [
        f"/ip4/192.0.2.{number}/tcp/1/p2p/{Identity.derived(str(number)).peer_id}" for number in range(1, MAX_PEERS + 11)
    ]
    for start in range(0, len(addresses), 10):
        cache.remember(addresses[start : start + 10])
    assert len(cache.load()) == MAX_PEERS
    assert cache.load()[:4] == addresses[70:74]
    assert addresses[0] not in cache.load()
    cache.remember([], gone=addresses[70:72])
    assert cache.load()[:2] == addresses[72:74]
    cache.path.write_text('["nonsense"]')
    assert cache.load() == []


def test_the_peerstore_takes_only_peers_that_were_spoken_to(tmp_path: Path) -> None:
    cache, node = Peerstore(tmp_path / "peers.json"), records()["node"]
    assert isinstance(node, NodeRecord)
    cache.remember_nodes([node], {})
    assert cache.load() == []
    gone, own = node.model_copy(update={"state": "left"}), records(STRANGER)["node"]
    met = {node.peer_id: "/ip4/127.0.0.1/tcp/9", STRANGER.peer_id: "/ip4/127.0.0.1/tcp/8"}
    cache.remember_nodes([gone, own, records()["claim"]], met, except_peer=STRANGER.peer_id)
    assert cache.load() == []
    many = node.model_copy(update={"addresses": tuple(f"/ip4/10.0.0.{n}/tcp/1/p2p/{node.peer_id}" for n in range(8))})
    cache.remember_nodes([many], met)
    assert cache.load() == [f"/ip4/127.0.0.1/tcp/9/p2p/{node.peer_id}", many.addresses[0]]


def test_gathering_does_not_wait_for_slow_calls() -> None:
    async def after(seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    async def main() -> tuple[list[float | None], list[float | None], float]:
        loop = asyncio.get_running_loop()
        start = loop.time()
        some = await gather_quickly([after(1), after(60), after(1.5)], lambda seconds: seconds >= 1, grace=1.0)
        took = loop.time() - start
        return some, await gather_quickly([after(1), after(2)], lambda seconds: False), took

    some, every, took = run_virtual(main)
    assert some == [1, None, 1.5]
    assert every == [1, 2]
    assert took == pytest.approx(2.0)


async def test_a_cancellation_with_the_result_is_not_lost() -> None:
    """As hivemind's calls do in Python 3.11: `wait_for` returns the result and loses the cancellation."""
    answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def call() -> int:
        return await asyncio.wait_for(answer, 60)

    asking = asyncio.create_task(keep_cancellation(call()))
    await asyncio.sleep(0)
    answer.set_result(1)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking


async def test_a_call_without_cancellation_returns_its_result() -> None:
    assert await keep_cancellation(asyncio.sleep(0, "answer")) == "answer"


async def test_errors_of_an_abandoned_thread_are_dropped() -> None:
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    begun, going_on = threading.Event(), threading.Event()

    def fails() -> None:
        begun.set()
        going_on.wait(60)
        raise OSError("a full disk")

    asking = asyncio.create_task(wait_for_thread(asyncio.to_thread(fails)))
    await asyncio.to_thread(begun.wait, 60)
    asking.cancel()
    await asyncio.sleep(0)
    going_on.set()
    with pytest.raises(asyncio.CancelledError):
        await asking
    del asking
    await asyncio.sleep(0)  # the loop itself releases it one iteration later
    gc.collect()
    assert not complaints
