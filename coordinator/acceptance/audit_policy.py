"""Audits of accepted results: who is audited, who carries an audit out, and what follows from its finding.

Audits run after the acceptance, so that training never waits for them. The ledger's events are written in one transaction before
anything is done about them; what a crash left unpublished is published after the restart, from the state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from lutetia.coordinator.acceptance.audit_comparison import (
    DEPTH_UNIT,
    audit_due,
    is_newcomer,
    lottery,
    secret_steps,
    unproved_depth,
)
from lutetia.coordinator.acceptance.intake.rate_limits import loan_seconds
from lutetia.coordinator.acceptance.messages import AuditDelivered, Audited, AuditWanted, LendAudit, ReplayProcess, StartAudit
from lutetia.coordinator.acceptance.replay_order import audit_rank, holds_up_a_proof, is_waited_for, loan_rank
from lutetia.coordinator.acceptance.rollback import can_roll_back, condemn, due_audit, quarantine, re_audits, settle_suspects
from lutetia.coordinator.acceptance.transition import JudgeRules, JudgeTransition, Loan, released
from lutetia.coordinator.ledger.events import AuditDone, AuditReported, PeerQuarantined, ResultRefused
from lutetia.coordinator.ledger.run_state import HISTORY, PendingAudit, RunState, ShardLedger
from lutetia.protocol.schema.canonical import digest_of
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.records import CheckpointRecord
from lutetia.protocol.schema.verdicts import CheckName
from lutetia.system.retry import backoff

_LONGEST_DELAY = 3600.0
_SUSPICIOUS_REFUSALS = 2
_CONTENT_CHECKS: frozenset[CheckName] = frozenset({"numbers", "holdout", "raw"})
"""What these look at depends on the parent from which the epoch was trained."""


class _ResultFields(TypedDict):
    """The fields by which an audit's events name its result."""

    shard: int
    epoch: int
    owner: str
    checkpoint: str


def _result(audit: PendingAudit) -> _ResultFields:
    return {"shard": audit.shard, "epoch": audit.epoch, "owner": audit.owner, "checkpoint": audit.checkpoint}


def build_of(record: CheckpointRecord, manifest: Manifest) -> str:
    """The author's software and the kind of expert: trust is counted for each build."""
    return f"{record.made.software}/{digest_of(manifest.expert_of(record.shard))[:12]}"


def consider_audit(transition: JudgeTransition, record: CheckpointRecord) -> None:
    """`record` was accepted: decide by the adaptive rule whether it is audited, and whether whole or in part.

    Where anything is audited, a newcomer's first epochs are, whole. Where whole epochs are audited, so are some of those with
    many epochs below them of which none was replayed whole.
    """
    policy, peer = transition.rules.manifest.audit, transition.run.peer(record.owner)
    if policy.audits and is_newcomer(transition.run, record.owner, transition.rules.newcomer_epochs):
        transition.write(due_audit(transition.run, record.shard, record.digest, transition.now, True, "newcomer"))
        return
    if policy.whole_epoch:
        depth_draw = lottery(transition.rules.secret, record.digest, "depth")
        if depth_draw < policy.whole_epoch * unproved_depth(transition.run.shards[record.shard]) / DEPTH_UNIT:
            transition.write(due_audit(transition.run, record.shard, record.digest, transition.now, True, "depth"))
            return
    whole = lottery(transition.rules.secret, record.digest, "whole") < policy.whole_epoch
    if not (policy.replay_steps or whole):
        return
    if audit_due(peer.streak, policy.streak, lottery(transition.rules.secret, record.digest)):
        why = "streak" if peer.streak < policy.streak else "lottery"
        transition.write(due_audit(transition.run, record.shard, record.digest, transition.now, whole, why))


def suspect_parent(transition: JudgeTransition, shard: int) -> None:
    """Make the whole epoch of the accepted parent due for an audit once results of two authors on it failed by their content.

    Honest training from a sound parent does not fail again and again; from one with crafted optimiser moments it must. Each
    parent is audited for this reason once, so that hostile refusals cost one replay for each accepted epoch at most.
    """
    if refused_by_content(transition.run.shards[shard]) >= _SUSPICIOUS_REFUSALS:
        audit_parent(transition, shard)


def audit_parent(transition: JudgeTransition, shard: int) -> None:
    """Make the whole epoch of the accepted parent due for an audit, unless it was replayed whole or cannot be."""
    ledger = transition.run.shards[shard]
    if ledger.acceptance is None or not ledger.lineage:
        return
    for maker in ledger.lineage[-1].makers:
        checkpoint = maker.acceptance.checkpoint
        known = transition.run.audits.get(checkpoint)
        if not (maker.whole or (known and known.whole)) and can_roll_back(transition.run, shard, checkpoint):
            transition.write(due_audit(transition.run, shard, checkpoint, transition.now, True, "refusals"))


