"""What a volunteer does on the network, as `node.runtime.network` and `node.services.membership`: look, file records, read who
is online.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lutetia.coordinator.ledger.status_builder import Sighting
from lutetia.node.machine import messages as m
from lutetia.node.services.standby_policy import read_interval_factor
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.records import ClaimRecord, Hardware, NodeRecord, claim_key, quarantine_key, seal

if TYPE_CHECKING:
    from lutetia.simulation.peers.node import SimulatedNode

_ANNOUNCE_EVERY = 10  # heartbeats: a third of a provider record's life
_HARDWARE = Hardware(device="cuda", memory_bytes=1 << 34, cores=8)


class SimulatedNodeNetwork:
    """`acceptances` are the newest seen; `newer`: this box's version writes a field into records that others do not know."""

    def __init__(self, box: SimulatedNode) -> None:
        self._box, self._world = box, box.world
        self.acceptances: dict[int, Any] = {}
        self.newer = False
        self._quarantined: frozenset[str] = frozenset()
        self._quarantine_seen = float("-inf")
        self._expiries: dict[str, float] = {}
        self._filed: dict[str, float] = {}
        self._node: NodeRecord | None = None
        self._beats = 0

    def joined(self, boot: int) -> None:
        """On the network, perhaps anew: what was filed from the old place is to be said again."""
        self._expiries.clear()
        self._filed.clear()
        self._world.agenda.after(self._box.rules.lease / 2, self._list, boot, self._box.joins)

    # --- looking ----------------------------------------------------------------------------------------------------------

    def look(self, shards: tuple[int, ...]) -> None:
        """The replicas answer with what they hold in the middle of the look."""
        seconds = self._world.lines.look(self._box, len(shards))
        self._world.agenda.after(seconds / 2, self._read, self._box.boot, shards, seconds / 2)

    def _read(self, boot: int, shards: tuple[int, ...], rest: float) -> None:
        box, world = self._box, self._world
        if boot != box.boot or not box.answering:
            return
        views = world.dht.look(box, shards)
        if world.quarantining:
            views = self._unclaimed_by_the_quarantined(views)
        world.costs.looked(len(shards), sum([len(view.claims) for view in views]), world.setting.replicas, world.dht.size)
        if world.story is not None:
            world.story.read(box, shards)
        world.agenda.after(rest, self._seen, boot, views)

    def _unclaimed_by_the_quarantined(self, views: tuple[Any, ...]) -> tuple[Any, ...]:
        """Who is quarantined is asked once per heartbeat, and its claims do not count."""
        box = self._box
        if box.clock() - self._quarantine_seen >= box.rules.heartbeat:
            self._quarantine_seen = box.clock()
            found = self._world.dht.read(box, quarantine_key(box.rules.run)).values()
            self._quarantined = frozenset(owner for stored in found for owner in stored.record.peers)
        lost = self._quarantined
        return tuple(
            view if lost.isdisjoint(view.claimants) else view.with_claims(c for c in view.claims if c.record.owner not in lost)
            for view in views
        )

    def _seen(self, boot: int, views: tuple[Any, ...]) -> None:
        if boot == self._box.boot:
            for view in views:
                if view.acceptance is not None:
                    self.acceptances[view.shard] = view.acceptance
            self._box.hear(boot, m.SwarmSeen, views)

    def _list(self, boot: int, joins: int) -> None:
        """Who is online, and what of it is ours to look after."""
        box, world = self._box, self._world
        if boot != box.boot or joins != box.joins or not box.running:
            return
        wait = box.rules.lease / 2
        if box.answering:
            roster = world.roster(box)
            buckets, records = roster.read_by(box.box.owner)
            world.costs.listed(buckets, records, world.setting.replicas, world.dht.size)
            wait *= read_interval_factor(records)
            if box.state.watched_shards is not None or box.state.phase in ("idle", "claiming"):
                box.hear(boot, m.WatchedShardsSet, roster.duties.get(box.box.owner), box.clock() + 2 * wait)
        world.agenda.after(wait, self._list, boot, joins)

    # --- filing -----------------------------------------------------------------------------------------------------------

    def file_claim(self, claim: m.Claim) -> None:
        box, run = self._box, self._box.rules.run
        record = ClaimRecord.model_construct(
            run=run, owner=box.box.owner, issued=box.clock(), shard=claim.shard, epoch=claim.epoch, samples=claim.samples,
            state=claim.state,
        )  # fmt: skip
        expires = self.file(record, claim_key(run, claim.shard), box.rules.lease)
        self._world.invariants.claimed(claim.shard, expires - box.skew, released=claim.state == "released")

    def file(self, record: Any, key: str, ttl: float) -> float:
        """As `services.publish`: a record never expires before the one that it replaces. Returns the expiry."""
        box = self._box
        expires = max(box.clock() + ttl, self._expiries.get(key, 0.0) + 0.001)
        self._expiries[key] = expires
        self._world.dht.store(box, record, expires, box.box.identity, self.sealed(record, expires) if self.newer else b"")
        return expires

    def sealed(self, record: Any, expires: float) -> bytes:
        """As this box's version writes it."""
        identity = self._box.box.identity
        assert identity
        document = json.loads(seal(record, identity, expires))
        return canonical({**document, "record": {**document["record"], "novelty": 1}} if self.newer else document)

    def first_filing(self, digest: str, again_after: float) -> bool:
        """Whether a checkpoint's record is to be filed (again)."""
        now = self._world.agenda.now
        if now - self._filed.get(digest, -1e9) < again_after:
            return False
        self._filed = {digest: now}
        return True

    def renew(self, claim: m.Claim | None) -> None:
        """The heartbeat: the claim, the node record, and now and then the provider records."""
        if claim is not None:
            self.file_claim(claim)
        box, world, now = self._box, self._world, self._box.clock()
        world.directory[box.box.owner] = (box, Sighting(self._node_record(now), now + box.rules.lease, now))
        world.costs.stored("node", world.setting.replicas, world.dht.size)
        self._beats += 1
        if self._beats % _ANNOUNCE_EVERY == 0 and box.hands.shelves:
            parcels = sum(1 + len(shelf.kept) for shelf in box.hands.shelves.values())
            world.costs.stored("provider", world.setting.replicas, world.dht.size, 2 * parcels)

    def _node_record(self, now: float) -> NodeRecord:
        """Made anew when it says something else."""
        box, known = self._box, self._node
        shard = box.state.work.shard if box.state.work else None
        if known is None or (known.state, known.shard) != (box.state.phase, shard):
            rate = box.hands.speed * 16 if any(box.box.fitness.values()) else 0.0
            known = self._node = NodeRecord.model_construct(
                run=box.rules.run, owner=box.box.owner, issued=now, peer_id=box.box.peer_id, addresses=(), hardware=_HARDWARE,
                samples_per_second=rate, software="simulated", state=box.state.phase, shard=shard, operator=box.box.operator,
            )  # fmt: skip
        return known
