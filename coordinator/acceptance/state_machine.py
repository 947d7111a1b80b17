"""The coordinator's decisions: `judge(rules, state, stimulus) -> (state, actions)`, pure, without clock, socket or randomness.

Two invariants hold for every sequence of stimuli: a (shard, epoch) is never accepted twice, and no result is accepted that did
not pass all checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import assert_never

from lutetia.coordinator.acceptance.audit_comparison import lottery
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
from lutetia.coordinator.acceptance.intake.fetch_queue import (
    LANES_OF_OWNER,
    UNKNOWN_ORIGINS,
    forget_gone,
    gives_way,
    is_known,
    key_of,
    next_checks,
    next_fetches,
    next_held,
    note_failure,
    note_success,
    patience,
)
from lutetia.coordinator.acceptance.intake.newcomer_holds import hold
from lutetia.coordinator.acceptance.intake.owner_orders import dismiss_banned, is_paused, paused_reply
from lutetia.coordinator.acceptance.intake.rate_limits import end_loans, forget_offers, forget_origins, over_rate
from lutetia.coordinator.acceptance.lanes.merging import gather, receive_merge, start_merges, supersede
from lutetia.coordinator.acceptance.messages import (
    Action,
    Answer,
    AuditDelivered,
    Audited,
    AuditWanted,
    CheckDone,
    DiscardCandidate,
    FetchDone,
    JudgeTick,
    LedgerFacts,
    LendAudit,
    LimitsKnown,
    Merged,
    Offered,
    Proved,
    Publish,
    StartCheck,
    StartFetch,
    Stimulus,
)
from lutetia.coordinator.acceptance.proof import (
    doubt,
    doubt_reason,
    note_proof,
    ready_proofs,
    receive_proof,
    remembered_refusal_may_be_proved,
    start_proofs,
    waived,
)
from lutetia.coordinator.acceptance.rollback import due_audit, note_fact
from lutetia.coordinator.acceptance.transition import (
    JudgeRules,
    JudgeState,
    JudgeTransition,
    acceptance_of,
    earlier_reply,
    refusal,
)
from lutetia.coordinator.ledger.events import (
    BaselineMeasured,
    CheckpointAccepted,
    DoubtReason,
    ResultSeen,
)
from lutetia.coordinator.ledger.run_state import HISTORY, ShardLedger, WaitingResult
from lutetia.protocol.claims import slot_of
from lutetia.protocol.rpc.checkpoint_offer import OfferReply
from lutetia.protocol.schema.records import CheckpointRecord


def judge(rules: JudgeRules, state: JudgeState, stimulus: Stimulus) -> tuple[JudgeState, tuple[Action, ...]]:
    """The state after `stimulus`, and the actions that follow, to be carried out in order."""
    transition = _ResultTransition(rules, state, stimulus.now)
    match stimulus:
        case Offered():
            transition.actions.append(Answer(transition.receive_offer(stimulus)))
            if transition.run is state.run:  # nothing is new; what time alone makes due starts at the next tick
                return transition.state, tuple(transition.actions)
        case FetchDone():
            transition.finish_fetch(stimulus.record, stimulus.verdict)
        case CheckDone():
            transition.finish_check(stimulus.record, stimulus.verdict)
        case LimitsKnown():
            transition.set(limits=stimulus.limits)
        case Audited():
            finish_audit(transition, stimulus)
        case Proved():
            receive_proof(transition, stimulus)
        case AuditWanted():
            transition.receive_audit_request(stimulus)
        case AuditDelivered():
            receive_report(transition, stimulus)
        case Merged():
            receive_merge(transition, stimulus)
        case JudgeTick():
            transition.set(at_work=stimulus.at_work)
            end_loans(transition, stimulus.auditors)
            forget_offers(transition)
            forget_origins(transition)
        case LedgerFacts():
            for event in stimulus.events:
                note_fact(transition, event)
        case _:
            assert_never(stimulus)
    dismiss_banned(transition)
    forget_gone(transition)
    if not is_paused(rules):
        transition.finish_proofs()
        transition.release_held()
        transition.start_checks()
        transition.start_fetches()
        start_proofs(transition)
        start_merges(transition)
    start_audit(transition)
    return transition.state, tuple(transition.actions)


class _ResultTransition(JudgeTransition):
    """One call of `judge`: its part that receives results and has them checked."""

    # offers

    def receive_offer(self, offer: Offered) -> OfferReply:
        record, limits = offer.record, self.state.limits
        shard = self.run.shards.get(record.shard)
        if shard is None:
            return OfferReply(verdict="invalid", check="lineage", text=f"the run has no shard {record.shard}")
        if offer.via == "offer" and (wait := over_rate(self, record.owner)):
            return OfferReply(verdict="busy", text="too many offers from this peer", retry_after=wait)
        offered = RecordUnderCheck(record, self.run, self.rules.manifest, limits)
        if failed := check_quarantine(offered):  # before all else: a quarantined peer learns it also of results decided before
            return OfferReply(verdict="invalid", check=failed.check, text=failed.text)
        reply = earlier_reply(self.run, shard, record)
        if reply and not self._is_tried_again(shard, offer, reply):
            return reply
        if paused := paused_reply(self.rules):
            return paused
        if record.epoch > shard.epoch + 1:
            text = f"epoch {record.epoch - 1} of shard {record.shard} is not accepted yet"
            return OfferReply(verdict="busy", text=text, retry_after=self.rules.retry_delay)
        if failed := first_failure(offered):
            # not written down: an identity costs nothing, and each new one would make the ledger grow
            return OfferReply(verdict="invalid", check=failed.check, text=failed.text)
        if audits_lag(self.run, record.shard, record.epoch):
            text = f"audits of shard {record.shard} are {HISTORY - 2} epochs behind; results wait until they have caught up"
            return OfferReply(verdict="busy", text=text, retry_after=self.rules.retry_delay)
        if offer.via == "offer":
            origin = offer.origin or UNKNOWN_ORIGINS["offer"]
            self.set(origins=self.state.origins.set(record.owner, origin))
        if self._waits_for_own(shard, record) or not self._has_place(shard, offer):
            text = f"a result for epoch {record.epoch} of shard {record.shard} is still being checked"
            return OfferReply(verdict="busy", text=text, retry_after=self.rules.retry_delay)
        self.write(ResultSeen(time=self.now, record=record, via=offer.via))
        self.set(pending=self.state.pending | {record.shard})
        return OfferReply(verdict="queued")

    @staticmethod
    def _waits_for_own(shard: ShardLedger, record: CheckpointRecord) -> bool:
        """Whether a result of the same owner has to be decided first: one of the same lane, or the oldest of many lanes."""
        own = shard.undecided_of(record.owner)
        return len(own) >= LANES_OF_OWNER or any(one.record.lane == record.lane for one in own)

    def _has_place(self, shard: ShardLedger, offer: Offered) -> bool:
        """Whether there is a place, or another result gives its own up because it is behind this one in line.

        Records in the DHT cost their authors nothing and come from no address: they get at most half the places of a shard.
        """
        polled = offer.via == "poll" and not is_known(self.run, offer.record.owner)
        there = sum(one.record.lane == offer.record.lane for one in shard.candidates.values())
        if there < self.rules.candidates_per_shard // (2 if polled else 1):
            return True
        last = None if polled else gives_way(self.state, WaitingResult(offer.record, self.now))
        if last and key_of(last.record) in self.state.held:
            text = "a result of an author with accepted work needed its place while it was held; offer it again later"
            self._dismiss(last.record, Verdict("inconclusive", "transfer", text), final=True)
        elif last:
            text = "it had not arrived when results of others, which come first, needed its place; offer it again later"
            note_failure(self, last.record)
            self._dismiss(last.record, Verdict("inconclusive", "transfer", text), final=True)
        return last is not None

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
        if wait := over_rate(self, stimulus.owner):
            self.actions.append(LendAudit(None, retry_after=wait))
        else:
            lend_audit(self, stimulus)

    # checks

    def start_fetches(self) -> None:
        """Fill the free places for fetches."""
        limits = self.state.limits
        if limits is None or not self.state.pending:
            return
        for candidate in next_fetches(self):
            record = candidate.record
            if record.owner in self.run.quarantined:  # a recovered quarantine, written after the candidate was
                self._dismiss(record, Verdict("invalid", "quarantine", "its author was quarantined meanwhile"))
            elif failed := check_size(RecordUnderCheck(record, self.run, self.rules.manifest, limits)):
                self._dismiss(record, failed)
            elif not audits_lag(self.run, record.shard, record.epoch):
                self.set(fetching=self.state.fetching | {key_of(record)})
                self.actions.append(StartFetch(record, patience(self.state, record, self.now)))

    def finish_fetch(self, record: CheckpointRecord, verdict: Verdict) -> None:
        """The candidate waits for its checks, or for another fetch."""
        key = key_of(record)
        if key not in self.state.fetching:
            return  # a late answer, from before the candidate was discarded
        self.set(fetching=self.state.fetching - {key})
        if verdict.outcome == "valid":
            self.set(fetched={**self.state.fetched, key: verdict.costs})
        else:
            note_failure(self, record)
            self._dismiss(record, verdict)

    def start_checks(self) -> None:
        """Fill the free places with candidates that have arrived: one per shard at a time."""
        free = self.rules.checks_at_once - len(self.state.checking)
        if free <= 0 or not self.state.fetched:
            return
        for candidate in next_checks(self):
            record = candidate.record
            if free <= 0:
                return
            slot = slot_of(record.shard, record.lane)
            if slot in self.state.checking or audits_lag(self.run, record.shard, record.epoch):
                continue
            self.set(checking={**self.state.checking, slot: (record.owner, record.digest)})
            self.actions.append(StartCheck(record, self.run.shards[record.shard].acceptance))
            free -= 1

    def finish_check(self, record: CheckpointRecord, verdict: Verdict) -> None:
        """Accept or refuse the candidate that was checked."""
        slot = slot_of(record.shard, record.lane)
        if self.state.checking.get(slot) != (record.owner, record.digest):
            return  # a late answer, from before the worker process restarted or the candidate was discarded
        fetched = dict(self.state.fetched)
        verdict = replace(verdict, costs=(*fetched.pop(key_of(record), ()), *verdict.costs))
        self.set(checking={k: v for k, v in self.state.checking.items() if k != slot}, fetched=fetched)
        shard = self.run.shards[record.shard]
        if record.epoch == 1 and shard.baseline is None and verdict.parent_loss is not None:
            self.write(BaselineMeasured(time=self.now, shard=record.shard, loss=verdict.parent_loss))
        if verdict.outcome == "invalid" and verdict.rules is not None and verdict.rules < self.run.manifest_version:
            return  # refused under rules that were replaced meanwhile: it is checked again
        if why := doubt_reason(self, record, verdict):
            self._accept_or_doubt(record, verdict, why)
            return
        if verdict.outcome == "invalid":
            note_failure(self, record)
        if verdict.outcome != "valid":
            self._dismiss(record, verdict)
        else:
            self._accept_or_hold(record, verdict)

    def _accept_or_doubt(self, record: CheckpointRecord, verdict: Verdict, why: DoubtReason) -> None:
        accepted = waived(self, record, verdict)
        if accepted is None:
            doubt(self, record, verdict, why)
        else:
            self._accept_or_hold(record, accepted)

    def _accept_or_hold(self, record: CheckpointRecord, verdict: Verdict) -> None:
        if audits_lag(self.run, record.shard, record.epoch):
            return  # a conviction made the audit of an old epoch due: the result waits, and is checked again after the audits
        if is_paused(self.rules) or self._is_held(self.run.shards[record.shard].candidates[record.owner, record.digest]):
            self.set(held={**self.state.held, key_of(record): verdict})
        else:
            self._accept_checked(record, verdict)

    def _accept_checked(self, record: CheckpointRecord, verdict: Verdict) -> None:
        self._accept(record, verdict)
        if verdict.text:
            self.write(due_audit(self.run, record.shard, record.digest, self.now, True, "proof"))

    def _is_held(self, candidate: WaitingResult) -> bool:
        held = hold(self.run, self.rules.manifest, candidate, self.rules.newcomer_epochs)
        return held is not None and self.now < held.until

    def release_held(self) -> None:
        """Of each shard where the wait of a held result is over, accept the held result that is first in line."""
        for shard in sorted({shard for shard, _, _ in self.state.held}):
            held = next_held(self.state, shard, lambda digest: lottery(self.rules.secret, digest, "held"))
            for lane in sorted({one.record.lane for one in held}):
                self._release_held([one for one in held if one.record.lane == lane])

    def _release_held(self, held: Sequence[WaitingResult]) -> None:
        """`held`: the held results of one lane of a shard."""
        record = held[0].record
        if all(map(self._is_held, held)) or audits_lag(self.run, record.shard, record.epoch):
            return
        verdict, gone = self.state.held[key_of(record)], {key_of(one.record) for one in held}
        self.set(held={key: other for key, other in self.state.held.items() if key not in gone})
        self._accept_checked(record, verdict)

    def finish_proofs(self) -> None:
        """Accept the doubted results whose training was replayed."""
        for proved, verdict in ready_proofs(self):
            self._accept(proved.record, verdict)
            note_proof(self, proved.record, proved)

    def _dismiss(self, record: CheckpointRecord, verdict: Verdict, final: bool = False) -> None:
        candidate = self.run.shards[record.shard].candidates[record.owner, record.digest]
        again_at = None
        if verdict.outcome == "inconclusive" and not final and candidate.attempts + 1 < self.rules.attempts:
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
        if self.rules.manifest.team:
            gather(self, record, verdict)
            return
        acceptance = acceptance_of(self.rules, record, shard.term, verdict.loss, self.now)
        build = build_of(record, self.rules.manifest)
        note_success(self, record)
        self.write(
            CheckpointAccepted(
                time=self.now, acceptance=acceptance, parent_loss=verdict.parent_loss, build=build, costs=verdict.costs,
                note=verdict.text,
            )
        )  # fmt: skip
        if not verdict.text:  # else its whole epoch is replayed, before or after
            consider_audit(self, record)
        self.actions.append(Publish(acceptance, record))
        supersede(self, record.shard, record.digest)
