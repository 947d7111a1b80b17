"""The part of the reducer for audits and what follows from them (rollbacks, pardons, recovered facts), and for lanes. Pure.

Each function returns the fields of the state that its event changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from lutetia.coordinator.credit.fold import credit_accepted, credit_audit, take_invalid, trained_samples, void_epochs
from lutetia.coordinator.ledger.events import (
    AcceptanceRecovered,
    AuditDone,
    AuditDue,
    AuditReported,
    CheckCost,
    LaneDropped,
    LanesMerged,
    LineageKept,
    LineageRolledBack,
    LineageSuspected,
    Outcome,
    PeerPardoned,
    ResetRecovered,
)
from lutetia.coordinator.ledger.persistent_map import PersistentMap
from lutetia.coordinator.ledger.run_state import (
    HISTORY,
    AcceptedEpoch,
    Changes,
    CheckCosts,
    PeerLedger,
    PendingAudit,
    RunState,
    ShardLedger,
)
from lutetia.protocol.schema.records import AcceptanceRecord
from lutetia.protocol.schema.status import AuditState
from lutetia.protocol.schema.verdicts import CheckName
from lutetia.system.errors import IntegrityError


class LedgerOutOfOrder(IntegrityError):
    """An event that cannot follow those before it, for instance a second acceptance of one epoch."""


_NO_MIXTURE: Changes = {"mixture": None, "stitched": None, "held_back": 0}
"""After a rollback: the mixtures so far hold a void epoch."""


def shard_of(state: RunState, index: int) -> ShardLedger:
    """The shard of that index. Raises LedgerOutOfOrder when the run does not have it."""
    try:
        return state.shards[index]
    except KeyError:
        raise LedgerOutOfOrder(f"the ledger names shard {index}, which the run does not have; restore it from a backup") from None


def add_costs(state: RunState, costs: Iterable[CheckCost]) -> Mapping[tuple[CheckName, Outcome], CheckCosts]:
    """What the checks have cost so far, with `costs` added."""
    spent = dict(state.spent)
    for cost in costs:
        key = cost.check, cost.outcome
        spent[key] = spent.get(key, CheckCosts()).plus(cost.seconds, cost.size)
    return spent


def _with_audit(shard: ShardLedger, checkpoint: str, audit: AuditState, whole: bool = False) -> ShardLedger:
    """The shard with a new audit state of one accepted epoch. An invalid one is nobody's credit."""

    def marked(link: AcceptedEpoch) -> AcceptedEpoch:
        if link.acceptance.checkpoint == checkpoint:
            return replace(link, audit=audit, whole=whole, samples=0 if audit == "invalid" else link.samples)
        if any(source.acceptance.checkpoint == checkpoint for source in link.sources):
            return replace(link, sources=tuple(map(marked, link.sources)))
        return link

    gathered = {lane: marked(link) for lane, link in shard.gathered.items()}
    return shard.updated(lineage=tuple(map(marked, shard.lineage)), gathered=gathered)


def apply_audit_due(state: RunState, event: AuditDue) -> Changes:
    shard = shard_of(state, event.shard)
    link = shard.link(event.checkpoint)
    if link is None:
        raise LedgerOutOfOrder(f"an audit of {event.checkpoint[:12]} is due, which shard {event.shard} has not accepted")
    pending = PendingAudit(event.shard, event.epoch, event.owner, event.checkpoint, link.at, event.whole, lane=link.lane)
    shards = state.shards.set(event.shard, _with_audit(shard, event.checkpoint, "due"))
    return {"shards": shards, "audits": {**state.audits, event.checkpoint: pending}}


def apply_audit_done(state: RunState, event: AuditDone) -> Changes:
    """Only audited work earns trust: a result that was not replayed, or without a clear outcome, leaves the streak as it was.

    Doubt resets the streak: everything of such a peer is audited again, until enough of it is beyond doubt.
    """
    changes: Changes = {}
    if event.outcome != "not carried out":
        changes["spent"] = add_costs(state, [CheckCost(check="audit", outcome=event.outcome, seconds=event.seconds)])
    pending = state.audits.get(event.checkpoint)
    if pending and event.outcome == "inconclusive" and event.again_at is not None:
        whole = pending.whole or event.closer
        again = pending.updated(attempts=pending.attempts + 1, not_before=event.again_at, whole=whole)
        return {**changes, "audits": {**state.audits, event.checkpoint: again}}
    shard = _with_audit(shard_of(state, event.shard), event.checkpoint, event.outcome, bool(pending and pending.whole))
    credit = credit_audit(state, pending, event)
    if event.outcome == "invalid":
        credit = take_invalid(replace(state, credit=credit), state.shards[event.shard].link(event.checkpoint))
    peers = _with_auditor_trust(state, pending, event)
    peer = peers.get(event.owner, PeerLedger())
    if event.outcome == "valid":
        whole = bool(pending and pending.whole)
        peer = peer.updated(streak=peer.streak + 1, audited=peer.audited + 1, proved=peer.proved + whole)
    elif event.outcome == "invalid":
        peer = peer.updated(streak=0, proved=0, audited=peer.audited + 1, convicted=peer.convicted + 1)
    elif event.doubt:
        peer = peer.updated(streak=0, proved=0)
    return {
        **changes, "shards": state.shards.set(event.shard, shard), "peers": peers.set(event.owner, peer),
        "audits": {checkpoint: audit for checkpoint, audit in state.audits.items() if checkpoint != event.checkpoint},
        "credit": credit,
    }  # fmt: skip


