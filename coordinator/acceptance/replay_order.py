"""Which replay comes first: those that a result waits for go before audits of what is accepted. Pure.

The coordinator replays up to three epochs at a time, each in a process of its own: a doubted result, an audit that the proof of
one waits for, and another audit. So a proof waits for no audit that is running already, and strangers, whose doubts cost nothing,
delay each other's proofs alone: known authors come first, and audits keep their process. There, too, come first those that the
proof of a known author waits for, as several shards may have doubted results, then those for which a result is held.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lutetia.coordinator.acceptance.intake.newcomer_holds import holds_up
from lutetia.coordinator.acceptance.transition import JudgeRules, JudgeState
from lutetia.coordinator.ledger.run_state import HISTORY, PendingAudit, RunState, ShardLedger, WaitingResult

AuditRank = tuple[int, int, bool, float, str]


def doubted_results(run: RunState, shards: Iterable[int]) -> list[WaitingResult]:
    """The results that wait for a proof, in the order of their proofs: known authors first, then the longest waiting."""
    waiting = [one for index in sorted(shards) for one in run.shards[index].candidates.values() if one.doubt]
    return sorted(waiting, key=lambda one: (not _known(one), one.seen, one.record.owner))


def awaited_audits(run: RunState, doubted: WaitingResult) -> Iterator[PendingAudit]:
    """The due audits that the proof of this result waits for: that of its parent, and those without which nothing is accepted."""
    shard, epoch = doubted.record.shard, doubted.record.epoch
    for audit in run.audits.values():
        if audit.shard == shard and (audit.checkpoint in _parents(run.shards[shard]) or epoch - audit.epoch > HISTORY - 2):
            yield audit


def next_for_proof(run: RunState, state: JudgeState, doubted: WaitingResult, now: float) -> PendingAudit | None:
    """The oldest of these audits that may be started now: no other process carries it out, and it is not put off."""
    ready = [one for one in awaited_audits(run, doubted) if one.checkpoint != state.auditing and one.not_before <= now]
    return min(ready, key=lambda audit: audit.epoch, default=None)


def holds_up_a_proof(run: RunState, audit: PendingAudit, strangers: bool = False) -> bool:
    """Whether the proof of a result of a known author, or also of `strangers`, waits for this audit."""
    candidates = run.shards[audit.shard].candidates.values()
    if not candidates:
        return False
    doubted = [one for one in candidates if one.doubt and (strangers or _known(one))]
    return any(audit in awaited_audits(run, one) for one in doubted)


def is_waited_for(rules: JudgeRules, run: RunState, audit: PendingAudit) -> bool:
    """Whether a result waits for its end: then the coordinator carries it out at once, also while a peer has it."""
    return holds_up_a_proof(run, audit) or holds_up(run, rules.manifest, audit, rules.newcomer_epochs)


def audit_rank(rules: JudgeRules, run: RunState, audit: PendingAudit) -> AuditRank:
    """Place of an audit among those that the coordinator carries out itself; the lowest comes first."""
    waits = 0 if holds_up_a_proof(run, audit) else 1 if is_waited_for(rules, run, audit) else 2
    return waits, audit.attempts, run.peer(audit.owner).proved > 0, audit.since, audit.checkpoint


def loan_rank(run: RunState, audit: PendingAudit) -> tuple[bool, float, str]:
    """Place of an audit among those that peers may take."""
    return not holds_up_a_proof(run, audit, strangers=True), audit.since, audit.checkpoint


def _parents(shard: ShardLedger) -> set[str]:
    """The digest of the accepted checkpoint, or of the results from which it was merged."""
    makers = shard.lineage[-1].makers if shard.lineage else ()
    return {shard.accepted or "", *(maker.acceptance.checkpoint for maker in makers)}


def _known(waiting: WaitingResult) -> bool:
    return waiting.doubt is not None and waiting.doubt.why == "author"
