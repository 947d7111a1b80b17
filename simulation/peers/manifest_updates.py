"""Newer versions of the manifest, as they spread: `coordinator.admin.upgrade` and `node.services.manifest_updates` in virtual
time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lutetia.coordinator.admin.upgrade import published
from lutetia.coordinator.ledger.events import ManifestPublished
from lutetia.node.machine import messages as m
from lutetia.node.machine.state import NodeRules
from lutetia.protocol.rpc.manifest_sync import LiveManifest
from lutetia.protocol.schema.manifest import SignedManifest
from lutetia.protocol.schema.manifest_upgrade import next_version, training_changed
from lutetia.simulation.config import OWNER
from lutetia.simulation.network.blobs import SimulatedDelay, drive
from lutetia.simulation.peers.streams import DIAL_TIMEOUT

if TYPE_CHECKING:
    from lutetia.simulation.peers.coordinator import SimulatedCoordinator
    from lutetia.simulation.peers.node import SimulatedNode
    from lutetia.simulation.world import SimulatedWorld


def upgrade(world: SimulatedWorld, changes: dict[str, Any]) -> None:
    """The owner signs the next version and puts it into the coordinator's folder; who serves takes it up within a second."""
    epochs = max(world.invariants.heads)
    manifest = next_version(world.manifest, changes, world.agenda.now, epochs)
    world.signed = SignedManifest.sign(manifest, OWNER)
    world.invariants.budget_changed()
    for office in world.offices:
        office.follow_folder()


class Edition:
    """The version that a coordinator serves. Newly started it serves the newest in its folder."""

    def __init__(self, office: SimulatedCoordinator) -> None:
        self._office, self._world = office, office.world
        self.live = LiveManifest(office.world.signed)
        self._told: dict[str, int] = {}

    def adopt(self) -> ManifestPublished | None:
        """The ledger's entry for a newer version."""
        office = self._office
        if not self.live.adopt(self._world.signed.to_bytes(), office.clock()):
            return None
        return published(self.live(), office.identity.public_key, office.clock())

    def tell(self) -> None:
        """Every peer that is online and has not been told yet."""
        for sighting in self._office.view.nodes:
            peer = self._world.directory[sighting.record.owner][0]
            if self.live.version > self._told.get(sighting.record.owner, self._world.first_version):
                drive(self._world.agenda, self._tell(peer), lambda _: None)

    async def _tell(self, peer: SimulatedNode) -> None:
        office, lines, version = self._office, self._world.lines, self.live.version
        if not lines.dials(office, peer):
            await SimulatedDelay(DIAL_TIMEOUT)
            return
        await SimulatedDelay(lines.stream(office, peer))
        if lines.dials(office, peer):
            self._told[peer.box.owner] = version
            peer.news.hear(self.live)


class SimulatedManifestUpdates:
    """A volunteer's: the version on its disk, which it goes on under, and serves to others."""

    def __init__(self, box: SimulatedNode) -> None:
        self._box, self._world = box, box.world
        self.live = LiveManifest(box.world.signed)

    def begin(self, boot: int) -> None:
        """Ask once per lease, not all peers at once."""
        wait = self._box.rules.lease * (0.75 + 0.5 * int(self._box.box.owner[:8], 16) / 16**8)
        self._world.agenda.after(wait, self._ask, boot)

    def _ask(self, boot: int) -> None:
        if boot == self._box.boot and self._box.running:
            drive(self._world.agenda, self._ask_around(), lambda _: self.begin(boot))

    async def _ask_around(self) -> None:
        """The coordinators; one other peer when none of them answers."""
        box, world, lines = self._box, self._world, self._world.lines
        for office in world.offices:
            if office.serving and lines.dials(box, office):
                await SimulatedDelay(2 * lines.stream(box, office))
                self.hear(office.edition.live)
                return
            await SimulatedDelay(DIAL_TIMEOUT)
        others = [peer for peer in world.volunteers if peer is not box and lines.dials(box, peer)]
        if others:
            other = others[int(box.clock()) % len(others)]
            await SimulatedDelay(2 * lines.stream(box, other))
            self.hear(other.news.live)

    def hear(self, other: LiveManifest) -> None:
        """Somebody serves this version: a newer one is fetched, checked against the owner's signature, and followed."""
        box, old = self._box, self.live()
        if not box.answering or other.version <= self.live.version or not self.live.adopt(other.signed.to_bytes(), box.clock()):
            return
        new = self.live()
        box.rules = NodeRules.of(new, box.box.owner)
        box.hear(box.boot, m.ManifestChanged, new.version, training_changed(old, new))
