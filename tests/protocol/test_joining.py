"""Joining a swarm over real libp2p, and what a newcomer believes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from lutetia.protocol.dht_records import publish, read_records
from lutetia.protocol.joining import PEERS_FILE, Introduction, check_clock, choose_manifest, join_swarm, remember_nodes
from lutetia.protocol.peerstore import Peerstore
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.rpc.introduction import Hello, serve_introduction
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest, SignedManifest
from lutetia.protocol.schema.records import Hardware, NodeRecord, node_key
from lutetia.protocol.schema.ticket import Ticket
from lutetia.protocol.transport.base import Transport
from lutetia.protocol.transport.hivemind.p2pd_client import P2pdClient
from lutetia.protocol.transport.hivemind.transport import HivemindTransport, connect_hivemind
from lutetia.system.errors import AuthorisationError, BootstrapError, ConfigError, IdentityError
from tests.memory_transport.network import MemoryNetwork
from tests.protocol.example_documents import COORDINATOR, NOW, OWNER, STRANGER, manifest
from tests.protocol.networks import LOOPBACK, manifest_of_now

FIRST, SECOND = Identity.derived("first"), Identity.derived("second")
HERE = f"/ip4/127.0.0.1/tcp/4001/p2p/{COORDINATOR.peer_id}"


@dataclass
class Run:
    """A coordinator that is online, and its ticket."""

    signed: SignedManifest
    ticket: Ticket
    coordinator: HivemindTransport
    folder: Path

    async def join(self, identity: Identity, name: str, ticket: Ticket | None = None) -> tuple[Transport, SignedManifest]:
        return await join_swarm(identity, ticket or self.ticket, listen=LOOPBACK, state_folder=self.folder / name)


@pytest_asyncio.fixture
async def run(tmp_path: Path) -> AsyncIterator[Run]:
    described = manifest_of_now()
    signed = SignedManifest.sign(described, OWNER)
    coordinator = await connect_hivemind(
        COORDINATOR, listen=LOOPBACK, check=record_check(described, time.time), state_folder=tmp_path / "coordinator"
    )
    await serve_introduction(coordinator, lambda: signed)
    ticket = Ticket(run=described.run_id, owner=described.owner, addresses=tuple(coordinator.addresses()))
    yield Run(signed, ticket, coordinator, tmp_path)
    await coordinator.close()


def node_record(identity: Identity, transport: Transport, run: str) -> NodeRecord:
    return NodeRecord(
        run=run, owner=identity.public_key, issued=time.time(), peer_id=identity.peer_id, addresses=tuple(transport.addresses()),
        hardware=Hardware(device="cpu", memory_bytes=1, cores=1), samples_per_second=1.0, software="0", state="idle",
    )  # fmt: skip


async def test_a_swarm_outlives_its_bootstrap_and_refuses_a_double(run: Run) -> None:
    """Join; a copied identity is refused; after the coordinator has left, a known node rejoins through peers met before."""
    first, signed = await run.join(FIRST, "first")
    assert signed == run.signed
    run_id = signed.manifest.run_id
    assert await publish(first, FIRST, node_record(FIRST, first, run_id), 60)

    second, _ = await run.join(SECOND, "second")
    ((seen, _),) = await read_records(second, node_key(run_id, FIRST.public_key))
    assert seen.owner == FIRST.public_key
    await second.close()

    with pytest.raises(IdentityError, match="another node is online under this identity, at /ip4"):
        await run.join(FIRST, "copy")

    await run.coordinator.close()
    second, again = await run.join(SECOND, "second")
    assert again == run.signed
    assert await publish(second, SECOND, node_record(SECOND, second, run_id), 60)
    await remember_nodes(first, run_id, Peerstore(run.folder / "first" / PEERS_FILE))  # as it does from time to time
    await first.close()

    back, _ = await run.join(FIRST, "first")  # its own old record at a dead address is not a double
    await back.close()
    await second.close()
    with pytest.raises(BootstrapError) as caught:
        await run.join(SECOND, "second")
    assert str(caught.value).count("connection refused") >= 2


@pytest.mark.parametrize("host", ["a..b", "a" * 64])
async def test_an_impossible_host_in_a_node_record_stops_no_join(run: Run, host: str) -> None:
    second, signed = await run.join(SECOND, "second")
    hostile = node_record(SECOND, second, signed.manifest.run_id)
    hostile = hostile.model_copy(update={"addresses": (f"/dns4/{host}/tcp/4001/p2p/{SECOND.peer_id}",)})
    assert await publish(second, SECOND, hostile, 60)
    for _ in range(2):
        first, _ = await run.join(FIRST, "first")
        await first.close()
    await second.close()


async def test_a_ticket_of_another_run_or_owner_is_refused(run: Run) -> None:
    other = run.ticket.model_copy(update={"run": "cd" * 32})
    with pytest.raises(ConfigError, match=f"serve run {run.ticket.run[:12]}, not {'cd' * 6}"):
        await run.join(FIRST, "first", other)
    forged = run.ticket.model_copy(update={"owner": STRANGER.public_key})
    with pytest.raises(AuthorisationError, match="ticket pins"):
        await run.join(FIRST, "first", forged)
    with pytest.raises(BootstrapError, match="this peer's own"):
        await run.join(COORDINATOR, "second")


async def test_joining_through_a_peer_without_introduction_is_refused(run: Run) -> None:
    await run.coordinator.serve("/lutetia/hello/2", lambda stream: stream.write(b"\0\0\0\1x"))
    with pytest.raises(BootstrapError, match="introduces itself"):
        await run.join(FIRST, "first")


async def test_joining_works_over_any_backend(tmp_path: Path) -> None:
    """Over the memory transport: `joining` uses nothing but the `Transport` interface."""
    network, described = MemoryNetwork(latency=0.001), manifest_of_now()
    signed = SignedManifest.sign(described, OWNER)
    coordinator = network.peer(COORDINATOR, record_check(described, time.time))
    await serve_introduction(coordinator, lambda: signed)
    ticket = Ticket(run=described.run_id, owner=described.owner, addresses=tuple(coordinator.addresses()))
    joined, found = await join_swarm(FIRST, ticket, state_folder=tmp_path, start=network.start)
    assert found == signed
    assert await publish(joined, FIRST, node_record(FIRST, joined, described.run_id), 60)
    ((seen, _),) = await read_records(coordinator, node_key(described.run_id, FIRST.public_key))
    assert seen.owner == FIRST.public_key
    await joined.close()
    await coordinator.close()


async def test_joining_through_dead_addresses_is_refused(tmp_path: Path) -> None:
    ticket = ticket_of(manifest_of_now())
    with pytest.raises(BootstrapError, match=f"{HERE}: .*could not be dialled"):
        await join_swarm(FIRST, ticket, state_folder=tmp_path, start=MemoryNetwork(timeout=0.01).start)


def ticket_of(described: Manifest) -> Ticket:
    return Ticket(run=described.run_id, owner=OWNER.public_key, addresses=(HERE,))


def met(signed: SignedManifest, offset: float = 0.0, doubt: float = 0.1) -> Introduction:
    hello = Hello(run=signed.manifest.run_id, protocol=1, software="0", clock=NOW, manifest_version=signed.manifest.version)
    return Introduction(COORDINATOR.peer_id, hello, signed.to_bytes(), offset, doubt)


def version(number: int, **changes: Any) -> SignedManifest:
    first = manifest(2)
    fields = {} if number == 1 else {"run": first.run_id, "version": number}
    return SignedManifest.sign(manifest(2, **fields, **changes), OWNER)


def test_the_newest_valid_manifest_wins_and_is_kept(tmp_path: Path) -> None:
    cached, ticket = tmp_path / "manifest.json", ticket_of(manifest(2))
    forged = version(9).model_copy(update={"signature": "0" * 128})
    assert choose_manifest(ticket, [met(version(1)), met(version(3)), met(forged)], cached, NOW) == version(3)
    assert SignedManifest.model_validate_json(cached.read_bytes()) == version(3)
    assert choose_manifest(ticket, [met(version(1))], cached, NOW) == version(3)
    fork = version(3, expires=NOW + 3000)
    assert choose_manifest(ticket, [met(fork), met(version(2))], cached, NOW) == version(3), (
        "no fork takes the place of a version"
    )


def test_an_older_manifest_is_refused_after_the_newer_expired(tmp_path: Path) -> None:
    cached, ticket = tmp_path / "manifest.json", ticket_of(manifest(2))
    choose_manifest(ticket, [met(version(2, expires=NOW + 10))], cached, NOW)
    with pytest.raises(ConfigError, match="older than 2"):
        choose_manifest(ticket, [met(version(1))], cached, NOW + 20)


def test_an_expired_manifest_or_another_owners_is_refused(tmp_path: Path) -> None:
    ticket = ticket_of(manifest(2))
    with pytest.raises(ConfigError, match="expired"):
        choose_manifest(ticket, [met(version(1))], tmp_path / "manifest.json", NOW + 7200)
    stranger = SignedManifest.sign(manifest(2, owner=STRANGER.public_key), STRANGER)
    with pytest.raises(AuthorisationError, match="ticket pins"):
        choose_manifest(ticket, [met(stranger)], tmp_path / "manifest.json", NOW)
    assert not (tmp_path / "manifest.json").exists()


def test_a_damaged_cache_counts_as_none(tmp_path: Path) -> None:
    cached = tmp_path / "manifest.json"
    cached.write_text("{")
    assert choose_manifest(ticket_of(manifest(2)), [met(version(1))], cached, NOW) == version(1)


def test_a_wrong_clock_is_refused_and_one_wrong_peer_ignored() -> None:
    check_clock([met(version(1), offset) for offset in (0.5, -1.0, 9999.0)], 30.0)
    check_clock([met(version(1), offset=34.0, doubt=5.0)], 30.0)
    with pytest.raises(ConfigError, match=r"clock is 47 s behind the swarm's, and the run allows 30 s; .*timedatectl"):
        check_clock([met(version(1), offset) for offset in (47.0, 47.2, -2.0)], 30.0)
    with pytest.raises(ConfigError, match="100 s ahead of"):
        check_clock([met(version(1), -100.0)], 30.0)


async def test_joining_does_not_wait_for_dead_addresses(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """One address of the ticket answers, another never does."""
    dial = P2pdClient.connect

    async def slow(self: P2pdClient, peer_id: str, addresses: Sequence[str], seconds: float = 8.0) -> None:
        if "/tcp/9/" in addresses[0]:
            await asyncio.Event().wait()
        await dial(self, peer_id, addresses, seconds)

    monkeypatch.setattr(P2pdClient, "connect", slow)
    dead = f"/ip4/127.0.0.1/tcp/9/p2p/{STRANGER.peer_id}"
    ticket = run.ticket.model_copy(update={"addresses": (dead, *run.ticket.addresses)})
    async with asyncio.timeout(120):
        first, _ = await run.join(FIRST, "first", ticket)
    await first.close()
