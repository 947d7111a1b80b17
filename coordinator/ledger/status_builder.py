"""The one status document, made from the ledger's state and the live records as a pure function of the time.

Invariant I6: a peer is `working` only while its own work is accepted in time. A claim, a heartbeat or a busy processor makes it
`starting` for one allowance, then `overdue`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Generic, Literal, NamedTuple, TypeVar

from lutetia.coordinator.ledger.lanes.status import LANES_FOR_A_NODE, LANES_SHOWN, lane_statuses, merge_stalls, merge_status
from lutetia.coordinator.ledger.run_state import Pace, RunState
from lutetia.coordinator.ledger.stalls import (
    ShardFacts,
    audit_stalls,
    dropped_snapshot,
    explained,
    is_quiet,
    node_stall,
    shard_stall,
    suspected_lineages,
)
from lutetia.protocol.claims import LiveClaim, slot_of
from lutetia.protocol.schema.identity import peer_id_of
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.team_spec import TeamSpec
from lutetia.protocol.schema.records import ClaimRecord, NodeRecord
from lutetia.protocol.schema.status import (
    BanStatus,
    CheckStatus,
    HeldMixtureStatus,
    NodeStatus,
    PauseStatus,
    QuarantineStatus,
    RefusalStatus,
    RouterStatus,
    ShardState,
    ShardStatus,
    StallStatus,
    SwarmStatus,
)
from lutetia.protocol.schema.verdicts import CHECK_NAMES
from lutetia.protocol.stalled_claims import Seen, current_holder

Health = Literal["working", "starting", "standby", "paused", "overdue", "quarantined"]
R = TypeVar("R", NodeRecord, ClaimRecord)
QUARANTINED_SHOWN, BANNED_SHOWN = 64, 64
NODES_SHOWN = 960
"""So many nodes fit into a status document beside as many shards as a run may have."""

_peer_id_of = lru_cache(maxsize=16384)(peer_id_of)


class Sighting(NamedTuple, Generic[R]):
    """A live record. Times are Unix seconds. A tuple, since every look makes one for every node and claim."""

    record: R
    expires: float
    since: float
    """Since when its owner has been seen without a gap (for a claim: on this shard)."""


@dataclass(frozen=True, slots=True)
class LiveView:
    """The swarm as the DHT shows it."""

    nodes: Sequence[Sighting[NodeRecord]] = ()
    claims: Sequence[Sighting[ClaimRecord]] = ()
    copies: Mapping[str, int] = field(default_factory=dict)
    """By accepted checkpoint: how many live peers besides the coordinators hold it, as a random chunk of each shows."""
    histories: Mapping[int, Seen] = field(default_factory=dict)
    """By shard: the histories of its claims."""
    connections: Mapping[str, str] = field(default_factory=dict)
    """The address of each peer that the coordinator is connected to, by peer id."""
    free_since: Mapping[int, float] = field(default_factory=dict)
    """By shard: since when no peer has claimed it, in Unix seconds."""
    at_work: Mapping[int, frozenset[int]] | None = None
    """By shard: the lanes at which nodes work; None: not known, or the run has no lanes."""
    merging: frozenset[str] = frozenset()
    """Digests of the results that are being merged."""
    lent: Mapping[int, str] = field(default_factory=dict)
    """By shard: what a check of it that is lent to nodes waits for."""


def allowance(pace: Pace | None, manifest: Manifest) -> float:
    """Seconds within which a peer's next acceptance on a shard is due.

    Twice its measured seconds per accepted epoch on this shard plus a lease; before two acceptances the tenure. What the peer
    reports about itself does not count.
    """
    if pace is not None and pace.interval is not None:
        return 2 * pace.interval + manifest.timing.lease
    return _tenure(manifest)


def _tenure(manifest: Manifest) -> float:
    return max(manifest.timing.tenure, manifest.timing.lease)


def status(state: RunState, manifest: Manifest, live: LiveView, now: float, *, software: str = "") -> SwarmStatus:
    """The document at `now` (Unix seconds)."""
    claims: dict[int, list[Sighting[ClaimRecord]]] = defaultdict(list)
    banned = {ban.peer for ban in manifest.orders.banned}
    barred = state.quarantined.keys() | banned
    for claim in live.claims:
        if claim.expires > now and claim.record.shard in state.shards and claim.record.owner not in barred:
            claims[slot_of(claim.record.shard, claim.record.lane)].append(claim)
    held: dict[int, list[Sighting[ClaimRecord]]] = defaultdict(list)
    holders: dict[str, list[Sighting[ClaimRecord]]] = defaultdict(list)
    for slot in sorted(claims):
        if claim := _held_claim(state, manifest, slot, claims[slot], live, now):
            held[claim.record.shard].append(claim)
            holders[claim.record.owner].append(claim)
    online = [
        node for node in live.nodes if node.expires > now and node.record.state != "left" and node.record.owner not in banned
    ]
    due = {shard: _last_due(state, manifest, claims) for shard, claims in held.items()}
    shards = tuple(
        _shard_status(state, manifest, index, held.get(index, ()), due.get(index), live, now)
        for index in range(len(state.shards))
    )
    if manifest.team:
        shards = tuple(_with_lanes(state, manifest.team, shards, held, live, now))
    most = NODES_SHOWN - -(-sum(len(shard.lanes) + (shard.merge is not None) for shard in shards) // LANES_FOR_A_NODE)
    nodes = shown_nodes(state, online, holders, most)
    shown = tuple(
        _node_status(state, manifest, node, holders.get(node.record.owner, []), live.connections, now) for node in nodes
    )
    stalled = _stalled_shards(state, manifest, shards, live, sum(node.health == "standby" for node in shown), now)
    orders = manifest.orders
    if is_quiet(manifest, now):
        stalled = []
    stalled_nodes = [
        stall
        for node in shown
        if (stall := node_stall(state, node.owner, node.health, node.shard, None if node.shard is None else due.get(node.shard)))
    ]
    return SwarmStatus(
        run=state.run,
        name=state.name,
        manifest_version=state.manifest_version,
        time=now,
        coordinator=state.coordinator,
        software=software,
        shards=shards,
        nodes=shown,
        nodes_not_shown=len(online) - len(nodes),
        router=_router_status(state),
        mixture=state.mixture.mixture if state.mixture else None,
        held_mixture=_held_mixture(state),
        mixture_epochs=state.mixture.epochs if state.mixture else (),
        accepted=state.accepted,
        rejected=state.rejected,
        events=state.events,
        refusals=tuple(RefusalStatus(**refusal.model_dump(exclude={"kind", "again_at", "costs"})) for refusal in state.refusals),
        finished=state.finished,
        paused=PauseStatus(since=orders.paused.since, text=orders.paused.text) if orders.paused else None,
        banned=tuple(BanStatus(owner=ban.peer, since=ban.since, text=ban.text) for ban in orders.banned[-BANNED_SHOWN:]),
        checks=tuple(
            CheckStatus(check=check, outcome=outcome, count=spent.count, seconds=spent.seconds, size=spent.size)
            for (check, outcome), spent in sorted(
                state.spent.items(), key=lambda item: (CHECK_NAMES.index(item[0][0]), item[0][1])
            )
        ),
        audits_due=len(state.audits),
        stalls=tuple(
            explained(
                dropped_snapshot(state),
                stalled,
                suspected_lineages(state),
                merge_stalls(state),
                audit_stalls(state, manifest, now),
                stalled_nodes,
            )
        ),
        stalled_shards=tuple(stall.shard for stall in stalled if stall.shard is not None),
        quarantined=tuple(
            QuarantineStatus(**why.model_dump(include={"time", "owner", "shard", "epoch", "text"}))
            for why in list(state.quarantined.values())[-QUARANTINED_SHOWN:]
        ),
    )


def shown_nodes(
    state: RunState, nodes: Sequence[Sighting[NodeRecord]], holders: Collection[str], most: int = NODES_SHOWN
) -> list[Sighting[NodeRecord]]:
    """The nodes that the document has room for, ordered by public key.

    Identities cost nothing, so those come first that hold a shard or have had work accepted, then those seen the longest.

    Args:
        state: The run.
        nodes: All nodes that are online.
        holders: Public keys of those that hold a shard.
        most: How many are shown.
    """

    def rank(node: Sighting[NodeRecord]) -> tuple[bool, float, str]:
        owner = node.record.owner
        return not (owner in holders or state.peer(owner).accepted), node.since, owner

    return sorted(sorted(nodes, key=rank)[:most], key=lambda node: node.record.owner)


def _held_claim(
    state: RunState, manifest: Manifest, slot: int, claims: list[Sighting[ClaimRecord]], live: LiveView, now: float
) -> Sighting[ClaimRecord] | None:
    """The claim of the peer that holds the slot, by the rule that every node applies."""
    view = state.slot_view(slot).with_claims(LiveClaim(claim.record, claim.expires) for claim in claims)
    seen = live.histories.get(slot, {})
    holder = current_holder(state.run, view, seen, _tenure(manifest), manifest.checkpoint_samples, now)
    return next((claim for claim in claims if claim.record.owner == holder), None)


def _due(state: RunState, manifest: Manifest, claim: Sighting[ClaimRecord]) -> tuple[float | None, float]:
    """Unix seconds: (until when the claimant's last acceptance covers it, until when its claim alone does)."""
    shard = claim.record.shard
    pace, resumed = state.pace(claim.record.owner, shard), manifest.orders.resumed or 0.0
    allowed = allowance(pace, manifest)
    covered = None if pace is None else max(pace.last_accepted, resumed) + allowed
    return covered, max(claim.since, resumed) + allowed


def _last_due(state: RunState, manifest: Manifest, held: Iterable[Sighting[ClaimRecord]]) -> float | None:
    """When the next acceptance of the shard's last holder in time is due, in Unix seconds; None without a holder."""
    return max((when for claim in held for when in _due(state, manifest, claim) if when is not None), default=None)


def _shard_status(
    state: RunState,
    manifest: Manifest,
    index: int,
    held: Sequence[Sighting[ClaimRecord]],
    due: float | None,
    live: LiveView,
    now: float,
) -> ShardStatus:
    """`held`: the claims that hold the shard, or its lanes in their order. A shard with lanes is late when all of them are.

    `due`: when its next acceptance is due, by all of them.
    """
    shard, claim = state.shards[index], held[0] if held else None
    due = None if manifest.orders.paused else due
    done = shard.epoch >= state.epochs
    return ShardStatus(
        shard=index,
        name=manifest.shards[index].name,
        epoch=shard.epoch,
        epochs=state.epochs,
        samples=shard.epoch * manifest.checkpoint_samples,
        samples_budget=manifest.samples_per_shard,
        state=_shard_state(done, claim, due, now),
        owner=claim.record.owner if claim else None,
        claim_expires=claim.expires if claim else None,
        holdout_loss=shard.acceptance.holdout_loss if shard.acceptance else None,
        checkpoint=shard.accepted,
        last_accepted=shard.accepted_at,
        due=None if done else due,
        initial_loss=shard.baseline,
        waiting=len(shard.candidates),
        audit=shard.audit,
        term=shard.term,
        copies=live.copies.get(shard.accepted) if shard.accepted else None,
    )


def _with_lanes(
    state: RunState,
    team: TeamSpec,
    shards: Iterable[ShardStatus],
    held: Mapping[int, Sequence[Sighting[ClaimRecord]]],
    live: LiveView,
    now: float,
) -> Iterator[ShardStatus]:
    """The shards with their lanes and their next merge, as far as the document has room for them."""
    room = LANES_SHOWN
    for shard in shards:
        if room < 1 or shard.epoch >= shard.epochs:
            yield shard
            continue
        ledger = state.shards[shard.shard]
        merge = merge_status(ledger, team, _at_work(live, shard.shard))
        holders = {claim.record.lane: (claim.record.owner, claim.record.state) for claim in held.get(shard.shard, ())}
        overdue = merge.due is not None and now >= merge.due
        lanes = lane_statuses(ledger, holders, live.merging, overdue)[: room - 1]
        room -= 1 + len(lanes)
        yield shard.model_copy(update={"lanes": lanes, "merge": merge})


def _stalled_shards(
    state: RunState, manifest: Manifest, shards: Sequence[ShardStatus], live: LiveView, standbys: int, now: float
) -> list[StallStatus]:
    """What holds up each shard that does not go on."""
    facts = {
        shard.shard: ShardFacts(
            shard.owner,
            shard.due,
            None if shard.owner else live.free_since.get(shard.shard),
            standbys,
            live.lent.get(shard.shard, ""),
            _merge_due(state, manifest, shard.shard, live),
        )
        for shard in shards
    }
    return [stall for index in facts if (stall := shard_stall(state, manifest, index, facts[index], now))]


def _merge_due(state: RunState, manifest: Manifest, shard: int, live: LiveView) -> float | None:
    """From when the gathered results of the shard are merged, in Unix seconds; None where it has none."""
    ledger = state.shards[shard]
    if manifest.team is None or not ledger.gathered:
        return None
    return merge_status(ledger, manifest.team, _at_work(live, shard)).due


def _at_work(live: LiveView, shard: int) -> frozenset[int] | None:
    return None if live.at_work is None else live.at_work.get(shard, frozenset())


def _shard_state(done: bool, claim: Sighting[ClaimRecord] | None, due: float | None, now: float) -> ShardState:
    if done:
        return "done"
    if claim is None:
        return "unclaimed"
    if due is not None and now > due:
        return "overdue"
    return "claimed" if claim.record.state == "claiming" else "training"


def _node_status(
    state: RunState,
    manifest: Manifest,
    node: Sighting[NodeRecord],
    claims: Sequence[Sighting[ClaimRecord]],
    connections: Mapping[str, str],
    now: float,
) -> NodeStatus:
    record = node.record
    peer = state.peer(record.owner)
    health, shard = _health(state, manifest, record, claims, now)
    return _node_document(
        record.owner,
        record.state,
        health,
        record.hardware.device,
        record.samples_per_second,
        shard,
        tuple(claim.record.shard for claim in claims) if len(claims) > 1 else (),
        (peer.accepted, peer.rejected, peer.last_accepted),
        record.issued,
        link_of(connections.get(_peer_id_of(record.owner))),
        record.software,
        "" if record.owner in manifest.orders.hidden_names else record.name,
    )


@lru_cache(maxsize=4 * NODES_SHOWN)
def _node_document(
    owner: str,
    state: str,
    health: Health,
    device: str,
    samples_per_second: float,
    shard: int | None,
    shards: tuple[int, ...],
    results: tuple[int, int, float | None],
    last_seen: float,
    link: Literal["direct", "relayed"] | None,
    software: str,
    name: str,
) -> NodeStatus:
    """The same document for the same facts: between two records of a node little changes, and making it takes time."""
    return NodeStatus(
        owner=owner,
        peer_id=_peer_id_of(owner),
        state=state,
        health=health,
        device=device,
        samples_per_second=samples_per_second,
        shard=shard,
        shards=shards,
        accepted=results[0],
        rejected=results[1],
        last_accepted=results[2],
        last_seen=last_seen,
        relayed=link == "relayed",
        link=link,
        software=software,
        name=name,
    )


def link_of(address: str | None) -> Literal["direct", "relayed"] | None:
    """How a peer is connected, by the address that its connection really has; None: it is not connected."""
    return None if address is None else "relayed" if "/p2p-circuit" in address else "direct"


def _health(
    state: RunState, manifest: Manifest, record: NodeRecord, claims: Sequence[Sighting[ClaimRecord]], now: float
) -> tuple[Health, int | None]:
    """The node's health, and the shard that shows it. A node that holds several is overdue if it is so on any of them."""
    shard = claims[0].record.shard if claims else None
    if record.owner in state.quarantined:
        return "quarantined", shard
    if record.state == "paused" or (claims and manifest.orders.paused):
        return "paused", shard
    found: dict[Health, int] = {}
    for claim in claims:
        if state.shards[claim.record.shard].epoch < state.epochs:
            found.setdefault(_health_on(state, manifest, claim, now), claim.record.shard)
    if not found:
        return "starting" if record.state in ("joining", "probing") else "standby", shard
    worst: tuple[Health, ...] = ("overdue", "working", "starting")
    return next((health, found[health]) for health in worst if health in found)


def _health_on(state: RunState, manifest: Manifest, claim: Sighting[ClaimRecord], now: float) -> Health:
    covered, patience = _due(state, manifest, claim)
    if covered is not None and now <= covered:
        return "working"
    return "starting" if now <= patience else "overdue"


def _held_mixture(state: RunState) -> HeldMixtureStatus | None:
    held = None if state.stitched is None or state.stitched.current else state.stitched
    return held and HeldMixtureStatus(mixture=held.mixture, time=held.time, text=held.text)


def _router_status(state: RunState) -> RouterStatus | None:
    router = state.router
    return router and RouterStatus(
        accuracy=router.accuracy,
        accuracy_by_time=router.accuracy_by_time,
        trained_at=router.time,
        epochs=router.epochs,
        calibration_error=router.calibration_error,
    )
