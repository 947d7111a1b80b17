"""How newer versions of the manifest spread, as `coordinator.runtime.manifest_watch` and `node.services.manifest_updates`."""

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
    """The owner signs the next version and puts it into the coordinator's folder; a running coordinator adopts it at once."""
    epochs = max(world.invariants.heads)
    manifest = next_version(world.manifest, changes, world.queue.now, epochs)
    world.signed = SignedManifest.sign(manifest, OWNER)
    world.invariants.budget_changed()
    for coordinator in world.coordinators:
        coordinator.follow_folder()


class ServedManifest:
    """The version that a coordinator serves, and the nodes that it has notified."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator, self._world = coordinator, coordinator.world
        self.live = LiveManifest(coordinator.world.signed)
        self._notified: dict[str, int] = {}

    def adopt(self) -> ManifestPublished | None:
        """Adopt the version in the folder. Returns the ledger's entry if it is newer."""
        coordinator = self._coordinator
        if not self.live.adopt(self._world.signed.to_bytes(), coordinator.clock()):
            return None
        return published(self.live(), coordinator.identity.public_key, coordinator.clock())

    def notify(self) -> None:
        """Notify every online node that does not have this version yet."""
        for sighting in self._coordinator.view.nodes:
            peer = self._world.directory[sighting.record.owner][0]
            if self.live.version > self._notified.get(sighting.record.owner, self._world.first_version):
                drive(self._world.queue, self._notify(peer), lambda _: None)

    async def _notify(self, peer: Node) -> None:
        coordinator, links, version = self._coordinator, self._world.links, self.live.version
        if not links.dials(coordinator, peer):
            await SimulatedDelay(DIAL_TIMEOUT)
            return
        await SimulatedDelay(links.stream(coordinator, peer))
        if links.dials(coordinator, peer):
            self._notified[peer.machine.owner] = version
            peer.manifest_updates.receive(self.live)


class SimulatedManifestUpdates:
    """A node's: the version on its disk, which it uses and serves to others."""

    def __init__(self, node: Node) -> None:
        self._node, self._world = node, node.world
        self.live = LiveManifest(node.world.signed)

    def begin(self, boot: int) -> None:
        """Ask about once per lease; nodes do so at different times."""
        self._world.queue.after(manifest_pause(self._node.rules.lease, self._node.machine.owner), self._ask, boot)

    def _ask(self, boot: int) -> None:
        if boot == self._node.boot and self._node.running:
            drive(self._world.queue, self._ask_peers(), lambda _: self.begin(boot))

    async def _ask_peers(self) -> None:
        """Ask the coordinators; if none answers, ask another peer."""
        node, world, links = self._node, self._world, self._world.links
        for coordinator in world.coordinators:
            if coordinator.serving and links.dials(node, coordinator):
                await SimulatedDelay(2 * links.stream(node, coordinator))
                self.receive(coordinator.served_manifest.live)
                return
            await SimulatedDelay(DIAL_TIMEOUT)
        others = [peer for peer in world.nodes if peer is not node and peer.host is peer and links.dials(node, peer)]
        if others:
            other = others[int(node.clock()) % len(others)]
            await SimulatedDelay(2 * links.stream(node, other))
            self.receive(other.manifest_updates.live)

    def receive(self, other: LiveManifest) -> None:
        """Fetch the version that `other` serves if it is newer, check the owner's signature, and use it."""
        node, old = self._node, self.live()
        if not node.answering or other.version <= self.live.version or not self.live.adopt(other.signed.to_bytes(), node.clock()):
            return
        new = self.live()
        for device in node.devices:
            device.rules = NodeRules.of(new, node.machine.owner)
            device.feed(device.boot, m.ManifestChanged, new.version, training_changed(old, new))
