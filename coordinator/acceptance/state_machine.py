"""The coordinator's decisions: `judge(rules, state, stimulus) -> (state, actions)`, with no clock, socket or chance of its own.

Two promises hold whatever comes in, in whatever order: never two acceptances of one (shard, epoch), and never an acceptance
that did not climb the whole ladder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import assert_never

from lutetia.coordinator.acceptance.audit_policy import audited, audits_lag, build_of, consider, delivered, lend, start_audit
from lutetia.coordinator.acceptance.checks import Verdict, entitled, lineage, sizes
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
    Publish,
    StartCheck,
    Stimulus,
)
from lutetia.coordinator.acceptance.rollback import noted
from lutetia.coordinator.acceptance.transition import JudgeRules, JudgeState, JudgeTransition, refusal
from lutetia.coordinator.ledger.events import (
    BaselineMeasured,
    CheckpointAccepted,
    QuarantineRecovered,
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
    """Everything that follows from `stimulus`; actions are to be carried out in order."""
    turn = _Turn(rules, state, stimulus.now)
    match stimulus:
        case Offered():
            turn.actions.append(Answer(turn.offered(stimulus)))
        case CheckDone():
            turn.checked(stimulus.record, stimulus.verdict)
        case LimitsKnown():
            turn.state = replace(turn.state, limits=stimulus.limits)
        case Audited():
            audited(turn, stimulus)
        case AuditWanted():
            turn.wanted(stimulus)
        case AuditDelivered():
            delivered(turn, stimulus)
        case JudgeTick():
            turn.forget_offers()
        case LedgerFacts():
            for event in stimulus.events:
                noted(turn, event)
        case _:
            assert_never(stimulus)
    turn.start_checks()
    start_audit(turn)
    return turn.state, tuple(turn.actions)


class _Turn(JudgeTransition):
    """One call of `judge`."""

    # offers

    def offered(self, offer: Offered) -> OfferReply:
        record, manifest = offer.record, self.rules.manifest
        shard = self.state.run.shards.get(record.shard)
        if shard is None:
            return OfferReply(verdict="invalid", rung="lineage", text=f"the run has no shard {record.shard}")
        if offer.via == "offer" and (wait := self._over_rate(record.owner)):
            return OfferReply(verdict="busy", text="too many offers from this peer", retry_after=wait)
        if record.owner in self.run.quarantined:
            return OfferReply(verdict="invalid", rung="quarantine", text=_why_quarantined(self.run, record.owner))
        reply = _standing(self.state.run, shard, record)
        if reply and not (reply.verdict == "inconclusive" and self._may_try_again(shard, offer)):
            return reply
        if record.epoch > shard.epoch + 1:
            text = f"epoch {record.epoch - 1} of shard {record.shard} is not accepted yet"
            return OfferReply(verdict="busy", text=text, retry_after=self.rules.retry_delay)
        if bad := entitled(record, manifest) or lineage(record, shard, manifest) or self._oversized(record):
            # nothing is written: it costs a stranger nothing, and would grow the ledger with every throw-away identity
            return OfferReply(verdict="invalid", rung=bad.rung, text=bad.text)
        if audits_lag(self.run, record.shard, record.epoch):
            text = f"audits of shard {record.shard} are {HISTORY - 2} epochs behind; results wait until they have caught up"
            return OfferReply(verdict="busy", text=text, retry_after=self.rules.retry_delay)
        if record.owner in shard.candidates or len(shard.candidates) >= self._places(offer):
            text = f"a result for epoch {record.epoch} of shard {record.shard} is still being judged"
            return OfferReply(verdict="busy", text=text, retry_after=self.rules.retry_delay)
        self.write(ResultSeen(time=self.now, record=record, via=offer.via))
        self.state = replace(self.state, pending=self.state.pending | {record.shard})
        return OfferReply(verdict="queued")

    def _places(self, offer: Offered) -> int:
        """Records in the DHT cost their authors nothing and come from no address: they never take all the places of a shard."""
        return self.rules.candidates_per_shard // (1 if offer.via == "offer" else 2)

    def _may_try_again(self, shard: ShardLedger, offer: Offered) -> bool:
        """A result that was given up as inconclusive is taken up again when its owner insists, after a while."""
        given_up = shard.judged[offer.record.owner, offer.record.digest]
        return offer.via == "offer" and self.now - given_up.time >= self._patience

    @property
    def _patience(self) -> float:
        return self.rules.retry_after(self.rules.attempts)

    def wanted(self, stimulus: AuditWanted) -> None:
        if wait := self._over_rate(stimulus.owner):
            self.actions.append(LendAudit(None, retry_after=wait))
        else:
            lend(self, stimulus)

    def _over_rate(self, owner: str) -> float | None:
        """Seconds to wait when `owner` offered too often within the last minute; counts this offer otherwise."""
        recent = tuple(moment for moment in self.state.offers.get(owner, ()) if moment > self.now - _MINUTE)
        if len(recent) >= self.rules.offers_per_minute:
            return recent[0] + _MINUTE - self.now
        self.state = replace(self.state, offers=self.state.offers.set(owner, (*recent, self.now)))
        return None

    def _oversized(self, record: CheckpointRecord) -> Verdict | None:
        """Known at once as soon as the limits are; until then such a result waits with the others."""
        return sizes(record, self.state.limits[record.shard]) if self.state.limits else None

    def forget_offers(self) -> None:
        """Peers that have been silent for a minute cost no memory."""
        begin = self.now - _MINUTE
        if any(moments[-1] <= begin for moments in self.state.offers.values()):
            kept: PersistentMap[str, tuple[float, ...]] = PersistentMap()
            for owner, moments in self.state.offers.items():
                if moments[-1] > begin:
                    kept = kept.set(owner, moments)
            self.state = replace(self.state, offers=kept)

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
            if record.owner in self.run.quarantined:  # by a word that was taken back into the ledger before it was read here
                self._dismissed(record, Verdict("invalid", "quarantine", "its author was quarantined meanwhile"))
                continue
            if record.shard in self.state.checking or audits_lag(self.run, record.shard, record.epoch):
                continue
            if bad := sizes(record, limits[record.shard]):
                self._dismissed(record, bad)
                continue
            checking = {**self.state.checking, record.shard: (record.owner, record.digest)}
            self.state = replace(self.state, checking=checking)
            self.actions.append(StartCheck(record, self.state.run.shards[record.shard].parent_loss))
            free -= 1

    def _ready(self) -> Iterator[WaitingResult]:
        for index in sorted(self.state.pending - self.state.checking.keys()):
            for candidate in self.state.run.shards[index].candidates.values():
                if candidate.not_before <= self.now:
                    yield candidate

    def checked(self, record: CheckpointRecord, verdict: Verdict) -> None:
        if self.state.checking.get(record.shard) != (record.owner, record.digest):
            return  # not what we asked for: a late answer from before a restart of the workshop
        self.state = replace(self.state, checking={k: v for k, v in self.state.checking.items() if k != record.shard})
        shard = self.state.run.shards[record.shard]
        if record.epoch == 1 and shard.baseline is None and verdict.parent_loss is not None:
            self.write(BaselineMeasured(time=self.now, shard=record.shard, loss=verdict.parent_loss))
        if verdict.outcome != "valid":
            self._dismissed(record, verdict)
        elif not audits_lag(self.run, record.shard, record.epoch):
            self._accepted(record, verdict)
        # else a conviction made an old epoch due again: the result waits, and is checked anew once the audits have caught up

    def _dismissed(self, record: CheckpointRecord, verdict: Verdict) -> None:
        candidate = self.state.run.shards[record.shard].candidates[record.owner]
        again_at = None
        if verdict.outcome == "inconclusive" and candidate.attempts + 1 < self.rules.attempts:
            again_at = self.now + self.rules.retry_after(candidate.attempts)
        self.write(refusal(record, verdict, self.now, again_at))
        if again_at is None:
            self.actions.append(DiscardCandidate(record))
        self.tidy(record.shard)

    def _accepted(self, record: CheckpointRecord, verdict: Verdict) -> None:
        shard = self.state.run.shards[record.shard]
        if (
            record.epoch != shard.epoch + 1
            or record.parent != shard.accepted
            or verdict.loss is None
            or verdict.parent_loss is None
        ):
            raise AssertionError(f"the ladder let through epoch {record.epoch} on epoch {shard.epoch} of shard {record.shard}")
        acceptance = _acceptance(self.rules, record, shard.term, verdict.loss, self.now)
        build = build_of(record, self.rules.manifest)
        self.write(
            CheckpointAccepted(
                time=self.now, acceptance=acceptance, parent_loss=verdict.parent_loss, build=build, costs=verdict.costs
            )
        )
        consider(self, record)
        self.actions.append(Publish(acceptance, record))
        for other in tuple(self.state.run.shards[record.shard].candidates.values()):
            late = other.record
            self.write(
                ResultSuperseded(
                    time=self.now, shard=late.shard, epoch=late.epoch, owner=late.owner, checkpoint=late.digest, by=record.digest
                )
            )
            self.actions.append(DiscardCandidate(late))
        self.tidy(record.shard)


def _why_quarantined(run: RunState, owner: str) -> str:
    why = run.quarantined[owner]
    if isinstance(why, QuarantineRecovered):
        return f"this peer is quarantined: {why.text}; ask the run's operator"
    what = f"an audit found its epoch {why.epoch} of shard {why.shard} invalid ({why.text[:600]})"
    return f"this peer is quarantined: {what}; ask the run's operator"


def _standing(run: RunState, shard: ShardLedger, record: CheckpointRecord) -> OfferReply | None:
    """How a result stands that is decided or waiting already; None for a new one."""
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
            return OfferReply(verdict=refusal.verdict, rung=refusal.rung, text=refusal.text)
        case ResultSuperseded():
            return OfferReply(verdict="superseded")
    return None


def _acceptance(rules: JudgeRules, record: CheckpointRecord, term: int, loss: float, now: float) -> AcceptanceRecord:
    return AcceptanceRecord(
        run=record.run, owner=rules.coordinator, issued=now, shard=record.shard, epoch=record.epoch, checkpoint=record.digest,
        parent=record.parent, weights=record.weights, state=record.state, samples=record.samples, author=record.owner,
        tenure_until=now + rules.manifest.timing.tenure, holdout_loss=loss, term=term,
    )  # fmt: skip
