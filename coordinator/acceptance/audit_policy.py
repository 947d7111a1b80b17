"""The last rung, decided: who is audited, what follows from an audit, and how far a lineage falls when its author faked it.

Audits run after the acceptance, so that training never waits for them. The events are written in one transaction before anything
is done about them; what was published before a crash is published again from the state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lutetia.coordinator.acceptance.audit_comparison import audit_due, lottery
from lutetia.coordinator.acceptance.messages import AuditDelivered, Audited, AuditWanted, LendAudit, PublishReset, StartAudit
from lutetia.coordinator.acceptance.rollback import can_fall, due, move, quarantine, re_audits
from lutetia.coordinator.acceptance.transition import JudgeRules, JudgeTransition
from lutetia.coordinator.ledger.events import AuditDone, AuditReason, AuditReported, LineageRolledBack, PeerQuarantined
from lutetia.coordinator.ledger.run_state import HISTORY, PendingAudit, RunState
from lutetia.protocol.schema.canonical import digest_of
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord, ResetRecord
from lutetia.system.retry import backoff

_LONGEST_DELAY = 3600.0


def build_of(record: CheckpointRecord, manifest: Manifest) -> str:
    """What trust is counted for: the author's software and the kind of expert."""
    return f"{record.made.software}/{digest_of(manifest.expert_of(record.shard))[:12]}"


def consider(turn: JudgeTransition, record: CheckpointRecord) -> None:
    """`record` was accepted: by the adaptive rule, is it to be audited, and whole or in part?"""
    policy, peer = turn.rules.manifest.audit, turn.run.peer(record.owner)
    whole = lottery(turn.rules.secret, record.digest, "whole") < policy.whole_epoch
    if not (policy.replay_steps or whole):
        return
    if audit_due(peer.streak, policy.streak, lottery(turn.rules.secret, record.digest)):
        _due(turn, record.digest, record.shard, whole, "streak" if peer.streak < policy.streak else "lottery")


def _due(turn: JudgeTransition, checkpoint: str, shard: int, whole: bool, why: AuditReason) -> None:
    turn.write(due(turn.run, shard, checkpoint, turn.now, whole, why))


def _facts(audit: PendingAudit) -> dict[str, Any]:
    return {"shard": audit.shard, "epoch": audit.epoch, "owner": audit.owner, "checkpoint": audit.checkpoint}


def audits_lag(run: RunState, shard: int, epoch: int) -> bool:
    """Whether accepting `epoch` would push an epoch whose audit is due, or its parent, out of the history that is kept.

    Then a conviction could not be followed by a roll-back any more; so the result has to wait until the audits have caught up.
    """
    return any(audit.shard == shard and epoch - audit.epoch > HISTORY - 2 for audit in run.audits.values())


def start_audit(turn: JudgeTransition) -> None:
    """One audit at a time by the coordinator itself, the oldest result first; those that a peer has, or may yet take, wait."""
    if turn.state.auditing is not None or not turn.run.audits:
        return
    ready = [audit for audit in turn.run.audits.values() if audit.not_before <= turn.now and not _for_peers(turn, audit)]
    for audit in sorted(ready, key=lambda audit: (audit.attempts, audit.since, audit.checkpoint)):
        if not _pointless(turn, audit):
            turn.state = replace(turn.state, auditing=audit.checkpoint)
            turn.actions.append(_job(turn, audit))
            return


def _pointless(turn: JudgeTransition, audit: PendingAudit, seconds: float = 0.0) -> bool:
    """Whether its lineage could not be rolled back any more; then it is done with, so that nothing waits behind it.

    Results that would bring that about are put off (`audits_lag`); ledgers of earlier versions may hold such audits.
    """
    if can_fall(turn.run, audit.shard, audit.checkpoint):
        return False
    text = f"epoch {audit.epoch - 1}, to which its lineage would be rolled back, is too long ago"
    turn.write(AuditDone(time=turn.now, **_facts(audit), outcome="inconclusive", text=text, seconds=seconds))
    return True


def _for_peers(turn: JudgeTransition, audit: PendingAudit) -> bool:
    """Whether a peer carries it out, or one may take it soon: a peer asked lately, and the result has not waited long.

    At the end of the run nobody waits for a peer any more.
    """
    if turn.run.budgets_done:
        return False
    lent = turn.state.lent.get(audit.checkpoint)
    if lent:
        return turn.now < lent[1]
    wait = turn.rules.audit_wait
    return audit.reported is None and not audit.attempts and turn.now < min(turn.state.asked, audit.since) + wait


def _job(turn: JudgeTransition, audit: PendingAudit) -> StartAudit:
    shard = turn.run.shards[audit.shard]
    link = shard.link(audit.checkpoint)
    assert link is not None, "a due audit is of an accepted epoch: a roll-back takes it away"
    before = shard.before(link)
    return StartAudit(audit, link, before.acceptance if before else None)