def apply_audit_reported(state: RunState, event: AuditReported) -> Changes:
    pending = state.audits.get(event.checkpoint)
    if pending is None:
        return {}
    reported = pending.updated(reported=(event.by, event.outcome), reported_samples=event.samples)
    return {"audits": {**state.audits, event.checkpoint: reported}}


def _with_auditor_trust(state: RunState, pending: PendingAudit | None, event: AuditDone) -> PersistentMap[str, PeerLedger]:
    """Trust in an auditor grows with each report that the coordinator's own replay confirms; a contradicted one resets it."""
    if pending is None or pending.reported is None or event.by is not None or event.outcome not in ("valid", "invalid"):
        return state.peers
    by, reported = pending.reported
    auditor = state.peer(by)
    trust = auditor.trust + 1 if reported == event.outcome else auditor.trust if reported == "inconclusive" else 0
    return state.peers.set(by, auditor.updated(trust=trust))


def apply_acceptance_recovered(state: RunState, event: AcceptanceRecovered) -> Changes:
    """The shard jumps to the recovered epoch. The epochs between are unknown, so nothing older can be audited any more."""
    given = event.acceptance
    shard = shard_of(state, given.shard)
    if (given.term, given.epoch) <= (shard.term, shard.epoch):
        raise LedgerOutOfOrder(f"epoch {given.epoch} of shard {given.shard} cannot be recovered on epoch {shard.epoch}")
    accepted = state.accepted + max(1, given.epoch - shard.epoch)
    changes: Changes = {**_NO_MIXTURE, "finished": False} if given.term > shard.term else {}
    samples = trained_samples(shard, given)
    changes["credit"] = credit_accepted(state, given, samples, given.issued)
    shard = shard.updated(
        epoch=given.epoch, term=given.term, acceptance=given, accepted_at=given.issued,
        suspects=(), lineage=(AcceptedEpoch(given, given.issued, state.budgets, samples=samples),),
        candidates={}, judged={}, gathered={}, refuted=0, refuted_at=0.0,
    )  # fmt: skip
    audits = {checkpoint: audit for checkpoint, audit in state.audits.items() if audit.shard != given.shard}
    return {**changes, "shards": state.shards.set(given.shard, shard), "accepted": accepted, "audits": audits}


def apply_reset_recovered(state: RunState, event: ResetRecovered) -> Changes:
    """The shard as a rollback to the beginning left it; the measured loss of the initial model is kept."""
    shard = shard_of(state, event.shard)
    if event.term <= shard.term:
        raise LedgerOutOfOrder(f"shard {event.shard} in term {shard.term} cannot be reset in term {event.term}")
    audits = {checkpoint: audit for checkpoint, audit in state.audits.items() if audit.shard != event.shard}
    shards = state.shards.set(event.shard, ShardLedger(baseline=shard.baseline, term=event.term))
    credit = void_epochs(state, event.shard, shard.trained, whole=True)
    return {"shards": shards, "audits": audits, **_NO_MIXTURE, "finished": False, "credit": credit}


