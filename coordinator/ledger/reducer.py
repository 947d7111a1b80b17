"""The state of a run as the sum of its events: `apply(state, event) -> state`, pure, total and cheap.

Nothing is changed in place, and nothing that grows with the history is copied: each event names the fields of the state that it
changes, and the state is copied once. A replay of 10^5 events takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import assert_never

from lutetia.coordinator.ledger.events import (
    AcceptanceRecovered,
    AuditDone,
    AuditDue,
    AuditReported,
    BaselineMeasured,
    CheckCost,
    CheckpointAccepted,
    CoordinatorStarted,
    CoordinatorStopped,
    Event,
    LineageRolledBack,
    ManifestPublished,
    MixtureStitched,
    Outcome,
    PeerPardoned,
    PeerQuarantined,
    QuarantineRecovered,
    ResetRecovered,
    ResultRefused,
    ResultSeen,
    ResultSuperseded,
    RouterTrained,
    RunCreated,
    RunFinished,
)
from lutetia.coordinator.ledger.persistent_map import PersistentMap
from lutetia.coordinator.ledger.run_state import (
    BUDGETS,
    HISTORY,
    AcceptedEpoch,
    Changes,
    CheckCosts,
    PeerLedger,
    PendingAudit,
    RunState,
    ShardLedger,
    WaitingResult,
)
from lutetia.protocol.schema.status import AuditState
from lutetia.protocol.schema.verdicts import CheckName
from lutetia.system.errors import IntegrityError

REMEMBERED_REFUSALS = 32
"""Refusals that the status document shows."""
_REMEMBERED_VERDICTS = 256
_BLAMELESS_CHECKS: frozenset[CheckName] = frozenset({"signature", "lineage", "transfer"})
"""No evidence of bad work: anybody can send a forged record in a peer's name, and a partition makes honest lineages stale."""
_FREE_CHECKS = _BLAMELESS_CHECKS | {"quarantine", "size"}
"""A new identity can collect these refusals for nothing, so a peer of which nothing else is known is not remembered for them."""


class LedgerOutOfOrder(IntegrityError):
    """An event that cannot follow those before it, for instance a second acceptance of one epoch."""


def apply(state: RunState, event: Event) -> RunState:
    """The state after `event`. Raises LedgerOutOfOrder when it cannot follow."""
    if not state.events and not isinstance(event, RunCreated):
        raise LedgerOutOfOrder(f"a ledger must begin with run-created, not with {event.kind}; restore it from a backup")
    return replace(state, events=state.events + 1, **_changes(state, event))


def _changes(state: RunState, event: Event) -> Changes:
    match event:
        case CheckpointAccepted():
            return _accepted(state, event)
        case ResultSeen():
            return _seen(state, event)
        case ResultRefused():
            return _refused(state, event)
        case ResultSuperseded():
            return {"shards": state.shards.set(event.shard, _settled(_shard(state, event.shard), event))}
        case AuditDue():
            return _audit_due(state, event)
        case AuditDone():
            return _audit_done(state, event)
        case AuditReported():
            return _audit_reported(state, event)
        case RunCreated():
            return _created(state, event)
        case ManifestPublished():
            return _published(state, event)
        case BaselineMeasured():
            return {"shards": state.shards.set(event.shard, _shard(state, event.shard).updated(baseline=event.loss))}
        case AcceptanceRecovered():
            return _recovered(state, event)
        case ResetRecovered():
            return _reset(state, event)
        case PeerQuarantined() | QuarantineRecovered():
            return {"quarantined": {**state.quarantined, event.owner: event}}
        case PeerPardoned():
            return _pardoned(state, event)
        case LineageRolledBack():
            return _rolled_back(state, event)
        case RouterTrained():
            return {"router": event}
        case MixtureStitched():
            return {"mixture": event}
        case RunFinished():
            return {"finished": True}
        case CoordinatorStarted() | CoordinatorStopped():
            return {}
        case _:
            assert_never(event)


def _shard(state: RunState, index: int) -> ShardLedger:
    try:
        return state.shards[index]
    except KeyError:
        raise LedgerOutOfOrder(f"the ledger names shard {index}, which the run does not have; restore it from a backup") from None


