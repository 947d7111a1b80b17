"""The DHT: each replica keeps its own part, records arrive after a delay, and each reader asks the replicas that it can reach.

The model follows `tests.memory_transport`: a record goes to the replicas that follow its key on a hash ring and to its
writer; of each owner the record that expires last is kept; replicas and readers check by their own clocks.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lutetia.protocol.claims import LiveClaim, ShardView, latest_acceptance, shard_and_lane, slots_of
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.records import (
    AcceptanceRecord,
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

Record = Any
"""One of the records of `protocol.schema.records`, built without validation in settings without forgers."""


@dataclass(frozen=True, slots=True)
class SimulatedRecord:
    """`sealed` is empty in settings without signatures. `cause`: the trace entry that wrote it."""

    record: Record
    expires: float
    sealed: bytes
    cause: int


class SimulatedReplica(SimulatedPeer, Protocol):
    parts: dict[str, dict[str, SimulatedRecord]]
    written: set[str]
    """Keys under which it published records of its own."""
    denies: bool
    """A sybil's replica: it accepts records and never returns them."""

    def clock(self) -> float: ...


class SimulatedDht:
    def __init__(self, queue: EventQueue, links: Links, costs: Costs, manifest: Manifest, replicas: int, *, strict: bool) -> None:
        """`strict`: clocks differ or records are forged, so every replica and reader checks every record itself."""
        self._queue, self._links, self._costs, self._replicas, self._strict = queue, links, costs, replicas, strict
        self._limits = RecordLimits(manifest.timing.heartbeat, manifest.timing.maximum_clock_skew)
        run, shards, slots = manifest.run_id, len(manifest.shards), slots_of(len(manifest.shards), manifest.lanes)
        self.claim_keys = {slot: claim_key(run, *shard_and_lane(slot)) for slot in slots}
        self.acceptance_keys = [acceptance_key(run, shard) for shard in range(shards)]
        self._given_keys = {slot: self.acceptance_keys[shard_and_lane(slot)[0]] for slot in slots}
        self._ring: list[tuple[int, int]] = []
        self._members: dict[int, SimulatedReplica] = {}
        self._places: dict[str, int] = {}
        self._near: dict[tuple[str, int], tuple[tuple[int, int], list[SimulatedReplica]]] = {}
        self._slots = {key: (slot,) for slot, key in self.claim_keys.items()}
        self._slots |= {key: tuple(slots[shard::shards]) for shard, key in enumerate(self.acceptance_keys)}
        self._views: dict[int, dict[int, ShardView]] = {}
        self._given: dict[str, dict[int, AcceptanceRecord | ResetRecord | None]] = {}
        """By key and group, as the views have them: the lanes of a shard share what is accepted of it."""
        self._shares_given = manifest.team is not None
        self._views_version = (0, 0)
        self._ring_version = 0
        self._clock = 0.0
        self._real_check = record_check(manifest, lambda: self._clock)
        self.refused: list[str] = []

    @property
    def size(self) -> int:
        return len(self._members)

    # membership

    def enter(self, member: SimulatedReplica, name: str) -> None:
        """`member` answers from now on; its neighbours give it the records that it is to hold."""
        self._members[member.index] = member
        place = (_position(name), member.index)
        if place not in self._ring:
            bisect.insort(self._ring, place)
        self._ring_version += 1
        start = bisect.bisect_left(self._ring, place)
        for offset in range(1, min(len(self._ring), self._replicas + 1)):
            neighbour = self._members[self._ring[(start + offset) % len(self._ring)][1]]
            if self._links.dials(member, neighbour):
                self._hand_over(neighbour, member)

    def _hand_over(self, giver: SimulatedReplica, taker: SimulatedReplica) -> None:
        for key, part in giver.parts.items():
            if taker in self.nearest(taker, key):
                for owner, stored in part.items():
                    self._keep(taker, key, owner, stored)

    def depart(self, member: SimulatedReplica) -> None:
        """Remove the member and all that it held."""
        self._members.pop(member.index, None)
        self._ring = [place for place in self._ring if place[1] != member.index]
        member.parts.clear()
        member.written.clear()
        self._ring_version += 1

    def changed(self) -> None:
        """A member stopped or began to answer."""
        self._ring_version += 1

    def nearest(self, source: SimulatedReplica, key: str) -> list[SimulatedReplica]:
        """The replicas of `key` as `source` finds them, itself included."""
        slot = (key, -1 - source.index if self._links.blocked else self._links.group(source.index))
        version = (self._ring_version, self._links.version)
        known = self._near.get(slot)
        if known is None or known[0] != version:
            known = self._near[slot] = (version, self._walk(source, key))
        return known[1]

    def _walk(self, source: SimulatedReplica, key: str) -> list[SimulatedReplica]:
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = _position(key)
        start, replicas = bisect.bisect_left(self._ring, (place, -1)), []
        for offset in range(len(self._ring)):
            member = self._members[self._ring[(start + offset) % len(self._ring)][1]]
            if member is source or self._links.dials(source, member):
                replicas.append(member)
                if len(replicas) == self._replicas:
                    break
        return replicas

    # writing

    def store(
        self, source: SimulatedReplica, record: Record, expires: float, identity: Identity | None, sealed: bytes = b""
    ) -> None:
        """Send `record` to the replicas; each gets it after its own delay, or never."""
        if identity is not None and not sealed:
            sealed = seal(record, identity, expires)
        stored, key = SimulatedRecord(record, expires, sealed, self._queue.cause), record.key()
        near = self.nearest(source, key)
        self._costs.stored(record.kind, len(near), self.size)
        source.written.add(key)
        self._keep(source, key, record.owner, stored, own=True)
        for replica in near:
            if replica is not source and not self._links.lost():
                self._queue.after(2 * self._links.packet(source, replica), self._arrive, source, replica, key, stored)

    def force_store(self, source: SimulatedReplica, key: str, owner: str, stored: SimulatedRecord) -> None:
        """Send a forged record to every replica, without the sender's own check."""
        for replica in self.nearest(source, key):
            if replica is not source:
                self._keep(replica, key, owner, stored)

    def _arrive(self, source: SimulatedReplica, replica: SimulatedReplica, key: str, stored: SimulatedRecord) -> None:
        if replica.answering and self._links.together(source.index, replica.index):
            self._keep(replica, key, stored.record.owner, stored)

    def _keep(self, replica: SimulatedReplica, key: str, owner: str, stored: SimulatedRecord, *, own: bool = False) -> None:
        if not own and (replica.denies or not self._accepts(key, owner, stored, replica.clock())):
            return
        mine = replica.parts.setdefault(key, {})
        old = mine.get(owner)
        if old is None or old.expires < stored.expires:
            now = self._queue.now
            if len(mine) > 8:
                for other in [name for name, held in mine.items() if held.expires < now - 120]:
                    del mine[other]
            mine[owner] = stored
            self._given.pop(key, None)
            for slot in self._slots.get(key, ()):
                for known in self._views.values():
                    known.pop(slot, None)

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

    def read(self, source: SimulatedReplica, key: str, *, own: bool = True) -> dict[str, SimulatedRecord]:
        """The live records under `key` that reach `source`, newest per owner; `own`: also those that it holds itself."""
        held = source.parts.get(key, {}) if own else {}
        newest = dict(held)
        for replica in self.nearest(source, key):
            if (replica is source and own) or replica.denies or (replica is not source and self._lose()):
                continue
            clock = replica.clock()
            for owner, stored in replica.parts.get(key, {}).items():
                if stored.expires > clock and (owner not in newest or stored.expires > newest[owner].expires):
                    newest[owner] = stored
        clock = source.clock()
        live = {owner: stored for owner, stored in newest.items() if stored.expires > clock}
        if self._strict:
            live = {
                owner: stored for owner, stored in live.items()
                if held.get(owner) is stored or self._accepts(key, owner, stored, clock)
            }  # fmt: skip
        return live

    def _lose(self) -> bool:
        """Whether the request or its answer is lost."""
        return self._links.lost() or self._links.lost()

    def look(self, source: SimulatedReplica, shards: Sequence[int]) -> tuple[ShardView, ...]:
        """Claims and acceptances. Readers that would see the same share objects, made again when a record or a link changes."""
        if self._strict or self._links.loss or self._links.blocked:
            return tuple([self._view(source, shard) for shard in shards])
        version = (self._ring_version, self._links.version)
        if version != self._views_version:
            self._views.clear()
            self._given.clear()
            self._views_version = version
        known = self._views.setdefault(self._links.group(source.index), {})
        for shard in shards:
            if shard not in known:
                known[shard] = self._view(source, shard, own=False)
        if not source.written:
            return tuple([known[shard] for shard in shards])
        own, claims, given = source.written, self.claim_keys, self._given_keys
        return tuple(  # a writer sees what it wrote before any replica has it
            [self._view(source, shard) if claims[shard] in own or given[shard] in own else known[shard] for shard in shards]
        )

    def _view(self, source: SimulatedReplica, shard: int, *, own: bool = True) -> ShardView:
        claims = self.read(source, self.claim_keys[shard], own=own)
        live = tuple([LiveClaim(claims[owner].record, claims[owner].expires) for owner in sorted(claims)])
        given = self._newest(source, self._given_keys[shard], own)
        if isinstance(given, ResetRecord):
            return ShardView(shard, live, None, given.term)
        return ShardView(shard, live, given)

    def _newest(self, source: SimulatedReplica, key: str, own: bool) -> AcceptanceRecord | ResetRecord | None:
        shared = None if own or not self._shares_given else self._given.setdefault(key, {})
        group = self._links.group(source.index)
        if shared is not None and group in shared:
            return shared[group]
        newest = latest_acceptance(stored.record for stored in self.read(source, key, own=own).values())
        if shared is not None:
            shared[group] = newest
        return newest

    def writers(self, source: SimulatedReplica, shard: int) -> list[int]:
        """The trace entries that wrote what `source` sees of the shard."""
        keys = self.claim_keys[shard], self._given_keys[shard]
        return [stored.cause for key in keys for stored in self.read(source, key).values()]


def _position(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