def apply_rolled_back(state: RunState, event: LineageRolledBack) -> Changes:
    """The shard as it was after `epoch`, in a new term, without candidates: their parent is gone."""
    shard = shard_of(state, event.shard)
    lineage = tuple(link for link in shard.lineage if link.acceptance.epoch <= event.epoch)
    known = event.epoch == 0 or (lineage and lineage[-1].acceptance.epoch == event.epoch)
    if event.term != shard.term + 1 or event.epoch >= shard.epoch or not known:
        raise LedgerOutOfOrder(f"shard {event.shard} at epoch {shard.epoch} cannot be rolled back to epoch {event.epoch}")
    dropped = shard.lineage[len(lineage) :]
    kept = {link.lane: link for link in dropped[0].sources if link.acceptance.checkpoint in event.kept}
    makers = (*(maker for link in dropped for maker in link.makers), *shard.gathered.values())
    void = [maker for maker in makers if maker.acceptance.checkpoint not in event.kept]
    gone = {link.acceptance.checkpoint for link in (*dropped, *void)}
    credit = void_epochs(state, event.shard, void, whole=event.epoch == 0 and not event.kept)
    if lineage:
        head = lineage[-1]
        head = replace(head, acceptance=head.acceptance.model_copy(update={"term": event.term}))
        lineage = (*lineage[:-1], head)
    shard = shard.updated(
        epoch=event.epoch, term=event.term, lineage=lineage, candidates={}, judged={}, gathered=kept, refuted=0,
        refuted_at=0.0,
        suspects=tuple(checkpoint for checkpoint in shard.suspects if checkpoint not in gone),
        acceptance=lineage[-1].acceptance if lineage else None, accepted_at=lineage[-1].at if lineage else None,
    )  # fmt: skip
    audits = {checkpoint: audit for checkpoint, audit in state.audits.items() if checkpoint not in gone}
    return {
        "shards": state.shards.set(event.shard, shard), "audits": audits, **_NO_MIXTURE, "finished": False, "credit": credit,
    }  # fmt: skip


def apply_suspicion(state: RunState, event: LineageSuspected | LineageKept) -> Changes:
    """An invalid epoch on which the shard stands: not decided yet, or decided for the lineage."""
    shard = shard_of(state, event.shard)
    others = tuple(checkpoint for checkpoint in shard.suspects if checkpoint != event.checkpoint)
    suspects = (*others, event.checkpoint) if isinstance(event, LineageSuspected) else others
    return {"shards": state.shards.set(event.shard, shard.updated(suspects=suspects))}


def apply_pardoned(state: RunState, event: PeerPardoned) -> Changes:
    quarantined = {owner: why for owner, why in state.quarantined.items() if owner != event.owner}
    peers = state.peers.set(event.owner, state.peer(event.owner).updated(streak=0, trust=0))
    refuted = {owner: why for owner, why in state.refuted_checkers.items() if owner != event.owner}
    pardoned = {**state.pardoned, event.owner: event.time}
    return {"quarantined": quarantined, "peers": peers, "pardoned": pardoned, "refuted_checkers": refuted}


def check_lane_follows(shard: ShardLedger, given: AcceptanceRecord) -> None:
    """Raises LedgerOutOfOrder unless this is a first result of one lane for the shard's next epoch."""
    follows = given.epoch == shard.epoch + 1 and given.parent == shard.accepted and given.term == shard.term
    if not follows or len(given.lanes) != 1 or given.lanes[0] in shard.gathered:
        text = f"a lane's result for epoch {given.epoch} of shard {given.shard} cannot be accepted on epoch {shard.epoch}"
        raise LedgerOutOfOrder(text)


def apply_lane_dropped(state: RunState, event: LaneDropped) -> Changes:
    """Its audit is not needed any more."""
    shard = shard_of(state, event.shard)
    gathered = {lane: link for lane, link in shard.gathered.items() if link.acceptance.checkpoint != event.checkpoint}
    audits = {checkpoint: audit for checkpoint, audit in state.audits.items() if checkpoint != event.checkpoint}
    return {"shards": state.shards.set(event.shard, shard.updated(gathered=gathered)), "audits": audits}


def apply_lanes_merged(state: RunState, event: LanesMerged) -> Changes:
    """The merged results are the sources of the new epoch. The others are left out: no audit of them can change anything."""
    given = event.acceptance
    shard = shard_of(state, given.shard)
    sources = tuple(shard.gathered[lane] for lane in given.lanes if lane in shard.gathered)
    if given.epoch != shard.epoch + 1 or given.parent != shard.accepted or given.term != shard.term:
        raise LedgerOutOfOrder(f"epoch {given.epoch} of shard {given.shard} cannot be merged on epoch {shard.epoch}")
    if not sources or tuple(source.acceptance.checkpoint for source in sources) != event.sources:
        raise LedgerOutOfOrder(f"epoch {given.epoch} of shard {given.shard} is merged from results that were not accepted")
    left_out = {link.acceptance.checkpoint for link in shard.gathered.values()} - {*event.sources}
    link = AcceptedEpoch(given, event.time, state.budgets, event.trace, sources=sources)
    shard = shard.updated(
        epoch=given.epoch, acceptance=given, accepted_at=event.time, lineage=(*shard.lineage[-HISTORY + 1 :], link),
        gathered={}, judged={}, refuted=0, refuted_at=0.0, refused_merge=shard.refused_merge if len(sources) == 1 else None,
    )  # fmt: skip
    return {
        "shards": state.shards.set(given.shard, shard), "spent": add_costs(state, event.costs),
        "audits": {checkpoint: audit for checkpoint, audit in state.audits.items() if checkpoint not in left_out},
    }  # fmt: skip