def _created(state: RunState, event: RunCreated) -> Changes:
    if state.events:
        raise LedgerOutOfOrder("the ledger creates its run twice; restore it from a backup")
    shards: PersistentMap[int, ShardLedger] = PersistentMap()
    for index in range(event.shards):
        shards = shards.set(index, ShardLedger())
    return {
        "run": event.run, "name": event.name, "owner": event.owner, "coordinator": event.coordinator,
        "epochs": event.epochs, "shards": shards, "budgets": (event.epochs,),
    }  # fmt: skip


def _published(state: RunState, event: ManifestPublished) -> Changes:
    """A raised budget reopens a finished run."""
    epochs = event.epochs or state.epochs
    budgets = state.budgets if epochs == state.epochs else (epochs, *state.budgets)[:BUDGETS]
    return {
        "budgets": budgets, "manifest_version": event.version, "manifest": event.digest, "epochs": epochs,
        "coordinator": event.coordinator or state.coordinator, "finished": state.finished and epochs <= state.epochs,
    }  # fmt: skip


def _seen(state: RunState, event: ResultSeen) -> Changes:
    record = event.record
    shard = _shard(state, record.shard)
    if record.epoch != shard.epoch + 1 or record.parent != shard.accepted:
        raise LedgerOutOfOrder(f"a result for epoch {record.epoch} of shard {record.shard} cannot follow epoch {shard.epoch}")
    candidates = {**shard.candidates, record.owner: WaitingResult(record, event.time)}
    return {"shards": state.shards.set(record.shard, shard.updated(candidates=candidates))}


def _settled(shard: ShardLedger, verdict: ResultRefused | ResultSuperseded) -> ShardLedger:
    """The shard without that candidate, with its verdict; the oldest verdicts are dropped, so that a flood costs no memory."""
    candidate = shard.candidates.get(verdict.owner)
    waiting = shard.candidates
    if candidate and candidate.record.digest == verdict.checkpoint:
        waiting = {owner: other for owner, other in waiting.items() if owner != verdict.owner}
    if verdict.epoch != shard.epoch + 1:
        return shard.updated(candidates=waiting)
    judged = {**shard.judged, (verdict.owner, verdict.checkpoint): verdict}
    if len(judged) > _REMEMBERED_VERDICTS:
        del judged[next(iter(judged))]
    return shard.updated(candidates=waiting, judged=judged)


def _refused(state: RunState, event: ResultRefused) -> Changes:
    shard = _shard(state, event.shard)
    candidate = shard.candidates.get(event.owner)
    if event.again_at is not None and candidate and candidate.record.digest == event.checkpoint:
        again = replace(candidate, attempts=candidate.attempts + 1, not_before=event.again_at)
        shard = shard.updated(candidates={**shard.candidates, event.owner: again})
    else:
        shard = _settled(shard, event)
    changes: Changes = {
        "shards": state.shards.set(event.shard, shard), "spent": _spent(state, event.costs),
        "refusals": (*state.refusals[-REMEMBERED_REFUSALS + 1 :], event),
    }  # fmt: skip
    if event.verdict == "inconclusive":
        return changes
    changes["rejected"] = state.rejected + 1
    if event.owner not in state.peers and event.check in _FREE_CHECKS:
        return changes
    peer = state.peer(event.owner)
    peer = peer.updated(rejected=peer.rejected + 1, streak=peer.streak if event.check in _BLAMELESS_CHECKS else 0)
    return {**changes, "peers": state.peers.set(event.owner, peer)}


