"""Candidates whose base changes: a lineage is rolled back, a peer is quarantined, or a lost fact is recovered."""

from __future__ import annotations

from typing import Literal, TypedDict

from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.messages import DiscardCandidate, PublishReset
from lutetia.coordinator.acceptance.transition import JudgeRules, JudgeTransition, refusal
from lutetia.coordinator.ledger.events import (
    AcceptanceRecovered,
    AuditDue,
    AuditReason,
    Event,
    LaneDropped,
    LineageKept,
    LineageRolledBack,
    LineageSuspected,
    MixtureStitched,
    PeerQuarantined,
    QuarantineRecovered,
    ResetRecovered,
    RollbackReason,
)
from lutetia.coordinator.ledger.run_state import AcceptedEpoch, RunState
from lutetia.protocol.claims import shard_and_lane
from lutetia.protocol.schema.records import AcceptanceRecord, ResetRecord

KEPT_DEPTH, KEPT_PROOFS = 4, 2
"""Epochs that must stand on an invalid one, and whole replays among them that must be valid, for the lineage to be kept."""


class _EpochFields(TypedDict):
    shard: int
    epoch: int
    owner: str
    checkpoint: str


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
        why=why, kept=_merged_again(transition.run, shard, epoch + 1, checkpoint) if why == "invalid" else (),
    )  # fmt: skip
    move_shard(transition, shard, event)
    transition.actions.append(PublishReset(standing(transition.rules, transition.run, shard, transition.now)))


def _merged_again(run: RunState, shard: int, epoch: int, checkpoint: str) -> tuple[str, ...]:
    """The digests of the results of an epoch's other lanes, which are gathered again when one of them proves invalid."""
    link = next((link for link in run.shards[shard].lineage if link.acceptance.epoch == epoch), None)
    sources = link.sources if link else ()
    return tuple(
        source.acceptance.checkpoint
        for source in sources
        if source.acceptance.checkpoint != checkpoint and source.acceptance.author not in run.quarantined
    )


def weigh_lineage(run: RunState, shard: int, checkpoint: str) -> tuple[Literal["kept", "open", "void"], str]:
    """What becomes of the accepted epochs that stand on an invalid one, and why.

    They are kept if they have proved to be good work: there are at least KEPT_DEPTH of them, the held-out loss at their end is
    lower than before the invalid epoch, and of at least KEPT_PROOFS of them, by authors who are not quarantined, a replay of the
    whole epoch was valid. The question is open while replays that may still prove it are due.
    In a run with lanes they are not kept: the invalid result is taken out, and the epoch is merged again without it.
    """
    ledger = run.shards[shard]
    link = ledger.link(checkpoint)
    assert link is not None
    assert ledger.acceptance is not None
    before = ledger.before(link)
    base, loss = before.acceptance.holdout_loss if before else ledger.baseline, ledger.acceptance.holdout_loss
    above = [other for other in ledger.lineage if other.acceptance.epoch > link.acceptance.epoch]
    if link.acceptance.lanes:
        return "void", f"lane {link.lane} is taken out of its merge"
    if len(above) < KEPT_DEPTH:
        return "void", f"only {len(above)} epochs stand on it"
    if base is None or not loss < base:
        return "void", f"the held-out loss {loss:.5f} is not lower than before it"
    honest = [other for other in above if other.acceptance.author not in run.quarantined]
    proofs = sum(other.whole and other.audit == "valid" for other in honest)
    text = f"{len(above)} epochs stand on it, {proofs} of them were replayed whole and valid, and the held-out loss fell from "
    if proofs >= KEPT_PROOFS:
        return "kept", text + f"{base:.5f} to {loss:.5f}"
    due = sum((known := run.audits.get(other.acceptance.checkpoint)) is not None and known.whole for other in honest)
    return ("open" if proofs + due >= KEPT_PROOFS else "void"), text + f"{base:.5f} to {loss:.5f}"


