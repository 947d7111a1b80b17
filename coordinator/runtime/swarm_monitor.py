"""Reads the DHT: nodes, claims, copies of accepted checkpoints, and results that were not offered by stream."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from lutetia.coordinator.ledger.status_builder import LiveView, Sighting
from lutetia.protocol.async_helpers import gather_bounded
from lutetia.protocol.blobs.holder_proofs import HolderProofs
from lutetia.protocol.blobs.worker import Provider
from lutetia.protocol.claims import LiveClaim, ShardView, shard_and_lane, slot_of, slots_of
from lutetia.protocol.dht_records import read_records
from lutetia.protocol.rpc.accepted_checkpoints import holders_of
from lutetia.protocol.schema.manifest import Manifest, Timing
from lutetia.protocol.schema.records import (
    AcceptanceRecord,
    CheckpointRecord,
    ClaimRecord,
    NodeRecord,
    checkpoint_key,
    claim_key,
    node_keys,
)
from lutetia.protocol.stalled_claims import LONGEST_GAP, Seen, observe_claims, without_stalled
from lutetia.protocol.transport.base import Transport

_log = logging.getLogger(__name__)

_READS_AT_ONCE = 16
_COUNTS_AT_ONCE = 4
SLOTS_AT_FULL_PACE = 64
"""Up to this many slots, all claims are read at every look."""
FULL_PACE = 1000
"""Up to this many peers, all node records are read at every look."""

Key = tuple[str, int]
R = TypeVar("R", NodeRecord, ClaimRecord)


async def _nothing(holders: Mapping[int, set[str]]) -> None:
    pass


@dataclass
class SwarmMonitor:
    """`view` is what was last seen; `found` is called with every result at every look. `accepted`: whose copies count.

    `shard_view` gives the accepted state of a slot, which the monitor needs to judge the progress of claims. `copies_seen` is
    called after each count with the public keys of the peers that hold each shard's accepted checkpoint. `barred` gives the
    public keys whose claims count nowhere.
    """

    transport: Transport
    manifest: Manifest
    found: Callable[[CheckpointRecord], Awaitable[None]]
    accepted: Callable[[], Iterable[AcceptanceRecord]] = tuple
    shard_view: Callable[[int], ShardView] = ShardView
    copies_seen: Callable[[Mapping[int, set[str]]], Awaitable[None]] = _nothing
    barred: Callable[[], Collection[str]] = tuple
    view: LiveView = field(default_factory=LiveView)
    _since: dict[Key, float] = field(default_factory=dict)
    _nodes: list[tuple[NodeRecord, float]] = field(default_factory=list)
    _nodes_due: float = float("-inf")
    _claims: list[tuple[ClaimRecord, float]] = field(default_factory=list)
    _claims_due: float = float("-inf")
    _proofs: HolderProofs = field(default_factory=HolderProofs)

    async def run(self) -> None:
        """Read nodes, claims and results four times per heartbeat, and count copies once per lease, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._repeat(self.look_at_peers, lambda timing: look_pause(timing.heartbeat)))
            group.create_task(self._repeat(self.look_at_checkpoints, lambda timing: look_pause(timing.heartbeat)))
            group.create_task(self._repeat(self.count_copies, lambda timing: timing.lease))

    async def _repeat(self, look: Callable[[], Awaitable[None]], pace: Callable[[Timing], float]) -> None:
        while True:
            pause = pace(self.manifest.timing)
            try:
                await look()
            except (ConnectionError, TimeoutError) as error:
                _log.warning("could not read the DHT (%s); trying again in %.1f s", error, pause)
            await asyncio.sleep(pause)

    async def look_at_peers(self) -> None:
        """Refresh `view`. In a large swarm the node records are read less often."""
        run, shards, now = self.manifest.run_id, range(len(self.manifest.shards)), self.transport.now()
        if now >= self._nodes_due:
            self._nodes = [item for item in await self._read(node_keys(run)) if isinstance(item[0], NodeRecord)]
            self._nodes_due = now + nodes_pause(len(self._nodes), self.manifest.timing.heartbeat)
        slots = slots_of(len(shards), self.manifest.lanes)
        if fresh := now >= self._claims_due:
            read = await self._read(claim_key(run, *shard_and_lane(slot)) for slot in slots)
            self._claims = [item for item in read if isinstance(item[0], ClaimRecord)]
            self._claims_due = now + claims_pause(len(slots), self.manifest.timing.heartbeat)
        claims = self._claims
        now = self.transport.now()
        nodes = [(record, expires) for record, expires in self._nodes if expires > now]
        view, self._since = sighted(nodes, claims, self._since, now)
        histories, at_work = self.view.histories, self.view.at_work
        if fresh:
            longest_gap = LONGEST_GAP * self.manifest.timing.lease
            histories = observed(histories, view.claims, map(self.shard_view, slots), now, longest_gap)
            at_work = lanes_at_work(self.manifest, view.claims, histories, self.shard_view, self.barred(), now)
        free = free_since(self.view.free_since, view.claims, shards, now)
        connections = await self.transport.connections()
        self.view = replace(
            view, copies=self.view.copies, histories=histories, free_since=free, connections=connections, at_work=at_work
        )  # fmt: skip

    def forget_claims(self) -> None:
        """The owner has ended a pause: no claim counts as idle for it."""
        self.view = replace(self.view, histories={}, free_since={})

    async def look_at_checkpoints(self) -> None:
        """Call `found` with every result in the DHT."""
        run = self.manifest.run_id
        for record, _ in await self._read(checkpoint_key(run, shard) for shard in range(len(self.manifest.shards))):
            if isinstance(record, CheckpointRecord):
                await self.found(record)

    async def count_copies(self) -> None:
        """Count the peers in `view` that announce each accepted checkpoint and answered a random chunk of it."""
        alive = {node.record.owner: node.record for node in self.view.nodes if node.record.state != "left"}

        async def count(acceptance: AcceptanceRecord) -> tuple[AcceptanceRecord, set[str]]:
            holders = await holders_of(self.transport, self.manifest, acceptance, set(alive))
            candidates = [Provider(alive[holder].peer_id, alive[holder].addresses) for holder in sorted(holders)]
            proved = await self._proofs.proved(self.transport, candidates, [acceptance.weights, acceptance.state])
            return acceptance, {holder for holder in holders if alive[holder].peer_id in proved}

        counts = await gather_bounded(count, self.accepted(), _COUNTS_AT_ONCE)
        self.view = replace(self.view, copies={acceptance.checkpoint: len(owners) for acceptance, owners in counts})
        await self.copies_seen({acceptance.shard: owners for acceptance, owners in counts})

    async def _read(self, keys: Iterable[str]) -> list[tuple[Any, float]]:
        """The live records under all `keys`."""
        lists = await gather_bounded(partial(read_records, self.transport), keys, _READS_AT_ONCE)
        return [item for records in lists for item in records]


