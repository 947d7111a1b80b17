"""The DHT: each replica keeps its own part, records arrive after a delay, and each reader asks the replicas that it can reach.

The model follows `tests.memory_transport`: a record goes to the replicas that follow its key on a hash ring and to its
writer; of each owner the record that expires last is kept; replicas and readers check by their own clocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lutetia.protocol.claims import LiveClaim, ShardView, latest_acceptance, shard_and_lane, slots_of
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.records import (
    RecordLimits,
    RecordRefused,
    ResetRecord,
    acceptance_key,
    check_times,
    claim_key,
    seal,
)
from lutetia.simulation.costs import Costs
from lutetia.simulation.event_queue import EventQueue
from lutetia.simulation.network.links import Links, SimulatedPeer
from lutetia.simulation.network.ring import Ring

Record = Any
"""One of the records of `protocol.schema.records`, built without validation in settings without forgers."""


@dataclass(frozen=True, slots=True)
class SimulatedRecord:
    """`sealed` is empty in settings without signatures. `cause`: the trace entry that wrote it."""

    record: Record
    expires: float
    sealed: bytes
    cause: int


Records = Mapping[str, SimulatedRecord]
"""By owner."""
_NONE: dict[str, SimulatedRecord] = {}


@dataclass(slots=True)
class _Shared:
    """What readers of one group see under a key: asked of `replicas`, the same until a record expires at `until`."""

    replicas: list[SimulatedReplica]
    until: float
    records: Records


class SimulatedReplica(SimulatedPeer, Protocol):
    parts: dict[str, dict[str, SimulatedRecord]]
    denies: bool
    """A sybil's replica: it accepts records and never returns them."""

    def clock(self) -> float: ...


