"""Who may make a node look at a manifest, and how often. A network in memory, real signatures."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lutetia.node.services.manifest_updates import ManifestUpdates
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.rpc.introduction import MANIFEST, serve_document
from lutetia.protocol.rpc.manifest_sync import LiveManifest, tell_news
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import SignedManifest
from lutetia.protocol.schema.manifest_upgrade import next_version
from lutetia.protocol.transport.base import Transport
from lutetia.protocol.transport.memory import MemoryNetwork
from tests.node.runtime.test_tasks import NODE, Box
from tests.node.scripted_coordinator import eventually
from tests.node.tiny_run import OWNER, make_run


class Told:
    """A box whose news are to be tried, and how often it asked each of those who tell it some."""

    def __init__(self, box: Box, network: MemoryNetwork, heartbeat: float) -> None:
        signed = SignedManifest.model_validate_json(box.run.manifest_file.read_bytes())
        self.box, self.network, self.heartbeat = box, network, heartbeat
        self.heard: list[int] = []
        self.live = LiveManifest(signed)
        self.manifest_updates = ManifestUpdates(box.tasks.network, self.live, lambda: self.heard.append(self.live.version))
        self.asked: dict[str, int] = {}

    @classmethod
    async def made(cls, tmp_path: Path, heartbeat: float) -> Told:
        network = MemoryNetwork(latency=0.001)
        box = await Box.made(make_run(tmp_path / "run", heartbeat=heartbeat), tmp_path / "box", network)
        told = cls(box, network, heartbeat)
        await told.news.serve(box.tasks.network.transport)
        return told

    def stranger(self, name: str) -> Transport:
        return self.network.peer(Identity.derived(name), record_check(self.box.run.manifest, time.time))

    async def serve(self, peer: Transport, document: bytes) -> None:
        def given() -> bytes:
            self.asked[peer.peer_id] = self.asked.get(peer.peer_id, 0) + 1
            return document

        await serve_document(peer, MANIFEST, given)

    async def tell(self, peer: Transport, version: int) -> None:
        """And wait until nothing is being fetched."""
        await tell_news(peer, version, NODE.peer_id)

        async def quiet() -> bool:
            return not self.manifest_updates._fetching.locked()

        await eventually(quiet)

    def next_manifest(self) -> SignedManifest:
        return SignedManifest.sign(next_version(self.live(), {"holdout_tolerance": 0.5}, time.time()), OWNER)


async def test_bad_announcement_does_not_block_the_coordinator(tmp_path: Path):
    told = await Told.made(tmp_path, heartbeat=600.0)
    newer = told.next_manifest()
    forged = newer.model_copy(update={"signature": "0" * 128}).to_bytes()
    liars = [told.stranger(name) for name in ("liar", "another liar")]
    for liar in liars:
        await told.serve(liar, forged)
        for _ in range(5):
            await told.tell(liar, 2**63)
    assert told.asked == {liars[0].peer_id: 1}, "one piece of news per heartbeat, whoever tells it"
    coordinator = told.network.find(told.news.network.coordinators[0][0])
    assert coordinator
    await told.serve(coordinator, newer.to_bytes())
    await told.tell(coordinator, 2)
    assert told.heard == [2]


async def test_unknown_peer_may_announce_a_newer_manifest(tmp_path: Path):
    told = await Told.made(tmp_path, heartbeat=600.0)
    friend = told.stranger("friend")
    await told.serve(friend, told.next_manifest().to_bytes())
    await told.tell(friend, 2)
    assert told.heard == [2]


@pytest.mark.parametrize("good", [True, False])
async def test_bad_announcement_is_refused_for_a_lease(tmp_path: Path, good: bool):
    told = await Told.made(tmp_path, heartbeat=10.0)
    news = told.news
    assert news.may_tell("203.0.113.5", 1000.0)
    if not good:
        news.refuse("203.0.113.5", 1000.0)
    assert not news.may_tell("203.0.113.6", 1009.0), "one per heartbeat"
    assert news.may_tell("203.0.113.6", 1011.0)
    assert news.may_tell("203.0.113.5", 1022.0) is good
    assert news.may_tell("203.0.113.5", 1033.0)
