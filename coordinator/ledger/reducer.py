"""The state of a run as the sum of its events: `apply(state, event) -> state`, pure, total and cheap.

Nothing is changed in place, and nothing that grows with the history is copied: each event names the fields of the state that it
changes, and the state is copied once. A replay of 10^5 events takes seconds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from lutetia.coordinator.credit.fold import credit_accepted, credit_copies, credit_lent_check, trained_samples
from lutetia.coordinator.ledger.audit_reducer import (
    LedgerOutOfOrder,
    add_costs,
    apply_acceptance_recovered,
    apply_audit_done,
    apply_audit_due,
    apply_audit_reported,
    apply_lane_dropped,
    apply_lanes_merged,
    apply_pardoned,
    apply_reset_recovered,
    apply_rolled_back,
    apply_suspicion,
    check_lane_follows,
    shard_of,
)
from lutetia.coordinator.ledger.events import (
    AcceptanceRecovered,
    AuditDone,
    AuditDue,
    AuditReported,
    BaselineMeasured,
    CheckerRefuted,
    CheckpointAccepted,
    CoordinatorStarted,
    CoordinatorStopped,
    CopiesKept,
    Event,
    HoldoutBurnt,
    LaneAccepted,
    LaneDropped,
    LanesMerged,
    LentCheckCounted,
    LineageKept,
    LineageRolledBack,
    LineageSuspected,
    ManifestPublished,
    MergeRefused,
    MixtureStitched,
    PeerPardoned,
    PeerQuarantined,
    QuarantineRecovered,
    ResetRecovered,
    ResultDoubted,
    ResultRefused,
    ResultSeen,
    ResultSuperseded,
    RouterTrained,
    RunCreated,
    RunFinished,
    SampleCostMeasured,
    SnapshotDropped,
)
from lutetia.coordinator.ledger.persistent_map import PersistentMap
from lutetia.coordinator.ledger.run_state import (
    BUDGETS,
    HISTORY,
    LOSS_CHECKS,
    PACES,
    AcceptedEpoch,
    Changes,
    Pace,
    PeerLedger,
    RunState,
    ShardLedger,
    WaitingResult,
)
from lutetia.protocol.schema.verdicts import CheckName

REMEMBERED_REFUSALS = 32
"""Refusals that the status document shows."""
_REMEMBERED_VERDICTS = 256
_REMEMBERED_LIARS = 4096
_BLAMELESS_CHECKS: frozenset[CheckName] = frozenset({"signature", "lineage", "transfer"})
"""No evidence of bad work: anybody can send a forged record in a peer's name, and a partition makes honest lineages stale."""
_UNREMEMBERED_CHECKS = _BLAMELESS_CHECKS | {"quarantine", "size"}
"""A new identity can collect these refusals for nothing, so a peer of which nothing else is known is not remembered for them."""


def apply(state: RunState, event: Event) -> RunState:
    """The state after `event`. Raises LedgerOutOfOrder when it cannot follow."""
    if not state.events and not isinstance(event, RunCreated):
        raise LedgerOutOfOrder(f"a ledger must begin with run-created, not with {event.kind}; restore it from a backup")
    return replace(state, events=state.events + 1, **_changes(state, event))