def condemn(transition: JudgeTransition, shard: int, checkpoint: str) -> None:
    """Roll back to before this epoch, which an audit found invalid; or first have the newest epochs after it replayed whole.

    Only the newest can be replayed: the training states of older ones are not kept.
    """
    if transition.run.shards[shard].link(checkpoint) is None:
        return  # the result of a lane that was not merged: it was dropped with its author's quarantine
    if weigh_lineage(transition.run, shard, checkpoint)[0] != "kept" and not transition.rules.manifest.team:
        ledger = transition.run.shards[shard]
        epoch = next(link.acceptance.epoch for link in ledger.lineage if link.acceptance.checkpoint == checkpoint)
        above = [link for link in ledger.lineage if link.acceptance.epoch > epoch]
        if len(above) >= KEPT_DEPTH:
            for link in above[-KEPT_PROOFS - 1 :]:
                known = transition.run.audits.get(link.acceptance.checkpoint)
                if link.acceptance.author not in transition.run.quarantined and not (link.whole or (known and known.whole)):
                    given = link.acceptance.checkpoint
                    transition.write(due_audit(transition.run, shard, given, transition.now, True, "lineage"))
    _settle(transition, shard, checkpoint)


def settle_suspects(transition: JudgeTransition, shard: int) -> None:
    """After an audit of this shard: decide about the invalid epochs on which it stands, oldest first, where that is possible."""
    for checkpoint in transition.run.shards[shard].suspects:
        if checkpoint in transition.run.shards[shard].suspects:  # not rolled back meanwhile
            _settle(transition, shard, checkpoint)


def _settle(transition: JudgeTransition, shard: int, checkpoint: str) -> None:
    ledger = transition.run.shards[shard]
    link = ledger.link(checkpoint)
    assert link is not None
    outcome, text = weigh_lineage(transition.run, shard, checkpoint)
    given = link.acceptance
    facts: _EpochFields = {"shard": shard, "epoch": given.epoch, "owner": given.author, "checkpoint": checkpoint}
    if outcome == "void":
        roll_back(transition, shard, given.epoch - 1, checkpoint)
    elif outcome == "kept":
        transition.write(LineageKept(time=transition.now, **facts, text=text))
    elif checkpoint not in ledger.suspects:
        transition.write(LineageSuspected(time=transition.now, **facts))


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
    transition.set(merging={index: merging for index, merging in transition.state.merging.items() if index != shard})
    transition.actions += [DiscardCandidate(record) for record in waiting]
    transition.tidy(shard)


def quarantine(transition: JudgeTransition, event: PeerQuarantined | QuarantineRecovered) -> None:
    """Quarantine a peer, refuse all its candidates, and drop its results that wait for their merge."""
    transition.write(event)
    for index, ledger in transition.run.shards.items() if transition.rules.manifest.team else ():
        for lane, link in ledger.gathered.items():
            if link.acceptance.author == event.owner:
                dropped = link.acceptance
                transition.write(
                    LaneDropped(
                        time=transition.now,
                        shard=index,
                        epoch=dropped.epoch,
                        owner=event.owner,
                        checkpoint=dropped.checkpoint,
                        lane=lane,
                    )
                )
    for index in sorted(transition.state.pending):
        for waiting in transition.run.shards[index].undecided_of(event.owner):
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
        for link in run.shards[shard].trained
        if link.acceptance.author == owner and _needs_re_audit(run, shard, link)
    ]
    return [due_audit(run, shard, checkpoint, now, True, "re-audit") for _, shard, checkpoint in sorted(earlier)]


def _needs_re_audit(run: RunState, shard: int, link: AcceptedEpoch) -> bool:
    """Not what a replay of the whole epoch has decided, or is to decide, nor where no rollback could follow."""
    known = run.audits.get(link.acceptance.checkpoint)
    if link.audit == "invalid" or (link.whole and link.audit == "valid"):
        return False
    return (known is None or not known.whole) and can_roll_back(run, shard, link.acceptance.checkpoint)


def _forget_check(transition: JudgeTransition, shard: int, owner: str | None = None) -> None:
    """Checks of candidates of this shard do not count any more, of all or of one owner."""
    gone = {
        slot
        for slot, (author, _) in transition.state.checking.items()
        if shard_and_lane(slot)[0] == shard and owner in (None, author)
    }
    if gone:
        transition.set(checking={slot: held for slot, held in transition.state.checking.items() if slot not in gone})