def _accepted(state: RunState, event: CheckpointAccepted) -> Changes:
    given = event.acceptance
    shard = _shard(state, given.shard)
    if given.epoch != shard.epoch + 1 or given.parent != shard.accepted or given.term != shard.term:
        raise LedgerOutOfOrder(f"epoch {given.epoch} of shard {given.shard} cannot be accepted on epoch {shard.epoch}")
    candidates = {owner: other for owner, other in shard.candidates.items() if owner != given.author}
    link = _link(state, shard, event)
    shard = shard.updated(
        epoch=given.epoch, acceptance=given, accepted_at=event.time, lineage=(*shard.lineage[-HISTORY + 1 :], link),
        candidates=candidates, judged={},
    )  # fmt: skip
    peer = state.peer(given.author)
    interval = peer.interval if peer.shard == given.shard else None
    if peer.shard == given.shard and peer.last_accepted is not None:
        latest = max(0.0, event.time - peer.last_accepted)
        interval = latest if interval is None else (interval + latest) / 2
    peer = peer.updated(
        accepted=peer.accepted + 1, streak=peer.streak if peer.build == event.build else 0, build=event.build,
        shard=given.shard, checkpoint=given.checkpoint, last_accepted=event.time, interval=interval,
    )  # fmt: skip
    return {
        "shards": state.shards.set(given.shard, shard), "peers": state.peers.set(given.author, peer),
        "spent": _spent(state, event.costs), "accepted": state.accepted + 1,
    }  # fmt: skip


def _spent(state: RunState, costs: Iterable[CheckCost]) -> Mapping[tuple[CheckName, Outcome], CheckCosts]:
    spent = dict(state.spent)
    for cost in costs:
        key = cost.check, cost.outcome
        spent[key] = spent.get(key, CheckCosts()).plus(cost.seconds, cost.size)
    return spent


def _link(state: RunState, shard: ShardLedger, event: CheckpointAccepted) -> AcceptedEpoch:
    given = event.acceptance
    waiting = shard.candidates.get(given.author)
    record = waiting.record if waiting and waiting.record.digest == given.checkpoint else None
    made = (record.trace, record.made) if record else (None, None)
    return AcceptedEpoch(given, event.time, state.budgets, *made)


def _with_audit(shard: ShardLedger, checkpoint: str, audit: AuditState) -> ShardLedger:
    """The shard with a new audit state of one accepted epoch."""
    lineage = tuple(replace(link, audit=audit) if link.acceptance.checkpoint == checkpoint else link for link in shard.lineage)
    return shard.updated(lineage=lineage)


def _audit_due(state: RunState, event: AuditDue) -> Changes:
    shard = _shard(state, event.shard)
    link = shard.link(event.checkpoint)
    if link is None:
        raise LedgerOutOfOrder(f"an audit of {event.checkpoint[:12]} is due, which shard {event.shard} has not accepted")
    pending = PendingAudit(event.shard, event.epoch, event.owner, event.checkpoint, link.at, event.whole)
    shards = state.shards.set(event.shard, _with_audit(shard, event.checkpoint, "due"))
    return {"shards": shards, "audits": {**state.audits, event.checkpoint: pending}}


def _audit_done(state: RunState, event: AuditDone) -> Changes:
    """Only audited work earns trust: a result that was not replayed, or without a clear outcome, leaves the streak as it was.

    Doubt resets the streak: everything of such a peer is audited again, until enough of it is beyond doubt.
    """
    changes: Changes = {}
    if event.outcome != "not carried out":
        changes["spent"] = _spent(state, [CheckCost(check="audit", outcome=event.outcome, seconds=event.seconds)])
    pending = state.audits.get(event.checkpoint)
    if pending and event.outcome == "inconclusive" and event.again_at is not None:
        whole = pending.whole or event.closer
        again = pending.updated(attempts=pending.attempts + 1, not_before=event.again_at, whole=whole)
        return {**changes, "audits": {**state.audits, event.checkpoint: again}}
    shard = _with_audit(_shard(state, event.shard), event.checkpoint, event.outcome)
    peers = _with_auditor_trust(state, pending, event)
    peer = peers.get(event.owner, PeerLedger())
    if event.outcome == "valid":
        peer = peer.updated(streak=peer.streak + 1, audited=peer.audited + 1)
    elif event.outcome == "invalid":
        peer = peer.updated(streak=0, audited=peer.audited + 1, convicted=peer.convicted + 1)
    elif event.doubt:
        peer = peer.updated(streak=0)
    return {
        **changes, "shards": state.shards.set(event.shard, shard), "peers": peers.set(event.owner, peer),
        "audits": {checkpoint: audit for checkpoint, audit in state.audits.items() if checkpoint != event.checkpoint},
    }  # fmt: skip


def _audit_reported(state: RunState, event: AuditReported) -> Changes:
    pending = state.audits.get(event.checkpoint)
    if pending is None:
        return {}
    return {"audits": {**state.audits, event.checkpoint: pending.updated(reported=(event.by, event.outcome))}}