def _changes(state: RunState, event: Event) -> Changes:
    match event:
        case CheckpointAccepted():
            return _accepted(state, event)
        case LaneAccepted():
            return _lane_accepted(state, event)
        case LaneDropped():
            return apply_lane_dropped(state, event)
        case LanesMerged():
            return apply_lanes_merged(state, event)
        case MergeRefused():
            shard = shard_of(state, event.shard).updated(refused_merge=event)
            return {"shards": state.shards.set(event.shard, shard), "spent": add_costs(state, event.costs)}
        case ResultSeen():
            return _seen(state, event)
        case ResultRefused():
            return _refused(state, event)
        case ResultDoubted():
            return _doubted(state, event)
        case ResultSuperseded():
            return {"shards": state.shards.set(event.shard, _settled(shard_of(state, event.shard), event))}
        case AuditDue():
            return apply_audit_due(state, event)
        case AuditDone():
            return apply_audit_done(state, event)
        case AuditReported():
            return apply_audit_reported(state, event)
        case RunCreated():
            return _created(state, event)
        case ManifestPublished():
            return _published(state, event)
        case BaselineMeasured():
            return {"shards": state.shards.set(event.shard, shard_of(state, event.shard).updated(baseline=event.loss))}
        case AcceptanceRecovered():
            return apply_acceptance_recovered(state, event)
        case ResetRecovered():
            return apply_reset_recovered(state, event)
        case PeerQuarantined() | QuarantineRecovered():
            return {"quarantined": {**state.quarantined, event.owner: event}}
        case PeerPardoned():
            return apply_pardoned(state, event)
        case CheckerRefuted():
            return {"refuted_checkers": _newest({**state.refuted_checkers, event.owner: event})}
        case SampleCostMeasured():
            return {"flops": event.flops}
        case CopiesKept():
            return {"credit": credit_copies(state, event)}
        case LentCheckCounted():
            return {"credit": credit_lent_check(state, event)}
        case HoldoutBurnt():
            return {"burnt": {**state.burnt, event.holdout: event.checkpoint}}
        case LineageRolledBack():
            return apply_rolled_back(state, event)
        case LineageSuspected() | LineageKept():
            return apply_suspicion(state, event)
        case RouterTrained():
            return {"router": _router(state, event)}
        case MixtureStitched(current=True):
            return {"mixture": event, "stitched": event, "held_back": 0}
        case MixtureStitched():
            return {"stitched": event, "held_back": state.held_back + 1}
        case RunFinished():
            return {"finished": True}
        case CoordinatorStarted():
            return {"dropped_snapshot": None}
        case CoordinatorStopped():
            return {}
        case SnapshotDropped():
            return {"dropped_snapshot": event}
        case _:
            assert_never(event)


def _newest(refuted: dict[str, CheckerRefuted]) -> dict[str, CheckerRefuted]:
    """At most _REMEMBERED_LIARS: a new identity costs nothing, and must not cost memory."""
    while len(refuted) > _REMEMBERED_LIARS:
        del refuted[next(iter(refuted))]
    return refuted


def _router(state: RunState, event: RouterTrained) -> RouterTrained:
    """Ledgers of earlier versions repeat the router's event with each mixture; it is as old as its training."""
    if state.router and state.router.router == event.router:
        return event.model_copy(update={"time": state.router.time})
    return event


def _created(state: RunState, event: RunCreated) -> Changes:
    if state.events:
        raise LedgerOutOfOrder("the ledger creates its run twice; restore it from a backup")
    shards: PersistentMap[int, ShardLedger] = PersistentMap()
    for index in range(event.shards):
        shards = shards.set(index, ShardLedger())
    return {
        "run": event.run, "name": event.name, "owner": event.owner, "coordinator": event.coordinator,
        "epochs": event.epochs, "shards": shards, "budgets": (event.epochs,),
        "flops": event.flops,
    }  # fmt: skip


def _published(state: RunState, event: ManifestPublished) -> Changes:
    """A raised budget reopens a finished run. Refusals were made under the older rules, so they no longer answer an offer."""
    epochs = event.epochs or state.epochs
    budgets = state.budgets if epochs == state.epochs else (epochs, *state.budgets)[:BUDGETS]
    resumed = any(order.order == "resume" for order in event.orders)
    return {
        "resumed": event.time if resumed else state.resumed,
        "budgets": budgets, "manifest_version": event.version, "manifest": event.digest, "epochs": epochs,
        "coordinator": event.coordinator or state.coordinator, "finished": state.finished and epochs <= state.epochs,
        "shards": _without_refusals(state.shards) if event.version > state.manifest_version else state.shards,
    }  # fmt: skip


