"""What is in judgement when the ground under it moves: a lineage falls, a peer is quarantined, or lost words are taken back."""

from __future__ import annotations

from dataclasses import replace

from ..protocol.events import (
    AcceptanceRecovered,
    Event,
    LineageRolledBack,
    MixtureStitched,
    PeerQuarantined,
    QuarantineRecovered,
    ResetRecovered,
)
from .ladder import Verdict
from .messages import Discard
from .turn import Turn, refusal


def noted(turn: Turn, event: Event) -> None:
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
        case _:
            turn.write(event)


def _take_back(turn: Turn, event: AcceptanceRecovered | ResetRecovered, shard: int, place: tuple[int, int]) -> None:
    ledger = turn.run.shards[shard]
    if place > (ledger.term, ledger.epoch):
        move(turn, shard, event)


def move(turn: Turn, shard: int, event: LineageRolledBack | AcceptanceRecovered | ResetRecovered) -> None:
    """`event` puts the shard elsewhere: what is in judgement there stands on nothing any more."""
    waiting = [candidate.record for candidate in turn.run.shards[shard].candidates.values()]
    turn.write(event)
    _forget_check(turn, shard)
    turn.actions += [Discard(record) for record in waiting]
    turn.tidy(shard)


def quarantine(turn: Turn, event: PeerQuarantined | QuarantineRecovered) -> None:
    """What the peer has in judgement is refused."""
    turn.write(event)
    for index in sorted(turn.state.pending):
        waiting = turn.run.shards[index].candidates.get(event.owner)
        if waiting:
            why = Verdict("invalid", "quarantine", "its author was quarantined meanwhile")
            turn.write(refusal(waiting.record, why, turn.now))
            _forget_check(turn, index, event.owner)
            turn.actions.append(Discard(waiting.record))
            turn.tidy(index)


def _forget_check(turn: Turn, shard: int, owner: str | None = None) -> None:
    checking = turn.state.checking
    if shard in checking and owner in (None, checking[shard][0]):
        turn.state = replace(turn.state, checking={k: v for k, v in checking.items() if k != shard})
