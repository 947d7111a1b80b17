"""Audits that lag: no result is accepted that would push a due audit out of the history that a rollback needs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lutetia.coordinator.acceptance.audit_comparison import AuditFinding
from lutetia.coordinator.acceptance.messages import Audited, AuditWanted, JudgeTick, LendAudit, StartAudit
from lutetia.coordinator.ledger.events import AuditDone, AuditDue, CheckpointAccepted, LineageRolledBack
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.run_state import HISTORY
from lutetia.protocol.schema.records import AcceptanceRecord
from tests.coordinator.acceptance.judge_driver import COORDINATOR, PEERS, JudgeDriver, drive_judge, make_record

CHEAT, HONEST = PEERS[0], PEERS[1]


def accept_until_busy(driver: JudgeDriver) -> int:
    """Offer one epoch after the other without carrying out audits; returns the last accepted epoch."""
    for epoch in range(1, 3 * HISTORY):
        driver.now += 60
        record = make_record(driver.manifest, PEERS[0], epoch=epoch, parent=driver.state.run.shards[0].accepted)
        reply = driver.offer(record)
        if reply.verdict == "busy":
            assert "audits" in reply.text
            return epoch - 1
        driver.verdict(record)
    raise AssertionError("never busy")


def test_results_wait_while_audits_are_a_history_behind() -> None:
    driver = drive_judge(shards=1, epochs=4 * HISTORY)
    reached = accept_until_busy(driver)
    assert reached == HISTORY - 1
    oldest = next(action.audit for action in driver.actions if isinstance(action, StartAudit))
    assert oldest.epoch == 1
    driver.send(Audited(oldest.checkpoint, AuditFinding(outcome="valid"), driver.now))
    head = driver.state.run.shards[0]
    record = make_record(driver.manifest, PEERS[0], epoch=reached + 1, parent=head.accepted)
    assert driver.offer(record).verdict == "queued"


def test_the_oldest_due_audit_can_still_roll_back() -> None:
    driver = drive_judge(shards=1, epochs=4 * HISTORY)
    accept_until_busy(driver)
    for outcome in ("valid", "valid", "invalid"):
        audit = [action.audit for action in driver.actions if isinstance(action, StartAudit)][-1]
        driver.send(Audited(audit.checkpoint, AuditFinding(outcome=outcome), driver.now))
    rolled = [event for event in driver.events if isinstance(event, LineageRolledBack)]
    assert [event.epoch for event in rolled] == [2]
    assert driver.state.run.shards[0].epoch == 2


def full_history() -> JudgeDriver:
    """Shard 0 has a whole history, audited. Its epoch 2 is the cheat's, as is epoch 1 of shard 1, whose audit is running."""
    driver = drive_judge(shards=2, epochs=4 * HISTORY)
    for epoch in range(1, HISTORY + 1):
        driver.now += 60
        driver.accept(CHEAT if epoch == 2 else HONEST)
        if driver.state.run.audits:
            driver.finish_audit("valid")
    driver.accept(CHEAT, 1)
    return driver


def test_a_re_audit_of_an_old_epoch_puts_off_acceptances() -> None:
    driver = full_history()
    waiting = make_record(driver.manifest, HONEST, 0, HISTORY + 1, driver.state.run.shards[0].accepted)
    assert driver.offer(waiting).verdict == "queued"
    driver.finish_audit("invalid")
    due = driver.audits[-1]
    assert (due.audit.shard, due.audit.epoch) == (0, 2), "audited again"
    driver.verdict(waiting)
    assert driver.state.run.shards[0].epoch == HISTORY, "put off"
    checks = len(driver.checks)
    driver.send(JudgeTick(driver.now + 5))
    assert len(driver.checks) == checks, "and it is not checked in the meantime"
    assert driver.offer(waiting).verdict == "queued"
    driver.finish_audit("valid", due.audit.checkpoint)
    assert driver.checks[-1].record == waiting
    driver.verdict(waiting)
    assert driver.state.run.shards[0].accepted == waiting.digest


def test_a_put_off_result_is_dropped_by_a_rollback() -> None:
    driver = full_history()
    waiting = make_record(driver.manifest, HONEST, 0, HISTORY + 1, driver.state.run.shards[0].accepted)
    driver.offer(waiting)
    driver.finish_audit("invalid")
    driver.verdict(waiting)
    driver.finish_audit("invalid")
    shard = driver.state.run.shards[0]
    assert (shard.epoch, shard.term, shard.candidates) == (1, 1, {})
    assert not driver.state.checking
    assert not driver.state.pending


def too_old_audit() -> tuple[JudgeDriver, str]:
    """A state as ledgers of earlier versions may give it: an audit is due whose parent is no longer in the history."""
    driver = full_history()
    driver.finish_audit("valid")
    shard = driver.state.run.shards[0]
    old = shard.lineage[1].acceptance
    assert shard.acceptance
    events = [
        AuditDue(
            time=driver.now, shard=0, epoch=2, owner=old.author, checkpoint=old.checkpoint, streak=0, whole=True, why="re-audit"
        ),
        CheckpointAccepted(time=driver.now, acceptance=following(shard.acceptance), parent_loss=0.4),
    ]  # fmt: skip
    run = driver.state.run
    for event in events:
        run = apply(run, event)
    driver.state = replace(driver.state, run=run)
    return driver, old.checkpoint


def following(given: AcceptanceRecord) -> AcceptanceRecord:
    change = {"epoch": given.epoch + 1, "parent": given.checkpoint, "checkpoint": "f" * 64, "owner": COORDINATOR.public_key}
    return given.model_copy(update=change)


@pytest.mark.parametrize("how", ["before its replay", "after its replay", "by a peer"])
def test_an_audit_too_old_for_a_rollback_is_closed(how: str) -> None:
    driver, checkpoint = too_old_audit()
    replays = len(driver.audits)
    if how == "by a peer":
        driver.state = replace(driver.state, auditing="e" * 64)  # the coordinator is busy with another one
        lent = driver.send(AuditWanted(PEERS[3].public_key, driver.now))
        assert [action.audit for action in lent if isinstance(action, LendAudit)] == [None]
    elif how == "after its replay":
        driver.state = replace(driver.state, auditing=checkpoint)
        driver.finish_audit("valid", checkpoint)
    else:
        driver.send(JudgeTick(driver.now))
    assert len(driver.audits) == replays, "it is not replayed"
    done = [event for event in driver.events if isinstance(event, AuditDone)][-1]
    assert (done.checkpoint, done.outcome, done.again_at) == (checkpoint, "inconclusive", None)
    assert not driver.state.run.audits
    assert driver.state.run.shards[0].link(checkpoint).audit == "inconclusive"  # pyright: ignore[reportOptionalMemberAccess]
    driver.now += 60
    assert driver.offer(make_record(driver.manifest, HONEST, 0, HISTORY + 2, "f" * 64)).verdict == "queued"
