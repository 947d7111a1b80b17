"""A node's network operations, as `node.runtime.network` and `node.services.membership`: look, publish, read node records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lutetia.coordinator.ledger.status_builder import Sighting
from lutetia.node.machine import messages as m
from lutetia.node.machine.state import BUSIEST
from lutetia.node.pacing import provider_record_due
from lutetia.node.services.standby_policy import read_pause, watch_until
from lutetia.protocol.claims import shard_and_lane
from lutetia.protocol.dht_records import next_expiry
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.records import (
    ClaimRecord,
    DeviceEntry,
    Hardware,
    NodeRecord,
    NodeState,
    RecordLimits,
    claim_key,
    quarantine_key,
    seal,
)
from lutetia.simulation.interfaces import Node

_HARDWARE = Hardware(device="cuda", memory_bytes=1 << 34, cores=8)


class SimulatedNodeNetwork:
    """`acceptances`: the newest seen. `newer`: this node writes a field into its records that others do not know."""

    def __init__(self, node: Node) -> None:
        self._node, self._world = node, node.world
        self.acceptances: dict[int, Any] = {}
        self.newer = False
        self._quarantined: frozenset[str] = frozenset()
        self._quarantine_seen = float("-inf")
        self._expiries: dict[str, float] = {}
        self._recorded: dict[str, float] = {}
        self._record: tuple[Sequence[tuple[NodeState, int | None]], NodeRecord] | None = None
        """The node record, and what its devices did then."""
        self._claim: ClaimRecord | None = None
        self._announced = float("-inf")
        manifest = node.world.manifest
        self.limits = RecordLimits(manifest.timing.heartbeat, manifest.timing.maximum_clock_skew)

    def joined(self) -> None:
        """The node is on the network (again): publish everything again."""
        self._expiries.clear()
        self._recorded.clear()
        self._announced = float("-inf")

    def begin(self, boot: int) -> None:
        """Read the node records from now on, once for all devices."""
        self._world.queue.after(read_pause(self._node.rules.lease), self._list, boot, self._node.joins)

    # --- looking ----------------------------------------------------------------------------------------------------------

    def look(self, shards: tuple[int, ...]) -> None:
        """Look at shards; the replicas answer with what they hold halfway through."""
        seconds = self._world.links.look(self._node, len(shards))
        self._world.queue.after(seconds / 2, self._read, self._node.boot, shards, seconds / 2)

    def _read(self, boot: int, shards: tuple[int, ...], remaining: float) -> None:
        node, world = self._node, self._world
        if boot != node.boot or not node.answering:
            return
        views = world.dht.look(node.host, shards)
        if world.quarantining:
            views = self._without_quarantined(views)
        world.costs.looked(len(shards), sum([len(view.claims) for view in views]), world.config.replicas, world.dht.size)
        if world.trace is not None:
            world.trace.read(node, shards)
        world.queue.after(remaining, self._seen, boot, views)

    def _without_quarantined(self, views: tuple[Any, ...]) -> tuple[Any, ...]:
        """Drop the claims of quarantined peers, whose record is read at most once per heartbeat."""
        node = self._node
        if node.clock() - self._quarantine_seen >= node.rules.heartbeat:
            self._quarantine_seen = node.clock()
            records = self._world.dht.read(node.host, quarantine_key(node.rules.run)).values()
            self._quarantined = frozenset(owner for stored in records for owner in stored.record.peers)
        dropped = self._quarantined
        return tuple(
            view
            if dropped.isdisjoint(view.claimants)
            else view.with_claims(c for c in view.claims if c.record.owner not in dropped)
            for view in views
        )

    def _seen(self, boot: int, views: tuple[Any, ...]) -> None:
        if boot == self._node.boot:
            for view in views:
                if view.acceptance is not None:
                    self.acceptances[view.shard] = view.acceptance
            self._node.feed(boot, m.SwarmSeen, views)
            if len(self._node.host.devices) > 1:
                self._tell_idle_devices(views)

    def _tell_idle_devices(self, views: tuple[Any, ...]) -> None:
        for device in self._node.host.devices:
            if device is not self._node and device.state.phase == "idle":
                device.feed(device.boot, m.SwarmSeen, views)

    def _list(self, boot: int, joins: int) -> None:
        """Read the node records and derive the shards to watch."""
        node, world = self._node, self._world
        if boot != node.boot or joins != node.joins or not node.running:
            return
        wait = read_pause(node.rules.lease)
        if node.answering:
            membership = world.membership(node)
            buckets, records = membership.read_by(node.machine.owner)
            world.costs.listed(buckets, records, world.config.replicas, world.dht.size)
            wait = read_pause(node.rules.lease, records)
            for device in node.devices:
                if device.state.watched_shards is not None or device.state.phase in ("idle", "claiming"):
                    watched = membership.watched_shards.get(node.machine.owner)
                    device.feed(device.boot, m.WatchedShardsSet, watched, watch_until(node.clock(), wait))
        world.queue.after(wait, self._list, boot, joins)

    # --- publishing -----------------------------------------------------------------------------------------------------------

    def publish_claim(self, claim: m.Claim) -> None:
        node, run = self._node, self._node.rules.run
        shard, lane = shard_and_lane(claim.shard)
        known = self._claim
        if known is None or (known.run, known.shard, known.lane) != (run, shard, lane):
            known = ClaimRecord.model_construct(run=run, owner=node.machine.owner, shard=shard, lane=lane)
        changes = {"issued": node.clock(), "epoch": claim.epoch, "samples": claim.samples, "state": claim.state}
        record = self._claim = known.model_copy(update=changes)  # a third cheaper than a new one
        expires = self.publish(record, claim_key(run, shard, lane), node.rules.lease)
        self._world.invariants.claimed(claim.shard, expires - node.skew, released=claim.state == "released")

    def publish(self, record: Any, key: str, ttl: float) -> float:
        """Store a record, as `dht_records.publish`. Returns the expiry."""
        node = self._node
        skew = self.limits.maximum_clock_skew
        expires = self._expiries[key] = next_expiry(node.clock() + ttl, self._expiries.get(key, 0.0), skew)
        self._world.dht.store(
            node.host, record, expires, node.machine.identity, self.sealed(record, expires) if self.newer else b""
        )
        return expires

    def sealed(self, record: Any, expires: float) -> bytes:
        """The record's bytes, as this node's version writes them."""
        identity = self._node.machine.identity
        assert identity
        document = json.loads(seal(record, identity, expires))
        return canonical({**document, "record": {**document["record"], "novelty": 1}} if self.newer else document)

    def record_due(self, digest: str, again_after: float) -> bool:
        """Whether to publish a checkpoint's record (again). Notes the time if so."""
        now = self._world.queue.now
        if now - self._recorded.get(digest, -1e9) < again_after:
            return False
        self._recorded = {digest: now}
        return True

    def renew(self, claim: m.Claim | None) -> None:
        """The heartbeat: publish the claim, the node record and, when due, the provider records."""
        if claim is not None:
            self.publish_claim(claim)
        self._node.host.network.renew_node()

    def renew_node(self) -> None:
        """Publish the one record of the node, and those of its blobs."""
        node, world, now = self._node, self._world, self._node.clock()
        world.directory[node.machine.owner] = (node, Sighting(self._node_record(now), now + node.rules.lease, now))
        world.costs.stored("node", world.config.replicas, world.dht.size)
        if node.trainer.disks and provider_record_due(now - self._announced, self.limits.longest("provider")):
            self._announced = now
            parcels = sum(1 + len(disk.kept) for disk in node.trainer.disks.values())
            world.costs.stored("provider", world.config.replicas, world.dht.size, 2 * parcels)

    def _node_record(self, now: float) -> NodeRecord:
        """The node record; a new one when what a device does has changed."""
        node, known = self._node, self._record
        done: list[tuple[NodeState, int | None]] = [(device.state.phase, _shard(device)) for device in node.devices]
        if known is None or known[0] != done:
            known = self._record = done, self._made(now, done)
        return known[1]

    def _made(self, now: float, done: Sequence[tuple[NodeState, int | None]]) -> NodeRecord:
        """As `node.runtime.node_record.summary_of`, whose facts of the hardware the model lacks."""
        node = self._node
        rates = [
            device.trainer.speed * 16 if any(device.machine.fitness.values()) else 0.0 for device in node.devices
        ]  # fmt: skip
        entries = tuple(
            DeviceEntry(device=f"cuda:{number}", state=state, shard=shard, samples_per_second=rate)
            for number, ((state, shard), rate) in enumerate(zip(done, rates, strict=True))
        )
        return NodeRecord.model_construct(
            run=node.rules.run, owner=node.machine.owner, issued=now, peer_id=node.machine.peer_id, addresses=(),
            hardware=_HARDWARE, samples_per_second=sum(rates), software="simulated",
            state=min((state for state, _ in done), key=BUSIEST.index),
            shard=min([shard for _, shard in done if shard is not None], default=None),
            operator=node.machine.operator, devices=entries if len(entries) > 1 else (),
        )  # fmt: skip


def _shard(device: Node) -> int | None:
    return shard_and_lane(device.state.work.shard)[0] if device.state.work else None
