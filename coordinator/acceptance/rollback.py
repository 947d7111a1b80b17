"""Candidates whose base changes: a lineage is rolled back, a peer is quarantined, or a lost fact is recovered."""

from __future__ import annotations

from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.messages import DiscardCandidate, PublishReset
from lutetia.coordinator.acceptance.transition import JudgeRules, JudgeTransition, refusal
from lutetia.coordinator.ledger.events import (
    AcceptanceRecovered,
    AuditDue,
    AuditReason,
    Event,
    LineageRolledBack,
    MixtureStitched,
    PeerQuarantined,
    QuarantineRecovered,
    ResetRecovered,
    RollbackReason,
)
from lutetia.coordinator.ledger.run_state import AcceptedEpoch, RunState
from lutetia.protocol.schema.records import AcceptanceRecord, ResetRecord


def note_fact(transition: JudgeTransition, event: Event) -> None:
    """Write a fact from outside. The judge may have gone on since it was found; then it is out of date and dropped."""
    match event:
        case MixtureStitched():
            if transition.run.is_current(event):
                transition.write(event)
        case AcceptanceRecovered(acceptance=given):
            _recover(transition, event, given.shard, (given.term, given.epoch))
        case ResetRecovered():
            _recover(transition, event, event.shard, (event.term, 0))
        case LineageRolledBack():
            _roll_back_asked(transition, event)
        case QuarantineRecovered():
            if event.owner not in transition.run.quarantined:
                quarantine(transition, event)
                for again in re_audits(transition.run, event.owner, transition.now):
                    transition.write(again)
        case _:
            transition.write(event)


def _recover(
    transition: JudgeTransition, event: AcceptanceRecovered | ResetRecovered, shard: int, place: tuple[int, int]
) -> None:
    ledger = transition.run.shards[shard]
    if place > (ledger.term, ledger.epoch):
        move_shard(transition, shard, event)


def _roll_back_asked(transition: JudgeTransition, event: LineageRolledBack) -> None:
    """The run's operator wants the shard at an earlier epoch. What was accepted since the event was made is void, too."""
    shard = transition.run.shards[event.shard]
    if (
        shard.term + 1 == event.term
        and event.epoch < shard.epoch
        and can_roll_back(transition.run, event.shard, event.checkpoint)
    ):
        roll_back(transition, event.shard, event.epoch, event.checkpoint, event.why)


def roll_back(transition: JudgeTransition, shard: int, epoch: int, checkpoint: str, why: RollbackReason = "invalid") -> None:
    """The shard goes on from `epoch`, in a new term; `checkpoint` is the oldest void result. Other shards are not touched."""
    ledger = transition.run.shards[shard]
    event = LineageRolledBack(
        time=transition.now, shard=shard, epoch=epoch, term=ledger.term + 1, dropped=ledger.epoch - epoch, checkpoint=checkpoint,
        why=why,
    )  # fmt: skip
    move_shard(transition, shard, event)
    transition.actions.append(PublishReset(standing(transition.rules, transition.run, shard, transition.now)))


def standing(rules: JudgeRules, run: RunState, shard: int, now: float) -> AcceptanceRecord | ResetRecord:
    """What the coordinator publishes of a shard: its accepted epoch, or that it is at its beginning again."""
    ledger = run.shards[shard]
    if ledger.acceptance is not None:
        return ledger.acceptance
    return ResetRecord(run=rules.manifest.run_id, owner=rules.coordinator, issued=now, shard=shard, term=ledger.term)


def move_shard(transition: JudgeTransition, shard: int, event: LineageRolledBack | AcceptanceRecovered | ResetRecovered) -> None:
    """`event` moves the shard to another epoch: its candidates have lost their parent and are discarded."""
    waiting = [candidate.record for candidate in transition.run.shards[shard].candidates.values()]
    transition.write(event)
    _forget_check(transition, shard)
    transition.actions += [DiscardCandidate(record) for record in waiting]
    transition.tidy(shard)


def quarantine(transition: JudgeTransition, event: PeerQuarantined | QuarantineRecovered) -> None:
    """Quarantine a peer and refuse all its candidates."""
    transition.write(event)
    for index in sorted(transition.state.pending):
        waiting = transition.run.shards[index].candidates.get(event.owner)
        if waiting:
            why = Verdict("invalid", "quarantine", "its author was quarantined meanwhile")
            transition.write(refusal(waiting.record, why, transition.now))
            _forget_check(transition, index, event.owner)
            transition.actions.append(DiscardCandidate(waiting.record))
            transition.tidy(index)


def can_roll_back(run: RunState, shard: int, checkpoint: str) -> bool:
    """Whether the lineage can be rolled back to before this accepted epoch."""
    ledger = run.shards[shard]
    link = ledger.link(checkpoint)
    return link is not None and (link.acceptance.epoch == 1 or ledger.before(link) is not None)


def due_audit(run: RunState, shard: int, checkpoint: str, now: float, whole: bool, why: AuditReason) -> AuditDue:
    """The event that an accepted epoch is to be replayed."""
    link = run.shards[shard].link(checkpoint)
    assert link is not None
    given = link.acceptance
    return AuditDue(
        time=now, shard=shard, epoch=given.epoch, owner=given.author, checkpoint=checkpoint,
        streak=run.peer(given.author).streak, whole=whole, why=why,
    )  # fmt: skip


def re_audits(run: RunState, owner: str, now: float) -> list[AuditDue]:
    """Audits of the whole epoch for everything that a convicted peer did before, oldest first, where a rollback can follow."""
    earlier = [
        (link.at, shard, link.acceptance.checkpoint)
        for shard in run.shards
        for link in run.shards[shard].lineage
        if link.acceptance.author == owner and _needs_re_audit(run, shard, link)
    ]
    return [due_audit(run, shard, checkpoint, now, True, "re-audit") for _, shard, checkpoint in sorted(earlier)]


def _needs_re_audit(run: RunState, shard: int, link: AcceptedEpoch) -> bool:
    """Not while a replay of the whole epoch is due already, nor where no rollback could follow."""
    known = run.audits.get(link.acceptance.checkpoint)
    return (known is None or not known.whole) and can_roll_back(run, shard, link.acceptance.checkpoint)


def _forget_check(transition: JudgeTransition, shard: int, owner: str | None = None) -> None:
    checking = transition.state.checking
    if shard in checking and owner in (None, checking[shard][0]):
        transition.set(checking={k: v for k, v in checking.items() if k != shard})