def _without_refusals(shards: PersistentMap[int, ShardLedger]) -> PersistentMap[int, ShardLedger]:
    for index, shard in tuple(shards.items()):
        kept = {key: verdict for key, verdict in shard.judged.items() if not isinstance(verdict, ResultRefused)}
        waiting = {key: replace(candidate, doubt=None) for key, candidate in shard.candidates.items()}
        if len(kept) < len(shard.judged) or any(candidate.doubt for candidate in shard.candidates.values()):
            shards = shards.set(index, shard.updated(judged=kept, candidates=waiting, refuted=0, refuted_at=0.0))
    return shards


def _seen(state: RunState, event: ResultSeen) -> Changes:
    record = event.record
    shard = shard_of(state, record.shard)
    if record.epoch != shard.epoch + 1 or record.parent != shard.accepted:
        raise LedgerOutOfOrder(f"a result for epoch {record.epoch} of shard {record.shard} cannot follow epoch {shard.epoch}")
    others = {
        key: other
        for key, other in shard.candidates.items()
        if (other.record.owner, other.record.lane) != (record.owner, record.lane)
    }
    candidates = {**others, (record.owner, record.digest): WaitingResult(record, event.time)}
    return {"shards": state.shards.set(record.shard, shard.updated(candidates=candidates))}


def _settled(shard: ShardLedger, verdict: ResultRefused | ResultSuperseded) -> ShardLedger:
    """The shard without that candidate, with its verdict; the oldest verdicts are dropped, so that a flood costs no memory."""
    waiting = {key: other for key, other in shard.candidates.items() if key != (verdict.owner, verdict.checkpoint)}
    if verdict.epoch != shard.epoch + 1:
        return shard.updated(candidates=waiting)
    judged = {**shard.judged, (verdict.owner, verdict.checkpoint): verdict}
    if len(judged) > _REMEMBERED_VERDICTS:
        del judged[next(iter(judged))]
    return shard.updated(candidates=waiting, judged=judged)


def _doubted(state: RunState, event: ResultDoubted) -> Changes:
    shard = shard_of(state, event.shard)
    candidate = shard.candidates.get((event.owner, event.checkpoint))
    if candidate is None:
        raise LedgerOutOfOrder(f"a result of shard {event.shard} is doubted that does not wait; restore it from a backup")
    candidates = {**shard.candidates, (event.owner, event.checkpoint): replace(candidate, doubt=event)}
    return {"shards": state.shards.set(event.shard, shard.updated(candidates=candidates)), "spent": add_costs(state, event.costs)}


def _refused(state: RunState, event: ResultRefused) -> Changes:
    shard = shard_of(state, event.shard)
    candidate = shard.candidates.get((event.owner, event.checkpoint))
    if candidate and candidate.doubt:
        shard = shard.updated(refuted=shard.refuted + 1, refuted_at=event.time)
    if event.again_at is not None and candidate:
        again = replace(candidate, attempts=candidate.attempts + 1, not_before=event.again_at)
        shard = shard.updated(candidates={**shard.candidates, (event.owner, event.checkpoint): again})
    else:
        shard = _settled(shard, event)
    changes: Changes = {
        "shards": state.shards.set(event.shard, shard), "spent": add_costs(state, event.costs),
        "refusals": (*state.refusals[-REMEMBERED_REFUSALS + 1 :], event),
    }  # fmt: skip
    if event.verdict == "inconclusive":
        return changes
    changes["rejected"] = state.rejected + 1
    if event.owner not in state.peers and event.check in _UNREMEMBERED_CHECKS:
        return changes
    peer = state.peer(event.owner)
    forfeited = max(peer.streak, peer.forfeited) if event.check in LOSS_CHECKS else peer.forfeited
    streak = peer.streak if event.check in _BLAMELESS_CHECKS else 0
    peer = peer.updated(rejected=peer.rejected + 1, streak=streak, forfeited=forfeited)
    return {**changes, "peers": state.peers.set(event.owner, peer)}


def _forgiven(state: RunState, shard: ShardLedger) -> Changes:
    """A replay has shown that honest training fails the loss checks on this parent: those refusals count against nobody."""
    peers, rejected = state.peers, state.rejected
    for verdict in shard.failed_losses:
        rejected -= 1
        if verdict.owner in peers:
            peer = peers[verdict.owner]
            streak = max(peer.streak, peer.forfeited)
            peers = peers.set(verdict.owner, peer.updated(rejected=max(0, peer.rejected - 1), streak=streak, forfeited=0))
    return {"peers": peers, "rejected": max(0, rejected)}


