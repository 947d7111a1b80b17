"""Newer versions of the manifest, as they spread: `coordinator.admin.upgrade` and `node.services.manifest_updates` in virtual
time.
"""

from __future__ import annotations

from typing import Any

from lutetia.coordinator.admin.upgrade import published
from lutetia.coordinator.ledger.events import ManifestPublished
from lutetia.node.machine import messages as m
from lutetia.node.machine.state import NodeRules
from lutetia.node.pacing import manifest_pause
from lutetia.protocol.rpc.manifest_sync import LiveManifest
from lutetia.protocol.schema.manifest import SignedManifest
from lutetia.protocol.schema.manifest_upgrade import next_version, training_changed
from lutetia.protocol.transport.base import DIAL_TIMEOUT
from lutetia.simulation.config import OWNER
from lutetia.simulation.interfaces import Coordinator, Node, World
from lutetia.simulation.network.blobs import SimulatedDelay, drive


def upgrade(world: World, changes: dict[str, Any]) -> None:
    """The owner signs the next version and puts it into the coordinator's folder; who serves takes it up within a second."""
    epochs = max(world.invariants.heads)
    manifest = next_version(world.manifest, changes, world.queue.now, epochs)
    world.signed = SignedManifest.sign(manifest, OWNER)
    world.invariants.budget_changed()
    for coordinator in world.coordinators:
        coordinator.follow_folder()


class Edition:
    """The version that a coordinator serves. Newly started it serves the newest in its folder."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator, self._world = coordinator, coordinator.world
        self.live = LiveManifest(coordinator.world.signed)
        self._told: dict[str, int] = {}

    def adopt(self) -> ManifestPublished | None:
        """The ledger's entry for a newer version."""
        coordinator = self._coordinator
        if not self.live.adopt(self._world.signed.to_bytes(), coordinator.clock()):
            return None
        return published(self.live(), coordinator.identity.public_key, coordinator.clock())

    def tell(self) -> None:
        """Every peer that is online and has not been told yet."""
        for sighting in self._coordinator.view.nodes:
            peer = self._world.directory[sighting.record.owner][0]
            if self.live.version > self._told.get(sighting.record.owner, self._world.first_version):
                drive(self._world.queue, self._tell(peer), lambda _: None)

    async def _tell(self, peer: Node) -> None:
        coordinator, links, version = self._coordinator, self._world.links, self.live.version
        if not links.dials(coordinator, peer):
            await SimulatedDelay(DIAL_TIMEOUT)
            return
        await SimulatedDelay(links.stream(coordinator, peer))
        if links.dials(coordinator, peer):
            self._told[peer.machine.owner] = version
            peer.manifest_updates.hear(self.live)


class SimulatedManifestUpdates:
    """A volunteer's: the version on its disk, which it goes on under, and serves to others."""

    def __init__(self, node: Node) -> None:
        self._node, self._world = node, node.world
        self.live = LiveManifest(node.world.signed)

    def begin(self, boot: int) -> None:
        """Ask once per lease, not all peers at once."""
        self._world.queue.after(manifest_pause(self._node.rules.lease, self._node.machine.owner), self._ask, boot)

    def _ask(self, boot: int) -> None:
        if boot == self._node.boot and self._node.running:
            drive(self._world.queue, self._ask_around(), lambda _: self.begin(boot))

    async def _ask_around(self) -> None:
        """The coordinators; one other peer when none of them answers."""
        node, world, links = self._node, self._world, self._world.links
        for coordinator in world.coordinators:
            if coordinator.serving and links.dials(node, coordinator):
                await SimulatedDelay(2 * links.stream(node, coordinator))
                self.hear(coordinator.edition.live)
                return
            await SimulatedDelay(DIAL_TIMEOUT)
        others = [peer for peer in world.nodes if peer is not node and links.dials(node, peer)]
        if others:
            other = others[int(node.clock()) % len(others)]
            await SimulatedDelay(2 * links.stream(node, other))
            self.hear(other.manifest_updates.live)

    def hear(self, other: LiveManifest) -> None:
        """Somebody serves this version: a newer one is fetched, checked against the owner's signature, and followed."""
        node, old = self._node, self.live()
        if not node.answering or other.version <= self.live.version or not self.live.adopt(other.signed.to_bytes(), node.clock()):
            return
        new = self.live()
        node.rules = NodeRules.of(new, node.machine.owner)
        node.hear(node.boot, m.ManifestChanged, new.version, training_changed(old, new))
