"""Proofs: results that fail a loss check although their training may be right. Their whole epoch is replayed before the verdict.

Training is deterministic, so a refusal at `holdout` or `raw` can be nobody's fault: every honest node makes the same epoch from
the accepted parent, and would be refused for ever. The losses then say something about the parent or the few held-out clips:

- The result waits ("doubted") if its author has work that an audit found valid, or if results on this parent failed before.
- The parent's whole epoch is audited, unless it was. If it was crafted, its conviction rolls the shard back.
- If a result of the shard's last PROVED_LATELY epochs was accepted in this way, the next one of a known author that exceeds its
  bound by at most MOST_WITHOUT_PROOF is accepted with a note at once; the audit of its whole epoch follows. So where few clips
  are overfitted and every epoch fails, the coordinator's replays do not set the pace.
- Otherwise the coordinator replays the result's whole epoch itself, at the same time as the parent's. Both *valid*: the run's
  rules lead to these weights, so they are accepted with a note, and refusals on the same parent no longer count against anybody.
  Its own epoch *invalid*: the result is refused and its author quarantined.

Replays for proofs, of parents too, wait for no audit that is not part of a proof (`replay_order`).

No statement of a peer decides anything, so it does not matter whether peers conspire. Strangers can only cause replays: one for a
shard at a time, and after each that found nothing a lease, two, four … up to an hour until the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lutetia.coordinator.acceptance.audit_comparison import AuditFinding
from lutetia.coordinator.acceptance.audit_policy import audit_job, audit_parent, audits_lag, closed_as_too_old, steps_of
from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.intake.fetch_queue import key_of
from lutetia.coordinator.acceptance.messages import DiscardCandidate, Proved, StartAudit, StartProof
from lutetia.coordinator.acceptance.replay_order import awaited_audits, doubted_results, next_for_proof
from lutetia.coordinator.acceptance.rollback import can_roll_back, due_audit, quarantine, re_audits
from lutetia.coordinator.acceptance.transition import JudgeTransition, refusal
from lutetia.coordinator.ledger.events import AuditDone, DoubtReason, PeerQuarantined, ResultDoubted, ResultRefused
from lutetia.coordinator.ledger.run_state import LOSS_CHECKS, AcceptedEpoch, PendingAudit, ShardLedger, WaitingResult
from lutetia.protocol.schema.manifest import Timing
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord
from lutetia.system.retry import backoff

_LONGEST_PAUSE = 3600.0
PROVED_LATELY = 8
"""For so many epochs after a proof the next result of a known author that fails a loss check needs none before its acceptance."""
MOST_WITHOUT_PROOF = 0.25
"""By which fraction such a result may exceed its bound."""


def doubt_reason(transition: JudgeTransition, record: CheckpointRecord, verdict: Verdict) -> DoubtReason | None:
    """Why a result that failed a check is replayed before it is refused; None: it is refused."""
    if verdict.outcome != "invalid" or verdict.check not in LOSS_CHECKS or verdict.loss is None or verdict.parent_loss is None:
        return None
    peer, shard = transition.run.peer(record.owner), transition.run.shards[record.shard]
    if peer.audited > peer.convicted:
        return "author"
    return "refusals" if stranger_may_ask(shard, transition.rules.manifest.timing, transition.now) else None


def stranger_may_ask(shard: ShardLedger, timing: Timing, now: float) -> bool:
    """Whether a result of an author without audited work may be replayed: others failed too, and none such is replayed now."""
    if not shard.failed_losses or any(candidate.doubt for candidate in shard.candidates.values()):
        return False
    pause = backoff(shard.refuted, first=timing.lease, longest=_LONGEST_PAUSE) if shard.refuted else 0.0
    return now >= shard.refuted_at + pause


def waived(transition: JudgeTransition, record: CheckpointRecord, verdict: Verdict) -> Verdict | None:
    """The verdict with which a doubtful result is accepted without a proof before; None: it needs one."""
    lately = transition.run.shards[record.shard].lineage[-PROVED_LATELY:]
    if (
        verdict.over is None
        or verdict.over > MOST_WITHOUT_PROOF
        or not any(maker.proved for link in lately for maker in link.makers)
    ):
        return None
    if transition.run.peer(record.owner).audited <= transition.run.peer(record.owner).convicted:
        return None
    note = f"{verdict.text}; lately a replay confirmed such a result of this shard, so it is accepted and audited afterwards"
    return replace(verdict, outcome="valid", text=note[:1000])


def doubt(transition: JudgeTransition, record: CheckpointRecord, verdict: Verdict, why: DoubtReason) -> None:
    """Let the result wait for the replay of its epoch, and for that of its parent."""
    assert verdict.loss is not None
    assert verdict.parent_loss is not None
    transition.write(
        ResultDoubted(
            time=transition.now, shard=record.shard, epoch=record.epoch, owner=record.owner, checkpoint=record.digest,
            check=verdict.check, text=verdict.text[:600], loss=verdict.loss, parent_loss=verdict.parent_loss, why=why,
            costs=verdict.costs,
        )
    )  # fmt: skip
    audit_parent(transition, record.shard)


def start_proofs(transition: JudgeTransition) -> None:
    """Start the next replay of a doubted result, and that of an audit that a proof waits for, each unless one is running."""
    if not transition.state.pending:
        return
    for candidate in doubted_results(transition.run, transition.state.pending):
        _start_awaited(transition, candidate)
        _start_own(transition, candidate)


def _start_awaited(transition: JudgeTransition, candidate: WaitingResult) -> None:
    """Carry out the next audit that the proof waits for, unless it is running or put off."""
    if transition.state.proving_parent is not None:
        return
    audit = next_for_proof(transition.run, transition.state, candidate, transition.now)
    if audit is None or closed_as_too_old(transition, audit):
        return
    transition.set(proving_parent=audit.checkpoint)
    transition.actions.append(audit_job(transition, audit, "parent"))


def _start_own(transition: JudgeTransition, candidate: WaitingResult) -> None:
    """Replay the doubted epoch, beside the audits that it waits for; refuse it where its parent cannot be trusted."""
    state, record = transition.state, candidate.record
    if key_of(record) in state.proved or _is_waiting(transition, candidate) is None:
        return
    if state.proving is None:
        transition.set(proving=(record.owner, record.digest))
        transition.actions.append(StartProof(record, _replay_of(transition, candidate)))


def _is_waiting(transition: JudgeTransition, candidate: WaitingResult) -> bool | None:
    """Whether it is still open if the epochs below the result are sound. None: they are not, and the result was refused."""
    record, shard = candidate.record, transition.run.shards[candidate.record.shard]
    if any(awaited_audits(transition.run, candidate)) or audits_lag(transition.run, record.shard, record.epoch):
        return True
    if _parent_is_sound(transition, shard):
        return False
    _refuse(transition, candidate, "inconclusive", "the replay of the epoch before it ended without a verdict")
    return None


def _parent_is_sound(transition: JudgeTransition, shard: ShardLedger) -> bool:
    """Whether the parent's whole epoch was replayed and found valid, or cannot be: then its acceptance is all there is."""
    if not shard.lineage or not can_roll_back(transition.run, shard.lineage[-1].acceptance.shard, shard.accepted or ""):
        return True
    return all(maker.whole and maker.audit == "valid" for maker in shard.lineage[-1].makers)


