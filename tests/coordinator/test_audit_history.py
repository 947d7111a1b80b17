"""Audits that fall behind: no result is accepted that would push a due audit out of the history that convictions need."""

from __future__ import annotations

from lutetia.coordinator.messages import Audit, Audited
from lutetia.protocol.audits import Finding
from lutetia.protocol.events import LineageRolledBack
from lutetia.protocol.ledger_state import HISTORY

from .courtroom import PEERS, Court, court, make_record


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
    oldest = next(action.audit for action in room.actions if isinstance(action, Audit))
    assert oldest.epoch == 1
    room.hears(Audited(oldest.checkpoint, Finding(outcome="valid"), room.now))
    head = room.state.run.shards[0]
    record = make_record(room.manifest, PEERS[0], epoch=reached + 1, parent=head.accepted)
    assert room.offer(record).verdict == "queued"


def test_the_oldest_audit_that_is_due_can_still_roll_its_lineage_back() -> None:
    room = court(shards=1, epochs=4 * HISTORY)
    accept_until_busy(room)
    for outcome in ("valid", "valid", "invalid"):
        audit = [action.audit for action in room.actions if isinstance(action, Audit)][-1]
        room.hears(Audited(audit.checkpoint, Finding(outcome=outcome), room.now))
    rolled = [event for event in room.events if isinstance(event, LineageRolledBack)]
    assert [event.epoch for event in rolled] == [2]
    assert room.state.run.shards[0].epoch == 2
