"""Claims on shards, as pure functions of what the DHT shows. Every reader applies the same rule to the same claims."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from lutetia.protocol.schema.fields import MOST_SHARDS
from lutetia.protocol.schema.records import AcceptanceRecord, ClaimRecord, ResetRecord


def slot_of(shard: int, lane: int) -> int:
    """The number of a slot: what a node claims, one lane of one shard. Slots of lane 0 have the numbers of their shards."""
    return lane * MOST_SHARDS + shard


def shard_and_lane(slot: int) -> tuple[int, int]:
    """The shard of a slot, and its lane."""
    lane, shard = divmod(slot, MOST_SHARDS)
    return shard, lane


@lru_cache(maxsize=16)
def slots_of(shards: int, lanes: int) -> tuple[int, ...]:
    """All slots of a run, in ascending order: lane 0 of every shard first."""
    return tuple(slot_of(shard, lane) for lane in range(lanes) for shard in range(shards))


def slot_name(slot: int) -> str:
    """A slot in words."""
    shard, lane = shard_and_lane(slot)
    return f"lane {lane} of shard {shard}" if lane else f"shard {shard}"


@dataclass(frozen=True)
class LiveClaim:
    """A claim as the DHT holds it, with its expiry in Unix seconds."""

    record: ClaimRecord
    expires: float


Stand = tuple[int, int, str | None]
"""(term, accepted epoch, its checkpoint): the state on which the next epoch of a shard is built."""


@dataclass(frozen=True)
class ShardView:
    """One shard as a peer sees it, or one slot of a run with lanes, whose number is then its `shard`.

    `reset`: the term of a rollback to the beginning, after which there is no acceptance.
    """

    shard: int
    claims: tuple[LiveClaim, ...] = ()
    acceptance: AcceptanceRecord | None = None
    reset: int = 0

    @cached_property
    def epoch(self) -> int:
        return self.acceptance.epoch if self.acceptance else 0

    @cached_property
    def claimants(self) -> frozenset[str]:
        return frozenset(claim.record.owner for claim in self.claims)

    @cached_property
    def held_until(self) -> float:
        """When the last claim expires (Unix seconds); 0.0 without a claim. Cached: read far more often than it changes."""
        return max((claim.expires for claim in self.claims if claim.record.state != "released"), default=0.0)

    @cached_property
    def term(self) -> int:
        return self.acceptance.term if self.acceptance else self.reset

    @cached_property
    def place(self) -> tuple[int, int]:
        """(term, epoch): grows with every acceptance and every rollback, so it tells which of two views is older."""
        return self.term, self.epoch

    @property
    def stand(self) -> Stand:
        """The state on which the next epoch is built."""
        return self.term, self.epoch, self.acceptance.checkpoint if self.acceptance else None

    def with_claims(self, claims: Iterable[LiveClaim]) -> ShardView:
        """The same accepted lineage with other claims."""
        return ShardView(self.shard, tuple(claims), self.acceptance, self.reset)

    def live(self, now: float) -> list[LiveClaim]:
        """Claims that are neither expired nor released."""
        return [claim for claim in self.claims if claim.expires > now and claim.record.state != "released"]


def rendezvous(run: str, shard: int, epoch: int, owner: str) -> int:
    """Rendezvous hash of a peer for the next epoch of a shard (Thaler and Ravishankar 1998); here the lowest value wins."""
    return int.from_bytes(hashlib.sha256(f"{run}|{shard}|{epoch}|{owner}".encode()).digest()[:8], "big")


def trained(given: AcceptanceRecord, lane: int, owner: str) -> bool | None:
    """Whether this peer trained this lane of the accepted epoch; None: nobody did, or the record does not say who."""
    if not given.lanes:
        return given.author == owner
    mark = dict(zip(given.lanes, given.author_marks, strict=False)).get(lane)
    return None if mark is None else owner.startswith(mark)


def shard_owner(run: str, view: ShardView, now: float) -> str | None:
    """The claimant that wins the shard now, or None. Callers leave out stalled claims first (`stalled_claims.current_holder`).

    1. The author of the last acceptance, of a slot that of its lane, wins while it has tenure and its claim lives.
    2. Else a peer that trains wins over one that is still claiming: a late claim never takes a shard from its holder.
    3. Among equals the lowest rendezvous hash wins.
    """
    live = {claim.record.owner: claim.record.state == "claiming" for claim in view.live(now)}
    accepted = view.acceptance
    if accepted and now < accepted.tenure_until:
        lane = shard_and_lane(view.shard)[1]
        if author := next((owner for owner in live if trained(accepted, lane, owner)), None):
            return author
    return min(live, key=lambda owner: (live[owner], rendezvous(run, view.shard, view.epoch, owner)), default=None)


def free_shards(views: Iterable[ShardView], epochs: int, now: float) -> list[ShardView]:
    """Shards with work left and without a live claim: a newcomer never contests a claim. `epochs`: the budget of a shard."""
    return [view for view in views if view.epoch < epochs and view.held_until <= now]


def preferred_shard(
    run: str, owner: str, free: Iterable[ShardView], fitness: Mapping[int, float], begun: Collection[int] = ()
) -> ShardView | None:
    """The free slot that this peer should claim: best fitness first, ties by its own rendezvous hash, so that joiners spread.

    Joiners spread over shards first: lane 0 comes before all other lanes. Of those the best fit comes first, which is the largest
    share that the peer trains in time, then the lowest lane. A lane of which this peer has unfinished work counts as lane 0.

    Args:
        run: the run's id.
        owner: public key of the peer.
        free: the free slots.
        fitness: of slots: hardware fit, for lane 0 × work left; slots of fitness 0 do not fit this node.
        begun: slots of which this peer has unfinished work.
    """
    fitting = [view for view in free if fitness.get(view.shard, 0) > 0]

    def order(view: ShardView) -> tuple[bool, float, int, int]:
        lane = 0 if view.shard in begun else view.shard // MOST_SHARDS
        return lane > 0, -fitness[view.shard], lane, rendezvous(run, view.shard, view.epoch, owner)

    return min(fitting, key=order, default=None)


def lane_fitness(fitness: float, share: float, rate: float, samples: int, seconds: float) -> float:
    """How well a lane fits a node that fits its shard: the share of an epoch that it would add within the time there is.

    A node that cannot train the lane's share in time is late every time, so the lane does not fit it. Of the lanes that it can
    train in time, the largest share is worth most.

    Args:
        fitness: that of the shard, 0 to 1.
        share: of an epoch's samples that the lane trains.
        rate: samples per second of the node; 0: not known, so that every share fits.
        samples: of an epoch.
        seconds: in which a lane's result has to be there.
    """
    late = rate > 0 and share * samples / rate > seconds
    return 0.0 if late else fitness * share


def latest_acceptance(records: Iterable[AcceptanceRecord | ResetRecord]) -> AcceptanceRecord | ResetRecord | None:
    """The record of the highest term, then of the highest epoch (a reset counts as epoch 0).

    If two coordinators accepted the same epoch, the lower digest wins, so that all readers agree.
    """

    def order(record: AcceptanceRecord | ResetRecord) -> tuple[int, int, str]:
        accepted = isinstance(record, AcceptanceRecord)
        return -record.term, -record.epoch if accepted else 0, record.checkpoint if accepted else ""

    return min(records, key=order, default=None)