class SimulatedDht:
    def __init__(self, queue: EventQueue, links: Links, costs: Costs, manifest: Manifest, replicas: int, *, strict: bool) -> None:
        """`strict`: clocks differ or records are forged, so every replica and reader checks every record itself."""
        self._queue, self._links, self._costs, self._strict = queue, links, costs, strict
        self._limits = RecordLimits(manifest.timing.heartbeat, manifest.timing.maximum_clock_skew)
        run, shards, slots = manifest.run_id, len(manifest.shards), slots_of(len(manifest.shards), manifest.lanes)
        self.claim_keys = {slot: claim_key(run, *shard_and_lane(slot)) for slot in slots}
        self.acceptance_keys = [acceptance_key(run, shard) for shard in range(shards)]
        self._given_keys = {slot: self.acceptance_keys[shard_and_lane(slot)[0]] for slot in slots}
        self._claims = frozenset(self.claim_keys.values())
        self._ring = Ring[SimulatedReplica](links, replicas)
        self._shared: dict[str, _Shared] = {}
        self._views: dict[int, tuple[Records, Records, ShardView]] = {}
        """By slot: the last view, and the records that it was made of."""
        self._clock = 0.0
        self._real_check = record_check(manifest, lambda: self._clock)
        self.refused: list[str] = []

    @property
    def size(self) -> int:
        return len(self._ring)

    # membership

    def enter(self, member: SimulatedReplica, name: str) -> None:
        """`member` answers from now on; its neighbours give it the records that it is to hold."""
        for neighbour in self._ring.add(member, name):
            if self._links.dials(member, neighbour):
                self._hand_over(neighbour, member)

    def _hand_over(self, giver: SimulatedReplica, taker: SimulatedReplica) -> None:
        for key, part in giver.parts.items():
            if taker in self._ring.nearest(taker, key):
                for owner, stored in part.items():
                    self._receive(taker, key, owner, stored)

    def depart(self, member: SimulatedReplica) -> None:
        """Remove the member and all that it held."""
        self._ring.remove(member)
        member.parts.clear()

    def changed(self, member: SimulatedReplica) -> None:
        """The member stopped or began to answer."""
        self._ring.changed(member)

    # writing

    def store(
        self, source: SimulatedReplica, record: Record, expires: float, identity: Identity | None, sealed: bytes = b""
    ) -> None:
        """Send `record` to the replicas; each gets it after its own delay, or never."""
        if identity is not None and not sealed:
            sealed = seal(record, identity, expires)
        stored, key, links = SimulatedRecord(record, expires, sealed, self._queue.cause), record.key(), self._links
        near = self._ring.nearest(source, key)
        self._costs.stored(record.kind, len(near), self.size)
        self._keep(source, key, record.owner, stored)
        if not self._strict and not self._accepts(key, record.owner, stored, source.clock()):
            return  # all clocks are equal, so what one refuses all refuse
        for replica in near:
            if replica is not source and not links.lost():
                self._queue.after(2 * links.packet(source, replica), self._arrive, source, replica, key, stored)

    def force_store(self, source: SimulatedReplica, key: str, owner: str, stored: SimulatedRecord) -> None:
        """Send a forged record to every replica, without the sender's own check."""
        for replica in self._ring.nearest(source, key):
            if replica is not source:
                self._receive(replica, key, owner, stored)

    def _arrive(self, source: SimulatedReplica, replica: SimulatedReplica, key: str, stored: SimulatedRecord) -> None:
        if not replica.answering or not (self._links.whole or self._links.together(source.index, replica.index)):
            return
        if self._strict:
            self._receive(replica, key, stored.record.owner, stored)
        elif not replica.denies:
            self._keep(replica, key, stored.record.owner, stored)

    def _receive(self, replica: SimulatedReplica, key: str, owner: str, stored: SimulatedRecord) -> None:
        if not replica.denies and self._accepts(key, owner, stored, replica.clock()):
            self._keep(replica, key, owner, stored)

    def _keep(self, replica: SimulatedReplica, key: str, owner: str, stored: SimulatedRecord) -> None:
        """Of each owner the record that expires last is kept."""
        mine = replica.parts.get(key)
        if mine is None:
            mine = replica.parts[key] = {}
        old = mine.get(owner)
        if old is None or old.expires < stored.expires:
            if len(mine) > 8:
                now = self._queue.now
                for other in [name for name, held in mine.items() if held.expires < now - 120]:
                    del mine[other]
            mine[owner] = stored
            known = self._shared.get(key)
            # one more copy of a claim that readers see already changes nothing; of other records the order of reading counts
            if known is not None and not (known.records.get(owner) is stored and key in self._claims):
                del self._shared[key]

    def _accepts(self, key: str, owner: str, stored: SimulatedRecord, clock: float) -> bool:
        try:
            if stored.sealed:
                self._clock = clock
                return self._real_check(key, owner, stored.sealed, stored.expires) == key
            check_times(stored.record.kind, stored.record.issued, stored.expires, clock, self._limits)
        except RecordRefused as error:
            if len(self.refused) < 1000:
                self.refused.append(str(error))
            return False
        return True

    # reading

    def read(self, source: SimulatedReplica, key: str) -> Records:
        """The live records under `key` that reach `source` or that it holds itself, newest per owner."""
        if not (self._strict or self._links.loss or self._links.blocked):
            return self._read_shared(source, key)
        held = source.parts.get(key, {})
        live = self._read_all(source, key, held)
        if self._strict:
            clock = source.clock()
            live = {
                owner: stored for owner, stored in live.items()
                if held.get(owner) is stored or self._accepts(key, owner, stored, clock)
            }  # fmt: skip
        return live

    def _read_all(self, source: SimulatedReplica, key: str, held: Records) -> dict[str, SimulatedRecord]:
        """Ask every replica; `held`: what `source` has itself."""
        newest = dict(held)
        for replica in self._ring.nearest(source, key):
            if replica.denies or (replica is not source and self._lose()):
                continue
            clock = replica.clock()
            for owner, stored in replica.parts.get(key, _NONE).items():
                if stored.expires > clock and (owner not in newest or stored.expires > newest[owner].expires):
                    newest[owner] = stored
        clock = source.clock()
        return {owner: stored for owner, stored in newest.items() if stored.expires > clock}

    def _read_shared(self, source: SimulatedReplica, key: str) -> Records:
        """Without loss all readers of a group get the same answers, so they share them until a record or a replica changes."""
        near, now = self._ring.nearest(source, key), self._queue.now
        known = self._shared.get(key)
        if known is None or known.replicas is not near or known.until <= now:
            records = self._read_all(source, key, _NONE)
            until = min([stored.expires for stored in records.values()], default=math.inf)
            known = self._shared[key] = _Shared(near, until, records)
        if held := source.parts.get(key):
            for owner, stored in held.items():
                there = known.records.get(owner)
                if there is not stored and stored.expires > now and (there is None or there.expires < stored.expires):
                    return self._read_all(source, key, held)  # what no replica has yet
        return known.records

    def _lose(self) -> bool:
        """Whether the request or its answer is lost."""
        return self._links.lost() or self._links.lost()

    def look(self, source: SimulatedReplica, slots: Sequence[int]) -> tuple[ShardView, ...]:
        """Claims and acceptances. Readers that see the same records share the view."""
        return tuple([self._view(source, slot) for slot in slots])

    def _view(self, source: SimulatedReplica, slot: int) -> ShardView:
        claims, given = self.read(source, self.claim_keys[slot]), self.read(source, self._given_keys[slot])
        known = self._views.get(slot)
        if known is not None and known[0] is claims and known[1] is given:
            return known[2]
        live = tuple([LiveClaim(claims[owner].record, claims[owner].expires) for owner in sorted(claims)])
        newest = latest_acceptance(stored.record for stored in given.values())
        view = ShardView(slot, live, None, newest.term) if isinstance(newest, ResetRecord) else ShardView(slot, live, newest)
        self._views[slot] = claims, given, view
        return view

    def writers(self, source: SimulatedReplica, shard: int) -> list[int]:
        """The trace entries that wrote what `source` sees of the shard."""
        keys = self.claim_keys[shard], self._given_keys[shard]
        return [stored.cause for key in keys for stored in self.read(source, key).values()]