def refused_by_content(shard: ShardLedger) -> int:
    """The number of authors whose results for the next epoch were refused for what is in them."""
    return len(
        {
            owner
            for (owner, _), verdict in shard.judged.items()
            if isinstance(verdict, ResultRefused) and verdict.verdict == "invalid" and verdict.check in _CONTENT_CHECKS
        }
    )


def audits_lag(run: RunState, shard: int, epoch: int) -> bool:
    """Whether accepting `epoch` would push an epoch whose audit is due, or its parent, out of the history that is kept.

    A conviction could then no longer be followed by a rollback, so the result waits until the audits have caught up. It also
    waits for an invalid epoch, until the judge has decided whether to keep the epochs after it.
    """
    if epoch - 1 <= HISTORY - 2:  # no epoch is that old yet; in a run with many lanes many audits are due
        return False
    due = [audit.epoch for audit in run.audits.values() if audit.shard == shard]
    if suspects := run.shards[shard].suspects:
        due += [link.acceptance.epoch for link in run.shards[shard].trained if link.acceptance.checkpoint in suspects]
    return any(epoch - earlier > HISTORY - 2 for earlier in due)


def start_audit(transition: JudgeTransition) -> None:
    """Start the coordinator's next own audit, unless one is running or a peer has or may take it.

    Those that a result waits for come first (`replay_order`), then those of authors of whom no whole epoch was found valid yet,
    so that little is built on their work before; then the oldest.
    """
    if transition.state.auditing is not None or not transition.run.audits:
        return
    audits, now = transition.run.audits.values(), transition.now
    ready = [
        audit
        for audit in audits
        if audit.checkpoint != transition.state.proving_parent
        and audit.not_before <= now
        and not _left_to_peers(transition, audit)
    ]
    for audit in sorted(ready, key=lambda audit: audit_rank(transition.rules, transition.run, audit)):
        if not closed_as_too_old(transition, audit):
            transition.set(auditing=audit.checkpoint)
            transition.actions.append(audit_job(transition, audit))
            return


def closed_as_too_old(transition: JudgeTransition, audit: PendingAudit, seconds: float = 0.0) -> bool:
    """Whether its lineage can no longer be rolled back; the audit is then closed, so that nothing waits behind it.

    Results that would cause this are put off (`audits_lag`); ledgers of earlier versions may hold such audits.
    """
    if can_roll_back(transition.run, audit.shard, audit.checkpoint):
        return False
    text = f"epoch {audit.epoch - 1}, to which its lineage would be rolled back, is too long ago"
    transition.write(AuditDone(time=transition.now, **_result(audit), outcome="inconclusive", text=text, seconds=seconds))
    return True


def _left_to_peers(transition: JudgeTransition, audit: PendingAudit) -> bool:
    """Whether a peer carries it out, or may take it soon: a peer asked lately, and the result has not waited long.

    At the end of the run the coordinator waits for no peer.
    """
    run, lent = transition.run, transition.state.lent.get(audit.checkpoint)
    if lent:
        left = transition.now < lent.until
    else:
        wait_until = min(transition.state.asked, audit.since) + transition.rules.audit_wait
        left = audit.reported is None and not audit.attempts and transition.now < wait_until
    return left and not (
        run.budgets_done or holds_up_a_proof(run, audit, strangers=True) or is_waited_for(transition.rules, run, audit)
    )


def audit_job(transition: JudgeTransition, audit: PendingAudit, process: ReplayProcess = "audit") -> StartAudit:
    """The order to carry it out."""
    shard = transition.run.shards[audit.shard]
    link = shard.link(audit.checkpoint)
    assert link is not None, "a due audit is of an accepted epoch: a rollback removes it"
    before = shard.before(link)
    return StartAudit(audit, link, before.acceptance if before else None, steps_of(transition.rules, audit), process)


def steps_of(rules: JudgeRules, audit: PendingAudit) -> int:
    """How many steps a replay takes: all, or a secret number of first ones. The same at each try."""
    epoch = rules.manifest.lane_steps(audit.lane)
    if audit.whole:
        return epoch
    return secret_steps(lottery(rules.secret, audit.checkpoint, "steps"), rules.manifest.audit.replay_steps, epoch)


