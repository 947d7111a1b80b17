"""The coordinator's decisions: `judge(rules, state, stimulus) -> (state, actions)`, pure, without clock, socket or randomness.

Two invariants hold for every sequence of stimuli: a (shard, epoch) is never accepted twice, and no result is accepted that did
not pass all checks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never

from lutetia.coordinator.acceptance.audit_policy import (
    audits_lag,
    build_of,
    consider_audit,
    finish_audit,
    lend_audit,
    receive_report,
    start_audit,
    suspect_parent,
)
from lutetia.coordinator.acceptance.checks import RecordUnderCheck, Verdict, check_quarantine, check_size, first_failure
from lutetia.coordinator.acceptance.messages import (
    Action,
    Answer,
    AuditDelivered,
    Audited,
    AuditWanted,
    CheckDone,
    DiscardCandidate,
    JudgeTick,
    LedgerFacts,
    LendAudit,
    LimitsKnown,
    Offered,
    Proved,
    Publish,
    StartCheck,
    Stimulus,
)
from lutetia.coordinator.acceptance.proof import (
    doubt,
    doubt_reason,
    finish_proof,
    note_proof,
    remembered_refusal_may_be_proved,
    start_proof,
)
from lutetia.coordinator.acceptance.rollback import note_fact
from lutetia.coordinator.acceptance.transition import JudgeRules, JudgeState, JudgeTransition, refusal
from lutetia.coordinator.ledger.events import (
    BaselineMeasured,
    CheckpointAccepted,
    ResultRefused,
    ResultSeen,
    ResultSuperseded,
)
from lutetia.coordinator.ledger.persistent_map import PersistentMap
from lutetia.coordinator.ledger.run_state import HISTORY, RunState, ShardLedger, WaitingResult
from lutetia.protocol.rpc.checkpoint_offer import OfferReply
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord

_MINUTE = 60.0


def judge(rules: JudgeRules, state: JudgeState, stimulus: Stimulus) -> tuple[JudgeState, tuple[Action, ...]]:
    """The state after `stimulus`, and the actions that follow, to be carried out in order."""
    transition = _ResultTransition(rules, state, stimulus.now)
    match stimulus:
        case Offered():
            transition.actions.append(Answer(transition.receive_offer(stimulus)))
        case CheckDone():
            transition.finish_check(stimulus.record, stimulus.verdict)
        case LimitsKnown():
            transition.set(limits=stimulus.limits)
        case Audited():
            finish_audit(transition, stimulus)
        case Proved():
            transition.finish_proof(stimulus)
        case AuditWanted():
            transition.receive_audit_request(stimulus)
        case AuditDelivered():
            receive_report(transition, stimulus)
        case JudgeTick():
            transition.forget_offers()
        case LedgerFacts():
            for event in stimulus.events:
                note_fact(transition, event)
        case _:
            assert_never(stimulus)
    transition.start_checks()
    start_audit(transition)
    start_proof(transition)
    return transition.state, tuple(transition.actions)


class _ResultTransition(JudgeTransition):
    """One call of `judge`: its part that receives results and has them checked."""

    # offers

    def receive_offer(self, offer: Offered) -> OfferReply:
        record, limits = offer.record, self.state.limits
        shard = self.run.shards.get(record.shard)
        if shard is None:
            return OfferReply(verdict="invalid", check="lineage", text=f"the run has no shard {record.shard}")
        if offer.via == "offer" and (wait := self._over_rate(record.owner)):
            return OfferReply(verdict="busy", text="too many offers from this peer", retry_after=wait)
        offered = RecordUnderCheck(record, self.run, self.rules.manifest, limits)
        if failed := check_quarantine(offered):  # before all else: a quarantined peer learns it also of results decided before
            return OfferReply(verdict="invalid", check=failed.check, text=failed.text)
        reply = _earlier_reply(self.run, shard, record)
        if reply and not self._is_tried_again(shard, offer, reply):
            return reply
        if record.epoch > shard.epoch + 1:
            text = f"epoch {record.epoch - 1} of shard {record.shard} is not accepted yet"
            return OfferReply(verdict="busy", text=text, retry_after=self.rules.retry_delay)
        if failed := first_failure(offered):
            # not written down: an identity costs nothing, and each new one would make the ledger grow
            return OfferReply(verdict="invalid", check=failed.check, text=failed.text)
        if audits_lag(self.run, record.shard, record.epoch):
            text = f"audits of shard {record.shard} are {HISTORY - 2} epochs behind; results wait until they have caught up"
            return OfferReply(verdict="busy", text=text, retry_after=self.rules.retry_delay)
        if record.owner in shard.candidates or len(shard.candidates) >= self._places(offer):
            text = f"a result for epoch {record.epoch} of shard {record.shard} is still being checked"
            return OfferReply(verdict="busy", text=text, retry_after=self.rules.retry_delay)
        self.write(ResultSeen(time=self.now, record=record, via=offer.via))
        self.set(pending=self.state.pending | {record.shard})
        return OfferReply(verdict="queued")

    def _places(self, offer: Offered) -> int:
        """Records in the DHT cost their authors nothing and come from no address: they get at most half the places of a shard."""
        return self.rules.candidates_per_shard // (1 if offer.via == "offer" else 2)

    def _is_tried_again(self, shard: ShardLedger, offer: Offered, reply: OfferReply) -> bool:
        """Whether a result with a verdict is checked again: after an inconclusive one, or so that a replay can prove it."""
        if reply.verdict == "invalid":
            timing = self.rules.manifest.timing
            return offer.via == "offer" and remembered_refusal_may_be_proved(shard, offer.record, timing, self.now)
        return reply.verdict == "inconclusive" and self._may_try_again(shard, offer)

    def _may_try_again(self, shard: ShardLedger, offer: Offered) -> bool:
        """A result that was given up as inconclusive is checked again when its owner offers it again after a while."""
        given_up = shard.judged[offer.record.owner, offer.record.digest]
        return offer.via == "offer" and self.now - given_up.time >= self._patience

    @property
    def _patience(self) -> float:
        return self.rules.retry_after(self.rules.attempts)

    def receive_audit_request(self, stimulus: AuditWanted) -> None:
        if wait := self._over_rate(stimulus.owner):
            self.actions.append(LendAudit(None, retry_after=wait))
        else:
            lend_audit(self, stimulus)

    def _over_rate(self, owner: str) -> float | None:
        """Seconds to wait when `owner` offered too often within the last minute; otherwise this offer is counted."""
        recent = tuple(moment for moment in self.state.offers.get(owner, ()) if moment > self.now - _MINUTE)
        if len(recent) >= self.rules.offers_per_minute:
            return recent[0] + _MINUTE - self.now
        self.set(offers=self.state.offers.set(owner, (*recent, self.now)))
        return None

    def forget_offers(self) -> None:
        """Forget peers that have offered nothing for a minute."""
        begin = self.now - _MINUTE
        if any(moments[-1] <= begin for moments in self.state.offers.values()):
            kept: PersistentMap[str, tuple[float, ...]] = PersistentMap()
            for owner, moments in self.state.offers.items():
                if moments[-1] > begin:
                    kept = kept.set(owner, moments)
            self.set(offers=kept)

    # checks

    def start_checks(self) -> None:
        """Fill the free places: one candidate per shard at a time, fewest attempts first, then the longest waiting."""
        limits = self.state.limits
        if limits is None or not self.state.pending:
            return
        free = self.rules.checks_at_once - len(self.state.checking)
        for candidate in sorted(self._ready(), key=lambda c: (c.attempts, c.seen, c.record.owner)):
            if free <= 0:
                return
            record = candidate.record
            if record.owner in self.run.quarantined:  # a recovered quarantine, written after the candidate was
                self._dismiss(record, Verdict("invalid", "quarantine", "its author was quarantined meanwhile"))
                continue
            if record.shard in self.state.checking or audits_lag(self.run, record.shard, record.epoch):
                continue
            if failed := check_size(RecordUnderCheck(record, self.run, self.rules.manifest, limits)):
                self._dismiss(record, failed)
                continue
            self.set(checking={**self.state.checking, record.shard: (record.owner, record.digest)})
            self.actions.append(StartCheck(record, self.run.shards[record.shard].acceptance))
            free -= 1

    def _ready(self) -> Iterator[WaitingResult]:
        for index in sorted(self.state.pending - self.state.checking.keys()):
            for candidate in self.run.shards[index].candidates.values():
                if candidate.not_before <= self.now and candidate.doubt is None:
                    yield candidate

    def finish_check(self, record: CheckpointRecord, verdict: Verdict) -> None:
        """Accept or refuse the candidate that was checked."""
        if self.state.checking.get(record.shard) != (record.owner, record.digest):
            return  # a late answer, from before the worker process restarted or the candidate was discarded
        self.set(checking={k: v for k, v in self.state.checking.items() if k != record.shard})
        shard = self.run.shards[record.shard]
        if record.epoch == 1 and shard.baseline is None and verdict.parent_loss is not None:
            self.write(BaselineMeasured(time=self.now, shard=record.shard, loss=verdict.parent_loss))
        if verdict.outcome == "invalid" and verdict.rules is not None and verdict.rules < self.run.manifest_version:
            return  # refused under rules that were replaced meanwhile: it is checked again
        if why := doubt_reason(self, record, verdict):
            doubt(self, record, verdict, why)
        elif verdict.outcome != "valid":
            self._dismiss(record, verdict)
        elif not audits_lag(self.run, record.shard, record.epoch):
            self._accept(record, verdict)
        # else a conviction made the audit of an old epoch due: the result waits, and is checked again after the audits

    def finish_proof(self, proved: Proved) -> None:
        """Accept the doubted result whose training was replayed; otherwise it was refused."""
        record = proved.record
        verdict = finish_proof(self, proved)
        if verdict and not audits_lag(self.run, record.shard, record.epoch):
            self._accept(record, verdict)
            note_proof(self, record, proved)

    def _dismiss(self, record: CheckpointRecord, verdict: Verdict) -> None:
        candidate = self.run.shards[record.shard].candidates[record.owner]
        again_at = None
        if verdict.outcome == "inconclusive" and candidate.attempts + 1 < self.rules.attempts:
            again_at = self.now + self.rules.retry_after(candidate.attempts)
        self.write(refusal(record, verdict, self.now, again_at))
        if again_at is None:
            self.actions.append(DiscardCandidate(record))
            suspect_parent(self, record.shard)
        self.tidy(record.shard)

    def _accept(self, record: CheckpointRecord, verdict: Verdict) -> None:
        shard = self.run.shards[record.shard]
        if (
            record.epoch != shard.epoch + 1
            or record.parent != shard.accepted
            or verdict.loss is None
            or verdict.parent_loss is None
        ):
            raise AssertionError(f"the checks passed epoch {record.epoch} on epoch {shard.epoch} of shard {record.shard}")
        acceptance = _acceptance(self.rules, record, shard.term, verdict.loss, self.now)
        build = build_of(record, self.rules.manifest)
        self.write(
            CheckpointAccepted(
                time=self.now, acceptance=acceptance, parent_loss=verdict.parent_loss, build=build, costs=verdict.costs,
                note=verdict.text,
            )
        )  # fmt: skip
        if not verdict.text:  # else its whole epoch was replayed already
            consider_audit(self, record)
        self.actions.append(Publish(acceptance, record))
        for other in tuple(self.run.shards[record.shard].candidates.values()):
            late = other.record
            self.write(
                ResultSuperseded(
                    time=self.now, shard=late.shard, epoch=late.epoch, owner=late.owner, checkpoint=late.digest, by=record.digest
                )
            )
            self.actions.append(DiscardCandidate(late))
        self.tidy(record.shard)


def _earlier_reply(run: RunState, shard: ShardLedger, record: CheckpointRecord) -> OfferReply | None:
    """The reply to a result that is decided or waiting already; None for a new one."""
    digest = record.digest
    if run.peer(record.owner).checkpoint == digest and shard.link(digest):
        return OfferReply(verdict="accepted")
    if shard.term and record.epoch > shard.epoch and (record.epoch > shard.epoch + 1 or record.parent != shard.accepted):
        text = f"shard {record.shard} was rolled back to epoch {shard.epoch}; sync it and go on from there"
        return OfferReply(verdict="superseded", text=text)
    if record.epoch <= shard.epoch:
        text = f"epoch {shard.epoch} of shard {record.shard} was accepted from another result; sync it and go on from there"
        return OfferReply(verdict="superseded", text=text)
    waiting = shard.candidates.get(record.owner)
    if waiting and waiting.record.digest == digest:
        return OfferReply(verdict="queued")
    match shard.judged.get((record.owner, digest)):
        case ResultRefused() as refusal:
            return OfferReply(verdict=refusal.verdict, check=refusal.check, text=refusal.text)
        case ResultSuperseded():
            return OfferReply(verdict="superseded")
    return None


def _acceptance(rules: JudgeRules, record: CheckpointRecord, term: int, loss: float, now: float) -> AcceptanceRecord:
    return AcceptanceRecord(
        run=record.run, owner=rules.coordinator, issued=now, shard=record.shard, epoch=record.epoch, checkpoint=record.digest,
        parent=record.parent, weights=record.weights, state=record.state, samples=record.samples, author=record.owner,
        tenure_until=now + rules.manifest.timing.tenure, holdout_loss=loss, term=term,
    )  # fmt: skip