def _replay_of(transition: JudgeTransition, candidate: WaitingResult) -> StartAudit:
    """The replay of a result that is not accepted, in the form of an audit."""
    record, run = candidate.record, transition.run
    assert candidate.doubt is not None
    end = AcceptanceRecord(
        run=record.run, owner=transition.rules.coordinator, issued=transition.now, shard=record.shard, epoch=record.epoch,
        checkpoint=record.digest, parent=record.parent, weights=record.weights, state=record.state, samples=record.samples,
        author=record.owner, tenure_until=transition.now, holdout_loss=candidate.doubt.loss,
    )  # fmt: skip
    link = AcceptedEpoch(end, transition.now, run.budgets, record.trace, record.made)
    due = PendingAudit(record.shard, record.epoch, record.owner, record.digest, candidate.seen, whole=True, lane=record.lane)
    return StartAudit(due, link, run.shards[record.shard].acceptance, steps_of(transition.rules, due), "proof")


def receive_proof(transition: JudgeTransition, proved: Proved) -> None:
    """Keep what the replay of a doubted result found, until the audits that the result waits for have ended, too."""
    record = proved.record
    if transition.state.proving == (record.owner, record.digest):
        transition.set(proving=None)
    if _doubted(transition, record):
        transition.set(proved={**transition.state.proved, key_of(record): proved})