def _paced(before: Pace | None, now: float, resumed: float) -> Pace:
    """The pace after one more accepted epoch: half of it is what this epoch took, unless the run was paused meanwhile.

    `resumed`: when the run was resumed last, in Unix seconds.
    """
    if before is None or before.last_accepted < resumed:
        return Pace(now, before and before.interval)
    latest = max(0.0, now - before.last_accepted)
    return Pace(now, latest if before.interval is None else (before.interval + latest) / 2)


def _accepted(state: RunState, event: CheckpointAccepted) -> Changes:
    given = event.acceptance
    shard = shard_of(state, given.shard)
    if given.epoch != shard.epoch + 1 or given.parent != shard.accepted or given.term != shard.term:
        raise LedgerOutOfOrder(f"epoch {given.epoch} of shard {given.shard} cannot be accepted on epoch {shard.epoch}")
    if event.note:
        state = replace(state, **_forgiven(state, shard))
    candidates = {key: other for key, other in shard.candidates.items() if key != (given.author, given.checkpoint)}
    link = _link(state, shard, event)
    credit = credit_accepted(state, given, link.samples, event.time)
    shard = shard.updated(
        epoch=given.epoch, acceptance=given, accepted_at=event.time, lineage=(*shard.lineage[-HISTORY + 1 :], link),
        candidates=candidates, judged={}, refuted=0, refuted_at=0.0,
    )  # fmt: skip
    return {
        "shards": state.shards.set(given.shard, shard), "peers": _with_accepted(state, event),
        "spent": add_costs(state, event.costs), "accepted": state.accepted + 1, "rejected": state.rejected,
        "credit": credit,
    }  # fmt: skip


def _lane_accepted(state: RunState, event: LaneAccepted) -> Changes:
    given = event.acceptance
    shard = shard_of(state, given.shard)
    check_lane_follows(shard, given)
    if event.note:
        state = replace(state, **_forgiven(state, shard))
    link = replace(_link(state, shard, event), samples=event.samples)
    candidates = {key: other for key, other in shard.candidates.items() if key != (given.author, given.checkpoint)}
    shard = shard.updated(gathered={**shard.gathered, link.lane: link}, candidates=candidates)
    return {
        "shards": state.shards.set(given.shard, shard), "peers": _with_accepted(state, event),
        "spent": add_costs(state, event.costs), "accepted": state.accepted + 1, "rejected": state.rejected,
        "credit": credit_accepted(state, given, event.samples, event.time),
    }  # fmt: skip


def _with_accepted(state: RunState, event: CheckpointAccepted | LaneAccepted) -> PersistentMap[str, PeerLedger]:
    """The peers, with one more accepted result of its author."""
    given = event.acceptance
    peer = state.peer(given.author)
    pace = _paced(state.pace(given.author, given.shard), event.time, state.resumed)
    others = [(index, known) for index, known in peer.paces.items() if index != given.shard][1 - PACES :]
    peer = peer.updated(
        accepted=peer.accepted + 1, streak=peer.streak if peer.build == event.build else 0, build=event.build,
        shard=given.shard, checkpoint=given.checkpoint, last_accepted=event.time, interval=pace.interval,
        paces=dict([*others, (given.shard, pace)]),
    )  # fmt: skip
    return state.peers.set(given.author, peer)


def _link(state: RunState, shard: ShardLedger, event: CheckpointAccepted | LaneAccepted) -> AcceptedEpoch:
    given = event.acceptance
    waiting = shard.candidates.get((given.author, given.checkpoint))
    made = (waiting.record.trace, waiting.record.made) if waiting else (None, None)
    samples = trained_samples(shard, given)
    return AcceptedEpoch(given, event.time, state.budgets, *made, proved=bool(event.note), samples=samples)
