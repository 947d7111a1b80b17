"""Old and new software in one swarm: what nobody knows yet is carried or shown, and a sentence says what to install."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lutetia.protocol.dht_records import read_records
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.rpc.introduction import HELLO, PROTOCOL_VERSION, STATUS, Hello, serve_document
from lutetia.protocol.schema import records
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import Hardware, NodeRecord, node_key
from lutetia.protocol.schema.ticket import Ticket
from lutetia.protocol.transport.hivemind.transport import HivemindTransport, connect_hivemind
from tests.faults.world.pair import Pair, owner
from tests.faults.world.processes import say
from tests.faults.world.world import LEASE
from tests.protocol.networks import Anything

COORDINATOR = Identity.derived("coordinator from tomorrow")


def tomorrows_record(author: Identity, run: str, addresses: tuple[str, ...], expires: float) -> bytes:
    """A node record with a field that this version does not know, signed as it should be."""
    record = NodeRecord(
        run=run, owner=author.public_key, issued=time.time(), peer_id=author.peer_id, addresses=addresses,
        hardware=Hardware(device="cpu", memory_bytes=1, cores=1), samples_per_second=1.0, software="9.9.9", state="idle",
    )  # fmt: skip
    value = record.model_dump(mode="json") | {"mood": "fine"}
    signed = canonical({"key": record.key(), "expires": expires, "record": value})
    return canonical({"record": value, "signature": author.sign(records._SIGNING_DOMAIN + signed)})


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.timeout(900)
async def test_a_record_with_a_field_that_nobody_knows_yet(pair: Pair, tmp_path: Path) -> None:
    """F16. It is stored and found with all that its owner wrote, and the coordinator shows the node."""
    holder, _ = await pair.ready()
    ticket, manifest, tomorrow = Ticket.decode(pair.world.run.ticket), pair.world.run.manifest, Identity.generate()
    newer = await connect_hivemind(
        tomorrow, listen="/ip4/127.0.0.1/tcp/0", check=Anything(), bootstrap=ticket.addresses, state_folder=tmp_path / "newer"
    )
    try:
        expires = time.time() + LEASE
        key = node_key(manifest.run_id, tomorrow.public_key)
        sealed = tomorrows_record(tomorrow, manifest.run_id, tuple(newer.addresses()), expires)
        assert await newer.store(key, tomorrow.public_key, sealed, expires)
    finally:
        await newer.close()
    same = await connect_hivemind(
        tomorrow, listen="/ip4/127.0.0.1/tcp/0", check=record_check(manifest, time.time), bootstrap=ticket.addresses,
        state_folder=tmp_path / "same",
    )  # fmt: skip
    try:
        held = await owner(holder)
        assert held in [record.owner for record, _ in await read_records(same, node_key(manifest.run_id, held))]
        [found] = [record for record, _ in await read_records(same, key) if record.owner == tomorrow.public_key]
        assert found.model_dump()["mood"] == "fine"
    finally:
        await same.close()
    await pair.coordinator.accepts(1)


@dataclass
class Tomorrow:
    """A lone peer of newer software, and the ticket that leads to it."""

    peer: HivemindTransport
    ticket: Ticket
    status: dict


@pytest.fixture
async def tomorrow(tmp_path: Path, finished_status: dict) -> AsyncIterator[Tomorrow]:
    peer = await HivemindTransport.start(COORDINATOR, listen="/ip4/127.0.0.1/tcp/0", state_folder=tmp_path / "tomorrow")
    ticket = Ticket(run=finished_status["run"], owner=COORDINATOR.public_key, addresses=tuple(peer.addresses()))
    yield Tomorrow(peer, ticket, finished_status)
    await peer.close()


@pytest.fixture
def finished_status() -> dict:
    return {
        "format": 1, "run": "ab" * 32, "name": "tomorrow", "manifest_version": 1, "time": time.time(), "software": "9.9.9",
        "coordinator": COORDINATOR.public_key, "shards": [],
    }  # fmt: skip


async def test_a_swarm_that_speaks_a_newer_protocol(tomorrow: Tomorrow, tmp_path: Path) -> None:
    """F16. An older box is told which version the swarm has, and that it should install it."""
    run = tomorrow.ticket.run
    newest = PROTOCOL_VERSION + 2
    hello = Hello(run=run, protocol=newest, oldest=newest - 1, software="9.9.9", clock=time.time(), manifest_version=1)
    await serve_document(tomorrow.peer, "/lutetia/manifest/1", lambda: b"{}")
    await serve_document(tomorrow.peer, HELLO, lambda: canonical(hello))
    joined = await say("join", tomorrow.ticket.encode(), "--state-folder", tmp_path / "old", "--listen", "/ip4/127.0.0.1/tcp/0")
    assert joined.code == 10, joined.err
    assert f"the swarm speaks protocol {newest} (software 9.9.9), this node 1 to {PROTOCOL_VERSION}" in joined.sentence()
    assert "install the matching version" in joined.sentence()


async def test_a_status_with_a_field_that_nobody_knows_yet(tomorrow: Tomorrow) -> None:
    """F16. What a newer coordinator says besides is passed over: the rest is shown as if it had not been said."""
    await serve_document(tomorrow.peer, STATUS, lambda: json.dumps(tomorrow.status).encode())
    plain = await say("swarm", "status", tomorrow.ticket.encode(), "--json")
    assert plain.code == 0, plain.err
    tomorrow.status["mood"] = "fine"
    shown = await say("swarm", "status", tomorrow.ticket.encode(), "--json")
    assert shown.code == 0, shown.err
    assert shown.out == plain.out


async def test_a_status_with_a_state_that_nobody_knows_yet(tomorrow: Tomorrow) -> None:
    """F16. A new word is shown as it is; what is no status is refused in one sentence that says that one side is too old."""
    tomorrow.status["shards"] = [
        {"shard": 0, "name": "a", "epoch": 0, "epochs": 1, "samples": 0, "samples_budget": 1, "state": "dreaming"}
    ]
    await serve_document(tomorrow.peer, STATUS, lambda: json.dumps(tomorrow.status).encode())
    shown = await say("swarm", "status", tomorrow.ticket.encode())
    assert shown.code == 0, shown.err
    assert "dreaming" in shown.out
    tomorrow.status["shards"][0]["epoch"] = "many"
    refused = await say("swarm", "status", tomorrow.ticket.encode())
    assert refused.code == 50, refused.err
    assert "shards.0.epoch" in refused.sentence()
    assert "update lutetia on one of the two sides" in refused.sentence()