def look_pause(heartbeat: float) -> float:
    """Seconds between two looks at the DHT."""
    return heartbeat / 4


def nodes_pause(nodes: int, heartbeat: float) -> float:
    """Seconds between two reads of the node records: they grow with the number of peers, and live three heartbeats."""
    return look_pause(heartbeat) * min(6.0, nodes / FULL_PACE) if nodes > FULL_PACE else 0.0


def claims_pause(slots: int, heartbeat: float) -> float:
    """Seconds between two reads of all claims: in a run with many lanes they are read less often, at least once per heartbeat."""
    return look_pause(heartbeat) * min(4.0, slots / SLOTS_AT_FULL_PACE) if slots > SLOTS_AT_FULL_PACE else 0.0


def lanes_at_work(
    manifest: Manifest,
    claims: Sequence[Sighting[ClaimRecord]],
    histories: Mapping[int, Seen],
    shard_view: Callable[[int], ShardView],
    barred: Collection[str],
    now: float,
) -> dict[int, frozenset[int]] | None:
    """By shard the lanes at which nodes work, by the claims that count; None without lanes, and as long as no claim was seen.

    Args:
        manifest: the run.
        claims: those that were seen.
        histories: by slot, what was seen of its claims before: a stalled one does not count.
        shard_view: gives the accepted state of a slot.
        barred: public keys whose claims count nowhere.
        now: Unix seconds.
    """
    if manifest.team is None or not claims:
        return None
    by_slot: dict[int, list[LiveClaim]] = defaultdict(list)
    for claim in claims:
        record = claim.record
        if claim.expires > now and record.owner not in barred and record.lane < manifest.lanes:
            by_slot[slot_of(record.shard, record.lane)].append(LiveClaim(record, claim.expires))
    lanes: dict[int, set[int]] = defaultdict(set)
    tenure = max(manifest.timing.tenure, manifest.timing.lease)
    for slot, claimed in by_slot.items():
        view = shard_view(slot).with_claims(claimed)
        if without_stalled(histories.get(slot, {}), view, None, tenure, manifest.checkpoint_samples, now).claims:
            shard, lane = shard_and_lane(slot)
            lanes[shard].add(lane)
    return {shard: frozenset(numbers) for shard, numbers in lanes.items()}


def sighted(
    nodes: Iterable[tuple[NodeRecord, float]], claims: Iterable[tuple[ClaimRecord, float]], known: Mapping[Key, float], now: float
) -> tuple[LiveView, dict[Key, float]]:
    """The view of these records (each with its expiry), and since when each has been seen.

    `known` is the second value of the look before. A released claim counts as gone, so a new claim starts at zero.
    """
    since: dict[Key, float] = {}

    def sighting(record: R, expires: float, key: Key) -> Sighting[R]:
        since[key] = known.get(key, now)
        return Sighting(record, expires, since[key])

    peers = [sighting(record, expires, (record.owner, -1)) for record, expires in nodes]
    held = [
        sighting(record, expires, (record.owner, slot_of(record.shard, record.lane)))
        for record, expires in claims
        if record.state != "released"
    ]
    return LiveView(peers, held), since


def free_since(
    known: Mapping[int, float], claims: Iterable[Sighting[ClaimRecord]], shards: Iterable[int], now: float
) -> dict[int, float]:
    """By shard that nobody claims: since when, as this and earlier looks show (`known`)."""
    claimed = {claim.record.shard for claim in claims}
    return {shard: known.get(shard, now) for shard in shards if shard not in claimed}


def observed(
    known: Mapping[int, Seen],
    claims: Iterable[Sighting[ClaimRecord]],
    shards: Iterable[ShardView],
    now: float,
    longest_gap: float,
) -> dict[int, Seen]:
    """By slot: the histories of its claims after one more look, as nodes keep them (`stalled_claims.observe_claims`)."""
    by_shard: dict[int, list[LiveClaim]] = defaultdict(list)
    for claim in claims:
        by_shard[slot_of(claim.record.shard, claim.record.lane)].append(LiveClaim(claim.record, claim.expires))
    views = (shard.with_claims(by_shard[shard.shard]) for shard in shards)
    return {view.shard: observe_claims(known.get(view.shard, {}), view, now, longest_gap) for view in views if view.claims}
