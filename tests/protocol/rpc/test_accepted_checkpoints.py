"""Lists of accepted checkpoints and newer manifests from any peer: only the signatures in them count."""

from __future__ import annotations

import time

import pytest

from lutetia.protocol.dht_records import publish
from lutetia.protocol.rpc.accepted_checkpoints import (
    AcceptedDocument,
    AcceptedEntry,
    AcceptedService,
    live_nodes,
    newest_of,
    read_accepted,
)
from lutetia.protocol.rpc.introduction import ask_document, serve_introduction
from lutetia.protocol.rpc.manifest_sync import (
    MANIFEST_UPDATE,
    LiveManifest,
    announce_version,
    fetch_newer,
    read_version,
    version_at,
)
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import SignedManifest
from lutetia.protocol.schema.manifest_upgrade import UpgradeRefused, next_version
from lutetia.protocol.schema.records import AcceptanceRecord, Hardware, NodeRecord, ProviderRecord, seal
from lutetia.protocol.transport.base import Stream, Transport
from lutetia.system.errors import IntegrityError
from tests.protocol.example_documents import COORDINATOR, NOW, OWNER, PEER, STRANGER, blob, manifest
from tests.protocol.networks import Memory, honest, manifest_of_now

RUN = manifest()
HOLDER = f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER.peer_id}"


def acceptance(run: str = RUN.run_id, signer: Identity = COORDINATOR, **fields: object) -> AcceptanceRecord:
    values: dict[str, object] = {
        "run": run, "owner": signer.public_key, "issued": NOW, "shard": 0, "epoch": 1, "checkpoint": "5" * 64, "parent": None,
        "weights": blob("1"), "state": blob("2"), "samples": 8, "author": PEER.public_key, "tenure_until": NOW,
        "holdout_loss": 0.4,
    }  # fmt: skip
    return AcceptanceRecord.model_validate(values | fields)


def entry(record: AcceptanceRecord, signer: Identity = COORDINATOR, expires: float = NOW + 600) -> AcceptedEntry:
    return AcceptedEntry(sealed=seal(record, signer, expires).decode(), expires=expires, holders=(HOLDER,))


def test_only_acceptances_of_a_coordinator_are_read():
    good = acceptance(epoch=3)
    document = AcceptedDocument(
        entries=(
            entry(acceptance(epoch=2)),
            entry(good),
            entry(acceptance(signer=STRANGER, epoch=9), STRANGER),
            entry(acceptance(epoch=9), STRANGER),
            entry(acceptance(run="cd" * 32, epoch=9)),
            entry(acceptance(epoch=9), expires=NOW - 1),
            entry(acceptance(shard=77)),
            AcceptedEntry(sealed="{", expires=NOW + 600),
        )
    )
    assert read_accepted(canonical(document), RUN, NOW) == [(good, (HOLDER,))]


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"format":2}', b'{"entries":[{"sealed":1,"expires":0}]}', b"\xff"])
def test_a_malformed_list_is_refused_in_one_sentence(data: bytes):
    with pytest.raises(IntegrityError, match="ask another peer") as caught:
        read_accepted(data, RUN, NOW)
    assert "\n" not in str(caught.value)


async def put(transport: Transport, who: Identity, record: NodeRecord | ProviderRecord | AcceptanceRecord) -> None:
    assert await publish(transport, who, record, 30)


async def test_holders_are_online_and_hold_weights_and_state():
    run, network, now = manifest_of_now(), Memory(), time.time()
    peers = {name: Identity.derived(name) for name in ("ann", "bob", "cid")}
    transports = {name: await network.peer(name, honest(run)) for name in peers}
    coordinator = network.network.peer(COORDINATOR, honest(run))
    given = acceptance(run.run_id, issued=now, tenure_until=now)
    await put(coordinator, COORDINATOR, given)
    for name, who in peers.items():
        place = {"run": run.run_id, "owner": who.public_key, "issued": now, "peer_id": who.peer_id}
        state = "left" if name == "cid" else "idle"
        hardware = Hardware(device="cpu", memory_bytes=1, cores=1)
        node = NodeRecord(**place, hardware=hardware, samples_per_second=1.0, software="0", state=state)  # type: ignore[arg-type]
        await put(transports[name], who, node)
        for ref in (given.weights,) if name == "bob" else (given.weights, given.state):
            await put(transports[name], who, ProviderRecord(**place, blob=ref.digest))
    nodes = await live_nodes(transports["bob"], run.run_id)
    assert {node.owner for node in nodes} == {peers["ann"].public_key, peers["bob"].public_key}
    found = await newest_of(transports["bob"], run, 0, {node.owner for node in nodes})
    assert found
    assert found.holders == (peers["ann"].public_key,), "bob lacks one blob, cid has left"
    assert await newest_of(transports["bob"], run, 1, set()) is None

    await AcceptedService(transports["bob"], LiveManifest(SignedManifest.sign(run, OWNER))).serve()
    data = await ask_document(transports["ann"], transports["bob"].peer_id, "/lutetia/accepted/1")
    assert [record.checkpoint for record, _ in read_accepted(data, run, now)] == [given.checkpoint]


async def test_a_newer_manifest_is_adopted_only_if_its_owner_signed_it():
    first = manifest_of_now()
    second = next_version(first, {"holdout_tolerance": 0.5}, time.time())
    broken = second.model_copy(update={"version": 9, "checkpoint_samples": second.samples_per_shard})
    network = Memory()
    honest_one, liar, node = [await network.peer(name, honest(first)) for name in ("honest", "liar", "node")]
    await serve_introduction(honest_one, lambda: SignedManifest.sign(second, OWNER))
    await serve_introduction(liar, lambda: SignedManifest.sign(broken, OWNER))
    live, announced = LiveManifest(SignedManifest.sign(first, OWNER)), []

    async def receive(stream: Stream) -> None:
        announced.append((stream.peer_id, await read_version(stream)))

    await node.serve(MANIFEST_UPDATE, receive)
    await announce_version(honest_one, 2, node.peer_id)
    await announce_version(liar, 2**64 - 1, node.peer_id)
    assert announced == [(honest_one.peer_id, 2), (liar.peer_id, 2**64 - 1)]
    assert await version_at(node, honest_one.peer_id) == (first.run_id, 2)
    with pytest.raises(UpgradeRefused, match="checkpoint_samples"):
        await fetch_newer(node, live, liar.peer_id)
    assert await fetch_newer(node, live, honest_one.peer_id)
    assert not await fetch_newer(node, live, honest_one.peer_id)
    assert live.version == 2
