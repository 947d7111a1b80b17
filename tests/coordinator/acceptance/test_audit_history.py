"""Audits that fall behind: no result is accepted that would push a due audit out of the history that convictions need."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lutetia.coordinator.acceptance.audit_comparison import AuditFinding
from lutetia.coordinator.acceptance.messages import Audited, AuditWanted, JudgeTick, LendAudit, StartAudit
from lutetia.coordinator.ledger.events import AuditDone, AuditDue, CheckpointAccepted, LineageRolledBack
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.run_state import HISTORY
from lutetia.protocol.schema.records import AcceptanceRecord
from tests.coordinator.acceptance.judge_driver import COORDINATOR, PEERS, Court, court, make_record

CHEAT, HONEST = PEERS[0], PEERS[1]


def accept_until_busy(room: Court) -> int:
    """Offer one epoch after the other, whose audits nobody carries out; returns the last accepted epoch."""
    for epoch in range(1, 3 * HISTORY):
        room.now += 60
        record = make_record(room.manifest, PEERS[0], epoch=epoch, parent=room.state.run.shards[0].accepted)
        reply = room.offer(record)
        if reply.verdict == "busy":
            assert "audits" in reply.text
            return epoch - 1
        room.verdict(record)
    raise AssertionError("never busy")


def test_results_wait_when_the_audits_are_a_whole_history_behind() -> None:
    room = court(shards=1, epochs=4 * HISTORY)
    reached = accept_until_busy(room)
    assert reached == HISTORY - 1
    oldest = next(action.audit for action in room.actions if isinstance(action, StartAudit))
    assert oldest.epoch == 1
    room.hears(Audited(oldest.checkpoint, AuditFinding(outcome="valid"), room.now))
    head = room.state.run.shards[0]
    record = make_record(room.manifest, PEERS[0], epoch=reached + 1, parent=head.accepted)
    assert room.offer(record).verdict == "queued"


def test_the_oldest_audit_that_is_due_can_still_roll_its_lineage_back() -> None:
    room = court(shards=1, epochs=4 * HISTORY)
    accept_until_busy(room)
    for outcome in ("valid", "valid", "invalid"):
        audit = [action.audit for action in room.actions if isinstance(action, StartAudit)][-1]
        room.hears(Audited(audit.checkpoint, AuditFinding(outcome=outcome), room.now))
    rolled = [event for event in room.events if isinstance(event, LineageRolledBack)]
    assert [event.epoch for event in rolled] == [2]
    assert room.state.run.shards[0].epoch == 2


def full_history() -> Court:
    """Shard 0 has a whole history, audited; its epoch 2 and the first of shard 1, whose audit is under way, are the cheat's."""
    room = court(shards=2, epochs=4 * HISTORY)
    for epoch in range(1, HISTORY + 1):
        room.now += 60
        room.accept(CHEAT if epoch == 2 else HONEST)
        if room.state.run.audits:
            room.audited("valid")
    room.accept(CHEAT, 1)
    return room


def test_a_conviction_that_makes_an_old_epoch_due_again_puts_off_what_would_push_its_parent_out() -> None:
    room = full_history()
    waiting = make_record(room.manifest, HONEST, 0, HISTORY + 1, room.state.run.shards[0].accepted)
    assert room.offer(waiting).verdict == "queued"
    room.audited("invalid")
    due = room.audits[-1]
    assert (due.audit.shard, due.audit.epoch) == (0, 2), "looked at again"
    room.verdict(waiting)
    assert room.state.run.shards[0].epoch == HISTORY, "put off"
    checks = len(room.checks)
    room.hears(JudgeTick(room.now + 5))
    assert len(room.checks) == checks, "nor is it checked in vain meanwhile"
    assert room.offer(waiting).verdict == "queued"
    room.audited("valid", due.audit.checkpoint)
    assert room.checks[-1].record == waiting
    room.verdict(waiting)
    assert room.state.run.shards[0].accepted == waiting.digest


def test_what_was_put_off_falls_when_the_old_epoch_is_found_faked() -> None:
    room = full_history()
    waiting = make_record(room.manifest, HONEST, 0, HISTORY + 1, room.state.run.shards[0].accepted)
    room.offer(waiting)
    room.audited("invalid")
    room.verdict(waiting)
    room.audited("invalid")
    shard = room.state.run.shards[0]
    assert (shard.epoch, shard.term, shard.candidates) == (1, 1, {})
    assert not room.state.checking
    assert not room.state.pending


def beyond_help() -> tuple[Court, str]:
    """As ledgers of earlier versions may be: an audit is due whose parent is not in the history any more."""
    room = full_history()
    room.audited("valid")
    shard = room.state.run.shards[0]
    old = shard.lineage[1].acceptance
    assert shard.acceptance
    events = [
        AuditDue(
            time=room.now, shard=0, epoch=2, owner=old.author, checkpoint=old.checkpoint, streak=0, whole=True, why="re-audit"
        ),
        CheckpointAccepted(time=room.now, acceptance=following(shard.acceptance), parent_loss=0.4),
    ]  # fmt: skip
    run = room.state.run
    for event in events:
        run = apply(run, event)
    room.state = replace(room.state, run=run)
    return room, old.checkpoint


def following(given: AcceptanceRecord) -> AcceptanceRecord:
    change = {"epoch": given.epoch + 1, "parent": given.checkpoint, "checkpoint": "f" * 64, "owner": COORDINATOR.public_key}
    return given.model_copy(update=change)


@pytest.mark.parametrize("how", ["before its replay", "after its replay", "by a peer"])
def test_an_audit_from_which_nothing_could_follow_is_settled(how: str) -> None:
    room, checkpoint = beyond_help()
    replays = len(room.audits)
    if how == "by a peer":
        room.state = replace(room.state, auditing="e" * 64)  # the coordinator is busy with another one
        lent = room.hears(AuditWanted(PEERS[3].public_key, room.now))
        assert [action.audit for action in lent if isinstance(action, LendAudit)] == [None]
    elif how == "after its replay":
        room.state = replace(room.state, auditing=checkpoint)
        room.audited("valid", checkpoint)
    else:
        room.hears(JudgeTick(room.now))
    assert len(room.audits) == replays, "no replay is wasted on it"
    done = [event for event in room.events if isinstance(event, AuditDone)][-1]
    assert (done.checkpoint, done.outcome, done.again_at) == (checkpoint, "inconclusive", None)
    assert not room.state.run.audits
    assert room.state.run.shards[0].link(checkpoint).audit == "inconclusive"  # pyright: ignore[reportOptionalMemberAccess]
    room.now += 60
    assert room.offer(make_record(room.manifest, HONEST, 0, HISTORY + 2, "f" * 64)).verdict == "queued"
