"""All parts of one simulated run, and the clock that moves it."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from lutetia.coordinator.ledger.status_builder import Sighting
from lutetia.node.machine.state import NodeRules
from lutetia.protocol.schema.manifest import Manifest, SignedManifest
from lutetia.simulation.config import OWNER, SimulationConfig, draw_device, draw_machine, make_manifest
from lutetia.simulation.costs import Costs
from lutetia.simulation.event_queue import START, EventQueue
from lutetia.simulation.invariants import Invariants
from lutetia.simulation.network.blobs import SimulatedBlobs
from lutetia.simulation.network.dht import SimulatedDht
from lutetia.simulation.network.held_out import HeldOutModel
from lutetia.simulation.network.links import Links
from lutetia.simulation.network.membership import SharedMembership
from lutetia.simulation.peers.coordinator import SimulatedCoordinator
from lutetia.simulation.peers.node import SimulatedNode
from lutetia.simulation.rules_under_test import RulesUnderTest

if TYPE_CHECKING:
    from lutetia.simulation.trace import Trace

_LIST_SECONDS = 5.0
"""Readers of the node records within so many seconds share one list."""


@lru_cache(maxsize=8)
def _signed(config: SimulationConfig) -> SignedManifest:
    return SignedManifest.sign(make_manifest(config), OWNER)


class SimulatedWorld:
    """All nodes are drawn at once and start when a step of the plan says so; the coordinator starts at time 0."""

    def __init__(
        self,
        config: SimulationConfig,
        peers: int,
        seed: int,
        decide: RulesUnderTest | None = None,
        trace: Trace | None = None,
        *,
        strict: bool,
    ) -> None:
        self.config, self.seed, self.trace = config, seed, trace
        self.decide = decide or RulesUnderTest()
        self.queue = EventQueue()
        if trace is not None:
            trace.queue = self.queue
        self.signed = _signed(config)
        """The newest version of the manifest."""
        self.first_version = self.manifest.version
        self.costs = Costs()
        self.links = Links(config, seed)
        self.dht = SimulatedDht(
            self.queue, self.links, self.costs, self.manifest, config.replicas, strict=strict or config.signed
        )
        self.blobs = SimulatedBlobs(self.queue, self.links, self.costs, config.origin_slots)
        self.directory: dict[str, tuple[SimulatedNode, Sighting]] = {}
        """Node records by owner: the node and its newest record."""
        self._memberships: dict[int, tuple[tuple[int, int], SharedMembership]] = {}
        clips = config.held_out_clips
        self.held_out = HeldOutModel(seed, *clips) if clips else None
        self.invariants = Invariants(self)
        self.nodes = [SimulatedNode(self, index, draw_machine(config, seed, index)) for index in range(peers)]
        """Then the further devices of nodes that have several."""
        for host in tuple(self.nodes):
            for number in range(1, config.devices[host.index % len(config.devices)]):
                device = draw_device(config, seed, host.index, number, host.machine)
                self.nodes.append(SimulatedNode(self, len(self.nodes), device, host))
        self.coordinators = [SimulatedCoordinator(self, -1)]
        self.blobs.origins.add(-1)
        self.coordinators[0].start()

    @property
    def manifest(self) -> Manifest:
        return self.signed.manifest

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return self.queue.now - START

    @property
    def quarantining(self) -> bool:
        """Whether any peer is in quarantine; if not, nodes need not read the quarantine record."""
        return any(coordinator.state.run.quarantined for coordinator in self.coordinators)

    def membership(self, reader: SimulatedNode) -> SharedMembership:
        """The node records as `reader` sees them, up to a few seconds old."""
        moment, group = (int(self.queue.now // _LIST_SECONDS), self.links.version), self.links.group(reader.index)
        known = self._memberships.get(group)
        if known is None or known[0] != moment:
            now = self.queue.now
            seen = [
                sighting.record for peer, sighting in self.directory.values()
                if sighting.expires > now and (not peer.running or self.links.group(peer.index) == group)
            ]  # fmt: skip
            lease_number = int(now // self.config.lease)
            slots = NodeRules.of(self.manifest, "").rates_needed
            members = SharedMembership(self.manifest.run_id, seen, slots, lease_number)
            known = self._memberships[group] = moment, members
        return known[1]

    def can_join(self, newcomer: SimulatedNode) -> bool:
        """Whether a peer that `newcomer` knows answers: a bootstrap peer, or any peer if it has been online before."""
        links = self.links
        before, newcomer.online = newcomer.online, True  # it dials before it is on the network itself
        try:
            if any(links.dials(newcomer, coordinator) for coordinator in self.coordinators):
                return True
            return newcomer.met and any(
                peer is not newcomer and peer.host is peer and links.dials(newcomer, peer) for peer in self.nodes
            )
        finally:
            newcomer.online = before

    def holders(self) -> dict[int, list[SimulatedNode]]:
        """The nodes that hold each shard now, without those whose lease may have lapsed (`checking`)."""
        holders: dict[int, list[SimulatedNode]] = {}
        for peer in self.nodes:
            if peer.running and (work := peer.state.work) and work.owned and not work.checking:
                holders.setdefault(work.shard, []).append(peer)
        return holders

    @property
    def done(self) -> bool:
        return all(head >= self.manifest.epochs for head in self.invariants.heads)

    @property
    def accepted(self) -> int:
        return len(self.invariants.accepted)

    @property
    def useful_steps(self) -> int:
        """Steps of what stands: of accepted epochs, or of the results that were merged into them."""
        manifest = self.manifest
        if manifest.team is None:
            return self.accepted * manifest.steps_per_epoch
        shards = self.coordinators[0].state.run.shards.values()
        return sum(manifest.lane_steps(source.lane) for shard in shards for link in shard.lineage for source in link.sources)
