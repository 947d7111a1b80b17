"""Keeps an unexpected error in judging one stimulus from ending the coordinator. Pure.

The judge is meant to raise nothing. Where it does all the same, the one result or audit that it was about is answered as
inconclusive, the state stays what it was, and every other result is judged as before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lutetia.coordinator.acceptance.audit_comparison import AuditFinding
from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.intake.fetch_queue import key_of
from lutetia.coordinator.acceptance.messages import (
    Action,
    Answer,
    AuditDelivered,
    Audited,
    AuditWanted,
    CheckDone,
    FetchDone,
    JudgeTick,
    LedgerFacts,
    LendAudit,
    LimitsKnown,
    Merged,
    Offered,
    Proved,
    Stimulus,
)
from lutetia.coordinator.acceptance.state_machine import judge
from lutetia.coordinator.acceptance.transition import JudgeRules, JudgeState, released
from lutetia.protocol.claims import slot_of
from lutetia.protocol.rpc.checkpoint_offer import OfferReply

_ASK_AGAIN_SECONDS = 60.0


@dataclass(frozen=True)
class Judgement:
    """What `judge` decided on one stimulus. With `error`, it raised, and state and actions are those of the fallback."""

    state: JudgeState
    actions: tuple[Action, ...]
    error: Exception | None = None


def judge_isolated(rules: JudgeRules, state: JudgeState, stimulus: Stimulus) -> Judgement:
    """`judge`, except that an error on what a peer sent makes only that inconclusive.

    Raises what `judge` raises on facts of the coordinator's own (`LedgerFacts`, `LimitsKnown`): nobody else can be at fault.
    """
    try:
        return Judgement(*judge(rules, state, stimulus))
    except Exception as error:  # a peer can reach any defect of the judge, and must not end the coordinator by it
        if isinstance(stimulus, LedgerFacts | LimitsKnown):
            raise
        return _fallback(rules, state, stimulus, error)


def author_of(stimulus: Stimulus) -> str:
    """Public key of the peer that the stimulus is about; empty when it is about none."""
    match stimulus:
        case Offered(record=record) | FetchDone(record=record) | CheckDone(record=record) | Proved(record=record):
            return record.owner
        case AuditWanted(owner=owner) | AuditDelivered(owner=owner):
            return owner
        case _:
            return ""


def _fallback(rules: JudgeRules, state: JudgeState, stimulus: Stimulus, error: Exception) -> Judgement:
    text = f"the coordinator failed to judge this ({type(error).__name__}); its log says more"
    match stimulus:
        case Offered():
            return Judgement(state, (Answer(OfferReply(verdict="inconclusive", text=text)),), error)
        case AuditWanted():
            return Judgement(state, (LendAudit(None, retry_after=_ASK_AGAIN_SECONDS),), error)
        case FetchDone(record=record, now=now):
            verdict, fetching = Verdict("inconclusive", "transfer", text), state.fetching - {key_of(record)}
            return _again(rules, state, FetchDone(record, verdict, now), replace(state, fetching=fetching), error)
        case CheckDone(record=record, now=now):
            checking = {slot: held for slot, held in state.checking.items() if slot != slot_of(record.shard, record.lane)}
            verdict = Verdict("inconclusive", "transfer", text)
            return _again(rules, state, CheckDone(record, verdict, now), replace(state, checking=checking), error)
        case Audited(checkpoint=checkpoint):
            finding = AuditFinding(outcome="inconclusive", text=text)
            freed = replace(state, **released(state, checkpoint))
            return _again(rules, state, replace(stimulus, finding=finding), freed, error)
        case Proved():
            finding = AuditFinding(outcome="inconclusive", text=text)
            return _again(rules, state, replace(stimulus, finding=finding), replace(state, proving=None), error)
        case AuditDelivered(checkpoint=checkpoint):
            lent = {lent: to for lent, to in state.lent.items() if lent != checkpoint}
            return Judgement(replace(state, lent=lent), (), error)
        case Merged(shard=shard):
            return Judgement(replace(state, merging={k: v for k, v in state.merging.items() if k != shard}), (), error)
        case JudgeTick() | LedgerFacts() | LimitsKnown():
            return Judgement(state, (), error)


def _again(rules: JudgeRules, state: JudgeState, plainer: Stimulus, freed: JudgeState, error: Exception) -> Judgement:
    """Judge an inconclusive outcome instead; if that fails too, only release the place that the work held."""
    try:
        return Judgement(*judge(rules, state, plainer), error=error)
    except Exception:  # noqa: BLE001 - the caller logs the first error; a second one must not end the coordinator either
        return Judgement(freed, (), error)