def _with_auditor_trust(state: RunState, pending: PendingAudit | None, event: AuditDone) -> PersistentMap[str, PeerLedger]:
    """Trust in an auditor grows with each report that the coordinator's own replay confirms; a contradicted one resets it."""
    if pending is None or pending.reported is None or event.by is not None or event.outcome not in ("valid", "invalid"):
        return state.peers
    by, reported = pending.reported
    auditor = state.peer(by)
    trust = auditor.trust + 1 if reported == event.outcome else auditor.trust if reported == "inconclusive" else 0
    return state.peers.set(by, auditor.updated(trust=trust))


def _recovered(state: RunState, event: AcceptanceRecovered) -> Changes:
    """The shard jumps to the recovered epoch. The epochs between are unknown, so nothing older can be audited any more."""
    given = event.acceptance
    shard = _shard(state, given.shard)
    if (given.term, given.epoch) <= (shard.term, shard.epoch):
        raise LedgerOutOfOrder(f"epoch {given.epoch} of shard {given.shard} cannot be recovered on epoch {shard.epoch}")
    accepted = state.accepted + max(1, given.epoch - shard.epoch)
    changes: Changes = {"mixture": None, "finished": False} if given.term > shard.term else {}
    shard = shard.updated(
        epoch=given.epoch, term=given.term, acceptance=given, accepted_at=given.issued,
        lineage=(AcceptedEpoch(given, given.issued, state.budgets),), candidates={}, judged={},
    )  # fmt: skip
    audits = {checkpoint: audit for checkpoint, audit in state.audits.items() if audit.shard != given.shard}
    return {**changes, "shards": state.shards.set(given.shard, shard), "accepted": accepted, "audits": audits}


def _reset(state: RunState, event: ResetRecovered) -> Changes:
    """The shard as a rollback to the beginning left it; the measured loss of the initial model is kept."""
    shard = _shard(state, event.shard)
    if event.term <= shard.term:
        raise LedgerOutOfOrder(f"shard {event.shard} in term {shard.term} cannot be reset in term {event.term}")
    audits = {checkpoint: audit for checkpoint, audit in state.audits.items() if audit.shard != event.shard}
    shards = state.shards.set(event.shard, ShardLedger(baseline=shard.baseline, term=event.term))
    return {"shards": shards, "audits": audits, "mixture": None, "finished": False}


def _rolled_back(state: RunState, event: LineageRolledBack) -> Changes:
    """The shard as it was after `epoch`, in a new term, without candidates: their parent is gone."""
    shard = _shard(state, event.shard)
    lineage = tuple(link for link in shard.lineage if link.acceptance.epoch <= event.epoch)
    known = event.epoch == 0 or (lineage and lineage[-1].acceptance.epoch == event.epoch)
    if event.term != shard.term + 1 or event.epoch >= shard.epoch or not known:
        raise LedgerOutOfOrder(f"shard {event.shard} at epoch {shard.epoch} cannot be rolled back to epoch {event.epoch}")
    gone = {link.acceptance.checkpoint for link in shard.lineage[len(lineage) :]}
    if lineage:
        head = lineage[-1]
        head = replace(head, acceptance=head.acceptance.model_copy(update={"term": event.term}))
        lineage = (*lineage[:-1], head)
    shard = shard.updated(
        epoch=event.epoch, term=event.term, lineage=lineage, candidates={}, judged={},
        acceptance=lineage[-1].acceptance if lineage else None, accepted_at=lineage[-1].at if lineage else None,
    )  # fmt: skip
    audits = {checkpoint: audit for checkpoint, audit in state.audits.items() if checkpoint not in gone}
    return {"shards": state.shards.set(event.shard, shard), "audits": audits, "mixture": None, "finished": False}


def _pardoned(state: RunState, event: PeerPardoned) -> Changes:
    quarantined = {owner: why for owner, why in state.quarantined.items() if owner != event.owner}
    peers = state.peers.set(event.owner, state.peer(event.owner).updated(streak=0, trust=0))
    return {"quarantined": quarantined, "peers": peers, "pardoned": {**state.pardoned, event.owner: event.time}}