def ready_proofs(transition: JudgeTransition) -> Iterator[tuple[Proved, Verdict]]:
    """The proofs that have ended, with the verdicts by which their results are accepted. The others are refused here."""
    for key, proved in transition.state.proved.items():
        candidate = _doubted(transition, proved.record)
        if candidate and _is_waiting(transition, candidate):
            continue
        transition.set(proved={other: kept for other, kept in transition.state.proved.items() if other != key})
        candidate = _doubted(transition, proved.record)
        if candidate and (verdict := _verdict(transition, candidate, proved.finding)):
            yield proved, verdict


def _doubted(transition: JudgeTransition, record: CheckpointRecord) -> WaitingResult | None:
    """The result as it waits; None: it was superseded or rolled back, or is to be checked under newer rules."""
    candidate = transition.run.shards[record.shard].candidates.get((record.owner, record.digest))
    return candidate if candidate and candidate.doubt else None


def _verdict(transition: JudgeTransition, candidate: WaitingResult, finding: AuditFinding) -> Verdict | None:
    """The verdict with which the result is accepted. None: it is refused."""
    record, doubted = candidate.record, candidate.doubt
    assert doubted is not None
    if finding.outcome == "valid":
        return Verdict("valid", doubted.check, _note(doubted, finding.text), doubted.loss, doubted.parent_loss)
    _refuse(transition, candidate, finding.outcome, f"the replay of its whole epoch says: {finding.text}")
    if finding.outcome == "invalid":
        _convict(transition, record, finding.text)
    return None


def _convict(transition: JudgeTransition, record: CheckpointRecord, text: str) -> None:
    """The author claims training that did not happen: as after an audit, except that nothing is built on the result."""
    if record.owner not in transition.run.quarantined:
        event = PeerQuarantined(
            time=transition.now, shard=record.shard, epoch=record.epoch, owner=record.owner, checkpoint=record.digest,
            text=text[:1000],
        )  # fmt: skip
        quarantine(transition, event)
    for again in re_audits(transition.run, record.owner, transition.now):
        transition.write(again)


def _note(doubted: ResultDoubted, text: str) -> str:
    return f"{doubted.text}; a replay of the whole epoch confirms the training, so it is accepted: {text}"[:1000]


def _refuse(transition: JudgeTransition, candidate: WaitingResult, outcome: str, why: str) -> None:
    doubted, record = candidate.doubt, candidate.record
    assert doubted is not None
    verdict = Verdict("invalid" if outcome == "invalid" else "inconclusive", doubted.check, f"{doubted.text}; {why}")
    transition.write(refusal(record, verdict, transition.now))
    transition.actions.append(DiscardCandidate(record))
    transition.tidy(record.shard)


def note_proof(transition: JudgeTransition, record: CheckpointRecord, proved: Proved) -> None:
    """The result was accepted: its replay counts as an audit of the whole epoch."""
    transition.write(due_audit(transition.run, record.shard, record.digest, transition.now, True, "proof"))
    done = AuditDone(
        time=transition.now, shard=record.shard, epoch=record.epoch, owner=record.owner, checkpoint=record.digest,
        outcome="valid", text=proved.finding.text[:1000], seconds=proved.seconds,
    )  # fmt: skip
    transition.write(done)


def remembered_refusal_may_be_proved(shard: ShardLedger, record: CheckpointRecord, timing: Timing, now: float) -> bool:
    """Whether a result that failed a loss check is checked again when its author makes and offers it again."""
    verdict = shard.judged.get((record.owner, record.digest))
    failed = isinstance(verdict, ResultRefused) and verdict.check in LOSS_CHECKS
    return failed and stranger_may_ask(shard, timing, now)