def audited(turn: JudgeTransition, heard: Audited) -> None:
    """A replay came to its end."""
    audit = turn.run.audits.get(heard.checkpoint)
    if turn.state.auditing == heard.checkpoint:
        turn.state = replace(turn.state, auditing=None)
    if audit is None or _pointless(turn, audit, heard.seconds):
        return  # rolled back, or gone from the history, meanwhile
    finding, again_at = heard.finding, None
    again = heard.again and not finding.doubt  # the same replay would find the same
    if finding.outcome == "inconclusive" and again and audit.attempts + 1 < turn.rules.audit_attempts:
        delay = 0.0 if finding.closer else backoff(audit.attempts + 1, first=turn.rules.audit_delay, longest=_LONGEST_DELAY)
        again_at = turn.now + delay
    told = {"outcome": finding.outcome, "text": finding.text[:1000], "by": heard.by, "seconds": heard.seconds}
    told |= {"closer": finding.closer and again_at is not None, "doubt": finding.doubt and again_at is None}
    turn.write(AuditDone(time=turn.now, **_facts(audit), **told, again_at=again_at))
    if finding.outcome == "invalid":
        _convict(turn, audit, finding.text)


def lend(turn: JudgeTransition, wanted: AuditWanted) -> None:
    """Give the asking peer the oldest audit that nobody has, of somebody it has nothing to do with; one at a time."""
    rules, allowed = turn.rules, turn.rules.manifest.allowlist
    if wanted.owner in turn.run.quarantined or (allowed is not None and wanted.owner not in allowed):
        turn.actions.append(LendAudit(None, retry_after=_LONGEST_DELAY))
        return
    turn.state = replace(turn.state, asked=turn.now)
    lent = {name: loan for name, loan in turn.state.lent.items() if name in turn.run.audits}  # a second time it is not lent
    held = next((name for name, loan in lent.items() if loan[0] == wanted.owner and loan[1] > turn.now), None)
    if held is None:
        held = _free_for(turn, lent, {wanted.owner, *wanted.related})
    if held is None or _pointless(turn, turn.run.audits[held]):
        turn.state = replace(turn.state, lent=lent)
        turn.actions.append(LendAudit(None, retry_after=rules.audit_wait / 4 + len(turn.state.offers) / rules.asks_per_second))
        return
    loan = rules.audit_loan * (6 if turn.run.audits[held].whole else 1)
    lent.setdefault(held, (wanted.owner, turn.now + loan))  # who asks again has lost it, and gets the same
    turn.state = replace(turn.state, lent=lent)
    turn.actions.append(LendAudit(_job(turn, turn.run.audits[held]), lent[held][1]))


def _free_for(turn: JudgeTransition, lent: Mapping[str, tuple[str, float]], strangers: set[str]) -> str | None:
    """The oldest audit that nobody has, and whose author is none of `strangers`."""
    free = [
        (audit.since, name)
        for name, audit in turn.run.audits.items()
        if not (name in lent or name == turn.state.auditing or audit.owner in strangers or audit.reported or audit.attempts)
    ]
    return min(free, default=(0.0, None))[1]


def delivered(turn: JudgeTransition, report: AuditDelivered) -> None:
    """A peer's report. `valid` from an auditor that was often right is believed, except when the lottery wants it checked.

    Everything else is replayed here before it counts: nobody is convicted on a stranger's word.
    """
    audit = turn.run.audits.get(report.checkpoint)
    if audit is None or turn.state.lent.get(report.checkpoint, ("", 0.0))[0] != report.owner:
        return
    turn.state = replace(turn.state, lent={k: v for k, v in turn.state.lent.items() if k != report.checkpoint})
    trust, needed = turn.run.peer(report.owner).trust, turn.rules.manifest.audit.streak
    draw = lottery(turn.rules.secret, report.checkpoint + report.owner, "re-check")
    said = {"outcome": report.finding.outcome, "text": report.finding.text[:1000], "by": report.owner}
    facts = {"time": turn.now, **_facts(audit), **said, "seconds": report.seconds}
    if report.finding.outcome == "valid" and not audit_due(trust, needed, draw):
        turn.write(AuditDone(**facts))
    else:
        turn.write(AuditReported(**facts))


def _convict(turn: JudgeTransition, audit: PendingAudit, text: str) -> None:
    """Quarantine the author, take back what stands on the faked epoch, look again at all that it did before, oldest first."""
    if audit.owner not in turn.run.quarantined:
        quarantine(turn, PeerQuarantined(time=turn.now, **_facts(audit), text=text[:1000]))
    _roll_back(turn, audit)
    for again in re_audits(turn.run, audit.owner, turn.now):
        turn.write(again)


def _roll_back(turn: JudgeTransition, audit: PendingAudit) -> None:
    """The shard goes on from the last epoch before the faked one, in a new term; other shards are not touched."""
    shard = turn.run.shards[audit.shard]
    place: dict[str, Any] = {"epoch": audit.epoch - 1, "term": shard.term + 1, "dropped": shard.epoch - audit.epoch + 1}
    move(turn, audit.shard, LineageRolledBack(time=turn.now, shard=audit.shard, **place, checkpoint=audit.checkpoint))
    turn.actions.append(PublishReset(standing(turn.rules, turn.run, audit.shard, turn.now)))


def standing(rules: JudgeRules, run: RunState, shard: int, now: float) -> AcceptanceRecord | ResetRecord:
    """What the DHT is to show of a shard: its accepted epoch, or that it stands at its beginning again."""
    ledger = run.shards[shard]
    if ledger.acceptance is not None:
        return ledger.acceptance
    return ResetRecord(run=rules.manifest.run_id, owner=rules.coordinator, issued=now, shard=shard, term=ledger.term)
