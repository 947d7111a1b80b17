"""Announcements of newer manifests. A network in memory, real signatures."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lutetia.node.services.manifest_updates import ManifestUpdates
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.rpc.introduction import MANIFEST, serve_document
from lutetia.protocol.rpc.manifest_sync import LiveManifest, announce_version
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import SignedManifest
from lutetia.protocol.schema.manifest_upgrade import next_version
from lutetia.protocol.transport.base import Transport
from tests.memory_transport.network import MemoryNetwork
from tests.node.runtime.test_tasks import NODE, NodeSetup
from tests.node.scripted_coordinator import eventually
from tests.node.tiny_run import OWNER, make_run


class AnnouncementSetup:
    """A node, the versions that it took, and how often it asked each peer for a manifest."""

    def __init__(self, node: NodeSetup, network: MemoryNetwork, heartbeat: float) -> None:
        signed = SignedManifest.model_validate_json(node.run.manifest_file.read_bytes())
        self.node, self.network, self.heartbeat = node, network, heartbeat
        self.changes: list[int] = []
        self.live = LiveManifest(signed)
        self.manifest_updates = ManifestUpdates(node.tasks.network, self.live, lambda: self.changes.append(self.live.version))
        self.asked: dict[str, int] = {}

    @classmethod
    async def create(cls, tmp_path: Path, heartbeat: float) -> AnnouncementSetup:
        network = MemoryNetwork(latency=0.001)
        node = await NodeSetup.create(make_run(tmp_path / "run", heartbeat=heartbeat), tmp_path / "node", network)
        setup = cls(node, network, heartbeat)
        await setup.manifest_updates.serve(node.tasks.network.transport)
        return setup

    def stranger(self, name: str) -> Transport:
        return self.network.peer(Identity.derived(name), record_check(self.node.run.manifest, time.time))

    async def serve(self, peer: Transport, document: bytes) -> None:
        def given() -> bytes:
            self.asked[peer.peer_id] = self.asked.get(peer.peer_id, 0) + 1
            return document

        await serve_document(peer, MANIFEST, given)

    async def announce(self, peer: Transport, version: int) -> None:
        """Announce a version to the node, and wait until it fetches nothing."""
        await announce_version(peer, version, NODE.peer_id)

        async def quiet() -> bool:
            return not self.manifest_updates._fetching.locked()

        await eventually(quiet)

    def next_manifest(self) -> SignedManifest:
        return SignedManifest.sign(next_version(self.live(), {"holdout_tolerance": 0.5}, time.time()), OWNER)


async def test_bad_announcement_does_not_block_the_coordinator(tmp_path: Path):
    setup = await AnnouncementSetup.create(tmp_path, heartbeat=600.0)
    newer = setup.next_manifest()
    forged = newer.model_copy(update={"signature": "0" * 128}).to_bytes()
    liars = [setup.stranger(name) for name in ("liar", "another liar")]
    for liar in liars:
        await setup.serve(liar, forged)
        for _ in range(5):
            await setup.announce(liar, 2**63)
    assert setup.asked == {liars[0].peer_id: 1}, "one announcement per heartbeat is checked"
    coordinator = setup.network.find(setup.manifest_updates.network.coordinators[0][0])
    assert coordinator
    await setup.serve(coordinator, newer.to_bytes())
    await setup.announce(coordinator, 2)
    assert setup.changes == [2]


async def test_unknown_peer_may_announce_a_newer_manifest(tmp_path: Path):
    setup = await AnnouncementSetup.create(tmp_path, heartbeat=600.0)
    friend = setup.stranger("friend")
    await setup.serve(friend, setup.next_manifest().to_bytes())
    await setup.announce(friend, 2)
    assert setup.changes == [2]


@pytest.mark.parametrize("good", [True, False])
async def test_bad_announcement_is_refused_for_a_lease(tmp_path: Path, good: bool):
    setup = await AnnouncementSetup.create(tmp_path, heartbeat=10.0)
    updates = setup.manifest_updates
    assert updates.may_announce("203.0.113.5", 1000.0)
    if not good:
        updates.refuse("203.0.113.5", 1000.0)
    assert not updates.may_announce("203.0.113.6", 1009.0), "one per heartbeat"
    assert updates.may_announce("203.0.113.6", 1011.0)
    assert updates.may_announce("203.0.113.5", 1022.0) is good
    assert updates.may_announce("203.0.113.5", 1033.0)
