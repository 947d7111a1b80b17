"""The owner's requests from another machine: signed, for one run, for minutes, and once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lutetia.coordinator.admin.upgrade import published, published_since, put_version
from lutetia.coordinator.ledger.describe import sentence
from lutetia.coordinator.ledger.events import ManifestPublished
from lutetia.coordinator.owner.orders import ordered
from lutetia.coordinator.owner.service import REQUESTS_PER_MINUTE, OwnerService
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.runtime.manifest_watch import ManifestWatch
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.rpc.framing import read_message, write_message
from lutetia.protocol.rpc.manifest_sync import LiveManifest
from lutetia.protocol.rpc.owner_request import (
    MAX_ANSWER_BYTES,
    MAX_REQUEST_BYTES,
    OWNER,
    REQUEST_SECONDS,
    OwnerAnswer,
    SignedRequest,
    open_request,
    sign_request,
)
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest, SignedManifest
from lutetia.protocol.schema.owner.orders import MOST_BANS, Order, OwnerOrders, given_orders, with_order
from lutetia.protocol.schema.records import ClaimRecord, RecordRefused, seal
from lutetia.system.errors import AuthorisationError, ConfigError
from tests.coordinator.acceptance.judge_driver import COORDINATOR, PEERS, START, make_manifest
from tests.coordinator.acceptance.judge_driver import OWNER as OWNER_KEY
from tests.memory_transport.network import MemoryNetwork
from tests.memory_transport.transport import MemoryTransport
from tests.memory_transport.virtual_time import run_virtual

NOW, SKEW = START + 100.0, 30.0
FIRST = make_manifest()
PAUSE = Order("pause", text="moving house")


def request(order: Order = PAUSE, old: Manifest = FIRST, owner: Identity = OWNER_KEY, now: float = NOW) -> SignedRequest:
    return sign_request(SignedManifest.sign(ordered(old, order, now), OWNER_KEY), owner, now)


def test_request_is_opened_once_it_is_the_owners_and_the_next():
    newer = open_request(canonical(request()), FIRST, NOW, SKEW).manifest
    assert newer.orders.paused is not None
    assert (newer.version, newer.orders.paused.text) == (2, "moving house")


def test_replayed_expired_foreign_and_forged_requests_are_refused():
    good = request()
    carried_out = open_request(canonical(good), FIRST, NOW, SKEW).manifest
    other_run = make_manifest(name="other")
    changed = good.model_copy(update={"request": good.request.model_copy(update={"expires": good.request.expires + 1})})
    inside = good.request.model_copy(update={"version": 2, "manifest": SignedManifest.sign(FIRST, OWNER_KEY).to_bytes().decode()})
    domain = b"lutetia-owner-request-1\n"
    older = SignedRequest(request=inside, signature=OWNER_KEY.sign(domain + canonical(inside)))
    refused = (AuthorisationError, ConfigError)
    for given, current, now, words in (
        (good, carried_out, NOW, "was carried out before"),
        (good, FIRST, NOW + REQUEST_SECONDS + SKEW, "expired"),
        (good, FIRST, NOW - SKEW - 1, "clock"),
        (good, other_run, NOW, "is for run"),
        (request(owner=PEERS[0]), FIRST, NOW, "not signed by the run's owner"),
        (changed, FIRST, NOW, "not signed by the run's owner"),
        (older, FIRST, NOW, "another version"),
    ):
        with pytest.raises(refused, match=words):
            open_request(canonical(given), current, now, SKEW)
    for junk in (b"", b"[]", b"\xff", b"[" * 100_000, b'{"request":{},"signature":""}'):
        with pytest.raises(AuthorisationError, match="malformed"):
            open_request(junk, FIRST, NOW, SKEW)


@dataclass
class Served:
    """A coordinator that answers owners, without the rest of it."""

    folder: RunFolder
    live: LiveManifest
    transport: MemoryTransport
    adopted: list[int] = field(default_factory=list)

    async def start(self) -> None:
        async def apply() -> None:
            self.adopted.append(self.live.version)

        watch = ManifestWatch(self.folder, self.live, COORDINATOR, apply)
        await OwnerService(self.transport, self.live, watch, lambda: 0).serve()


async def ask(peer: MemoryTransport, data: bytes) -> OwnerAnswer:
    """Send `data` as the light client does."""
    stream = await peer.open_stream(COORDINATOR.peer_id, OWNER)
    try:
        answer = OwnerAnswer.model_validate_json(await read_message(stream, MAX_ANSWER_BYTES))
        if not answer.text:
            await write_message(stream, data)
            answer = OwnerAnswer.model_validate_json(await read_message(stream, MAX_ANSWER_BYTES))
        return answer
    finally:
        await stream.close()


def test_coordinator_carries_a_request_out_once_and_survives_everything_else(tmp_path: Path):
    folder = RunFolder(tmp_path)
    signed = SignedManifest.sign(FIRST, OWNER_KEY)
    folder.manifest.write_bytes(signed.to_bytes())

    async def scenario() -> None:
        network = MemoryNetwork(seed=1)
        transport, visitor = (network.peer(who, lambda key, *rest: key or "") for who in (COORDINATOR, PEERS[0]))
        served = Served(folder, LiveManifest(signed), transport)
        await served.start()
        now = transport.now()
        bytes_sent = canonical(request(now=now))
        done = await ask(visitor, bytes_sent)
        assert (done.done, done.version, served.adopted) == (True, 2, [2])
        assert folder.version(1).read_bytes() == signed.to_bytes()
        before = folder.manifest.read_bytes()
        replayed = await ask(visitor, bytes_sent)
        assert (replayed.done, replayed.version) == (False, 2)
        assert "was carried out before" in replayed.text
        forged = await ask(visitor, canonical(request(Order("resume"), served.live(), PEERS[0], now)))
        assert "not signed by the run's owner" in forged.text
        with pytest.raises(ConnectionError):  # only that stream ends
            await ask(visitor, b"x" * (MAX_REQUEST_BYTES + 1))
        answers = [await ask(visitor, b"{}") for _ in range(REQUESTS_PER_MINUTE)]
        assert "too many requests from this address" in answers[-1].text
        assert folder.manifest.read_bytes() == before
        assert (served.live.version, served.adopted) == (2, [2])

    run_virtual(scenario)


def test_orders_follow_each_other_and_say_what_they_change():
    orders, told = OwnerOrders(), []
    peer = PEERS[0].public_key
    for order in (PAUSE, Order("ban", peer, "spam"), Order("hide-name", peer), Order("resume"), Order("unban", peer)):
        newer = with_order(orders, order, NOW)
        told += [(given.order, given.peer, given.text) for given in given_orders(orders, newer)]
        orders = newer
        again = {"pause": "paused already", "resume": "not paused", "ban": "banned already", "unban": "not banned"}
        with pytest.raises(ConfigError, match=again.get(order.kind, "hidden already")):
            with_order(orders, order, NOW)
    assert told == [
        ("pause", None, "moving house"), ("ban", peer, "spam"), ("hide-name", peer, ""), ("resume", None, ""),
        ("unban", peer, ""),
    ]  # fmt: skip
    assert given_orders(orders, with_order(orders, Order("show-name", peer), NOW))[0].order == "show-name"


def test_owner_and_coordinators_cannot_be_banned_and_bans_have_a_limit():
    for key in (OWNER_KEY, COORDINATOR):
        with pytest.raises(ConfigError, match="cannot be banned"):
            ordered(FIRST, Order("ban", key.public_key), NOW)
    orders = OwnerOrders()
    for number in range(MOST_BANS):
        orders = with_order(orders, Order("ban", f"{number:064x}"), NOW)
    with pytest.raises(ConfigError, match="banned already; lift some"):
        with_order(orders, Order("ban", "f" * 64), NOW)


def test_orders_that_were_signed_while_the_run_was_not_served_are_events_each(tmp_path: Path):
    folder, signed = RunFolder(tmp_path), SignedManifest.sign(FIRST, OWNER_KEY)
    folder.manifest.write_bytes(signed.to_bytes())
    for order in (PAUSE, Order("ban", PEERS[0].public_key, "spam"), Order("resume")):
        newer = SignedManifest.sign(ordered(signed.manifest, order, NOW), OWNER_KEY)
        put_version(folder, signed, newer)
        signed = newer
    events = published_since(folder, signed.manifest, 1, COORDINATOR.public_key, NOW)
    assert [sentence(event) for event in events] == [
        "manifest version 2 published: the owner paused the run: moving house",
        f"manifest version 3 published: the owner banned peer {PEERS[0].public_key[:8]}: spam",
        "manifest version 4 published: the owner resumed the run",
    ]
    assert isinstance(events[0], ManifestPublished)
    assert published(FIRST, COORDINATOR.public_key, NOW).orders == ()


def test_banned_peers_records_are_refused_by_every_peer():
    peer, current = PEERS[0], [FIRST]
    record = ClaimRecord(run=FIRST.run_id, owner=peer.public_key, issued=NOW, shard=0, epoch=0, samples=0, state="training")
    check = record_check(lambda: current[0], lambda: NOW)
    sealed = seal(record, peer, NOW + 5)
    assert check(record.key(), peer.public_key, sealed, NOW + 5) == record.key()
    current[0] = ordered(FIRST, Order("ban", peer.public_key, "spam"), NOW)
    with pytest.raises(RecordRefused, match="the run's owner has banned this peer: spam"):
        check(record.key(), peer.public_key, sealed, NOW + 5)