def finish_audit(transition: JudgeTransition, done: Audited) -> None:
    """Record the finding of a replay; try again when it is inconclusive, convict the author when it is invalid."""
    audit = transition.run.audits.get(done.checkpoint)
    transition.set(**released(transition.state, done.checkpoint))
    if audit is None or closed_as_too_old(transition, audit, done.seconds):
        return  # rolled back, or too old, meanwhile
    if audit.whole and done.whole is False and done.finding.outcome != "invalid":
        return  # the whole epoch came due while its first steps were replayed
    finding, again_at = done.finding, None
    again = done.again and not finding.doubt  # the same replay would find the same
    if finding.outcome == "inconclusive" and again and audit.attempts + 1 < transition.rules.audit_attempts:
        first = transition.rules.audit_delay
        delay = 0.0 if finding.closer else backoff(audit.attempts + 1, first=first, longest=_LONGEST_DELAY)
        again_at = transition.now + delay
    transition.write(
        AuditDone(
            time=transition.now, **_result(audit), outcome=finding.outcome, text=finding.text[:1000], by=done.by,
            seconds=done.seconds, closer=finding.closer and again_at is not None, doubt=finding.doubt and again_at is None,
            again_at=again_at,
        )
    )  # fmt: skip
    if finding.outcome == "invalid":
        _convict(transition, audit, finding.text)
    settle_suspects(transition, audit.shard)


def lend_audit(transition: JudgeTransition, wanted: AuditWanted) -> None:
    """Lend the asking peer an audit that no other peer has and whose author is unrelated to it; one at a time.

    A peer that asks again has lost its audit, or shows that it still works on it: it gets the same.
    """
    rules, allowed = transition.rules, transition.rules.manifest.allowlist
    banned = rules.manifest.orders.ban_of(wanted.owner) is not None
    if banned or wanted.owner in transition.run.quarantined or (allowed is not None and wanted.owner not in allowed):
        transition.actions.append(LendAudit(None, retry_after=_LONGEST_DELAY))
        return
    transition.set(asked=transition.now)
    lent = {name: loan for name, loan in transition.state.lent.items() if name in transition.run.audits}  # each is lent once
    held = next((name for name, loan in lent.items() if loan.owner == wanted.owner and loan.until > transition.now), None)
    if held is None:
        held = _first_free(transition, lent, {wanted.owner, *wanted.related})
    if held is None or closed_as_too_old(transition, transition.run.audits[held]):
        transition.set(lent=lent)
        retry_after = rules.audit_wait / 4 + len(transition.state.offers) / rules.asks_per_second
        transition.actions.append(LendAudit(None, retry_after=retry_after))
        return
    audit = transition.run.audits[held]
    until = lent[held].until if held in lent else transition.now + loan_seconds(rules, transition.run, audit)
    lent[held] = Loan(wanted.owner, until, transition.now)
    transition.set(lent=lent)
    transition.actions.append(LendAudit(audit_job(transition, audit), until))


def _first_free(transition: JudgeTransition, lent: Mapping[str, Loan], related: set[str]) -> str | None:
    """Of the audits that nobody has, and whose author is none of `related`, the first that a proof waits for, or the oldest."""
    taken = {*lent, transition.state.auditing, transition.state.proving_parent}
    free = [
        audit
        for name, audit in transition.run.audits.items()
        if not (name in taken or audit.owner in related or audit.reported or audit.attempts)
    ]
    first = min(free, key=lambda audit: loan_rank(transition.run, audit), default=None)
    return first and first.checkpoint


def receive_report(transition: JudgeTransition, report: AuditDelivered) -> None:
    """A peer's report. `valid` from an auditor that was often right counts at once, unless the lottery wants it checked.

    Everything else is replayed here before it counts: no peer is convicted by another peer's report.
    """
    audit = transition.run.audits.get(report.checkpoint)
    loan = transition.state.lent.get(report.checkpoint)
    if audit is None or loan is None or loan.owner != report.owner:
        return
    transition.set(lent={k: v for k, v in transition.state.lent.items() if k != report.checkpoint})
    trust, needed = transition.run.peer(report.owner).trust, transition.rules.manifest.audit.streak
    draw = lottery(transition.rules.secret, report.checkpoint + report.owner, "re-check")
    finding = report.finding
    counts = finding.outcome == "valid" and not audit_due(trust, needed, draw)
    event = AuditDone if counts else AuditReported
    transition.write(
        event(
            time=transition.now, **_result(audit), outcome=finding.outcome, text=finding.text[:1000], by=report.owner,
            seconds=report.seconds, samples=steps_of(transition.rules, audit) * transition.rules.manifest.optimisation.batch,
        )
    )  # fmt: skip
    settle_suspects(transition, audit.shard)


def _convict(transition: JudgeTransition, audit: PendingAudit, text: str) -> None:
    """Quarantine the author, drop or suspect what is built on the faked epoch, and audit all its earlier work, oldest first."""
    if audit.owner not in transition.run.quarantined:
        quarantine(transition, PeerQuarantined(time=transition.now, **_result(audit), text=text[:1000]))
    condemn(transition, audit.shard, audit.checkpoint)
    for again in re_audits(transition.run, audit.owner, transition.now):
        transition.write(again)
