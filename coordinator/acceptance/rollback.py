"""What is in judgement when the ground under it moves: a lineage falls, a peer is quarantined, or lost words are taken back."""

from __future__ import annotations

from dataclasses import replace

from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.messages import DiscardCandidate
from lutetia.coordinator.acceptance.transition import JudgeTransition, refusal
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
)
from lutetia.coordinator.ledger.run_state import AcceptedEpoch, RunState


def noted(turn: JudgeTransition, event: Event) -> None:
    """A fact from outside. It was found or made beside the judge, who may have gone on meanwhile: then it is out of date."""
    match event:
        case MixtureStitched():
            if turn.run.stands(event):
                turn.write(event)
        case AcceptanceRecovered(acceptance=given):
            _take_back(turn, event, given.shard, (given.term, given.epoch))
        case ResetRecovered():
            _take_back(turn, event, event.shard, (event.term, 0))
        case QuarantineRecovered():
            if event.owner not in turn.run.quarantined:
                quarantine(turn, event)
                for again in re_audits(turn.run, event.owner, turn.now):
                    turn.write(again)
        case _:
            turn.write(event)


def _take_back(turn: JudgeTransition, event: AcceptanceRecovered | ResetRecovered, shard: int, place: tuple[int, int]) -> None:
    ledger = turn.run.shards[shard]
    if place > (ledger.term, ledger.epoch):
        move(turn, shard, event)


def move(turn: JudgeTransition, shard: int, event: LineageRolledBack | AcceptanceRecovered | ResetRecovered) -> None:
    """`event` puts the shard elsewhere: what is in judgement there stands on nothing any more."""
    waiting = [candidate.record for candidate in turn.run.shards[shard].candidates.values()]
    turn.write(event)
    _forget_check(turn, shard)
    turn.actions += [DiscardCandidate(record) for record in waiting]
    turn.tidy(shard)


def quarantine(turn: JudgeTransition, event: PeerQuarantined | QuarantineRecovered) -> None:
    """What the peer has in judgement is refused."""
    turn.write(event)
    for index in sorted(turn.state.pending):
        waiting = turn.run.shards[index].candidates.get(event.owner)
        if waiting:
            why = Verdict("invalid", "quarantine", "its author was quarantined meanwhile")
            turn.write(refusal(waiting.record, why, turn.now))
            _forget_check(turn, index, event.owner)
            turn.actions.append(DiscardCandidate(waiting.record))
            turn.tidy(index)


def can_fall(run: RunState, shard: int, checkpoint: str) -> bool:
    """Whether the lineage can be rolled back to before this accepted epoch."""
    ledger = run.shards[shard]
    link = ledger.link(checkpoint)
    return link is not None and (link.acceptance.epoch == 1 or ledger.before(link) is not None)


def due(run: RunState, shard: int, checkpoint: str, now: float, whole: bool, why: AuditReason) -> AuditDue:
    """The event that an accepted epoch is to be replayed."""
    link = run.shards[shard].link(checkpoint)
    assert link is not None
    given = link.acceptance
    facts = {"shard": shard, "epoch": given.epoch, "owner": given.author, "checkpoint": checkpoint}
    return AuditDue(time=now, **facts, streak=run.peer(given.author).streak, whole=whole, why=why)


def re_audits(run: RunState, owner: str, now: float) -> list[AuditDue]:
    """All that a convicted peer did before is looked at again whole, the oldest first, where something can follow from it."""
    earlier = [
        (link.at, shard, link.acceptance.checkpoint)
        for shard in run.shards
        for link in run.shards[shard].lineage
        if link.acceptance.author == owner and _worth_another_look(run, shard, link)
    ]
    return [due(run, shard, checkpoint, now, True, "re-audit") for _, shard, checkpoint in sorted(earlier)]


def _worth_another_look(run: RunState, shard: int, link: AcceptedEpoch) -> bool:
    """Not while a replay of the whole epoch is due already, nor where nothing could follow from one."""
    known = run.audits.get(link.acceptance.checkpoint)
    return (known is None or not known.whole) and can_fall(run, shard, link.acceptance.checkpoint)


def _forget_check(turn: JudgeTransition, shard: int, owner: str | None = None) -> None:
    checking = turn.state.checking
    if shard in checking and owner in (None, checking[shard][0]):
        turn.state = replace(turn.state, checking={k: v for k, v in checking.items() if k != shard})
