"""Which epochs are replayed whole, and what a conviction leaves of the work that others have built on the faked epoch."""

from __future__ import annotations

import pytest

from benchmarks.attacks.time_bomb import time_bomb
from lutetia.cli.status_table import shard_reason, stall_lines
from lutetia.coordinator.acceptance.audit_comparison import AuditFinding, unproved_depth
from lutetia.coordinator.acceptance.audit_policy import audits_lag
from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.intake.newcomer_holds import NEWCOMER_EPOCHS
from lutetia.coordinator.acceptance.messages import Audited, CheckDone, JudgeTick
from lutetia.coordinator.acceptance.rollback import KEPT_DEPTH, weigh_lineage
from lutetia.coordinator.ledger.describe import sentence
from lutetia.coordinator.ledger.events import AuditDue, LineageKept, LineageRolledBack, LineageSuspected, Outcome
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.run_state import HISTORY, RunState
from lutetia.coordinator.ledger.status_builder import LiveView, status
from lutetia.coordinator.web.page import render_page
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import AuditPolicy
from lutetia.protocol.schema.verdicts import CheckName
from tests.coordinator.acceptance.judge_driver import PEERS, JudgeDriver, drive_judge, make_record

CHEAT, HONEST, OTHER = PEERS[0], PEERS[1], PEERS[2]


def accept(driver: JudgeDriver, peer: Identity, loss: float) -> str:
    """`peer`'s next epoch of shard 0 is accepted; the digest."""
    ledger = driver.state.run.shards[0]
    record = make_record(driver.manifest, peer, 0, ledger.epoch + 1, ledger.accepted)
    assert driver.offer(record).verdict == "queued"
    driver.send(CheckDone(record, Verdict("valid", "holdout", "", loss, 1.0), driver.now))
    driver.now += 60
    return record.digest


def buried(depth: int = KEPT_DEPTH, better: bool = True) -> tuple[JudgeDriver, str]:
    """An honest epoch, one of the cheat whose audit is due, and `depth` honest ones on it."""
    driver = drive_judge(shards=1, epochs=200)
    accept(driver, HONEST, 0.9)
    driver.finish_audit("valid")
    faked = accept(driver, CHEAT, 0.9)
    for index in range(depth):
        accept(driver, OTHER, 0.8 - index / 1000 if better else 0.9)
    return driver, faked


def finish_audits(driver: JudgeDriver, outcome: Outcome) -> None:
    """All due replays of whole epochs end with `outcome`, those of first steps are valid."""
    while driver.state.auditing:
        whole = driver.state.run.audits[driver.state.auditing].whole
        driver.finish_audit(outcome if whole else "valid", driver.state.auditing)


def events(driver: JudgeDriver, kind: type) -> list:
    return [event for event in driver.events if isinstance(event, kind)]


# --- who is audited whole ---------------------------------------------------------------------------------------------------


def test_first_epochs_of_a_newcomer_are_replayed_whole():
    driver = drive_judge(shards=1, epochs=50, audit=AuditPolicy(whole_epoch=0.001))
    for _ in range(NEWCOMER_EPOCHS + 2):
        accept(driver, HONEST, 0.9)
    due = events(driver, AuditDue)
    assert [event.whole for event in due] == [True] * NEWCOMER_EPOCHS + [False] * 2
    assert due[0].why == "newcomer"
    assert "its author is new" in sentence(due[0])


def test_newcomers_are_replayed_before_authors_with_proved_epochs():
    driver = drive_judge(shards=1, epochs=50, audit=AuditPolicy(whole_epoch=0.001))
    accept(driver, HONEST, 0.9)
    driver.finish_audit("valid")
    running = accept(driver, HONEST, 0.9)
    accept(driver, HONEST, 0.9)
    newcomer = accept(driver, CHEAT, 0.9)
    driver.finish_audit("valid", running)
    assert driver.state.auditing == newcomer, "though an older audit is due"


def test_author_convicted_or_in_doubt_is_a_newcomer_again():
    driver = drive_judge(shards=1, epochs=50, audit=AuditPolicy(whole_epoch=0.001))
    for _ in range(NEWCOMER_EPOCHS):
        accept(driver, HONEST, 0.9)
        driver.finish_audit("valid")
    assert driver.state.run.peer(HONEST.public_key).proved == NEWCOMER_EPOCHS
    doubted = accept(driver, HONEST, 0.9)
    driver.send(Audited(doubted, AuditFinding(outcome="inconclusive", doubt=True), driver.now))
    assert driver.state.run.peer(HONEST.public_key).proved == 0


def test_share_of_whole_replays_grows_with_the_depth_of_unproved_work():
    """Each author has a long record, so that nothing else asks for a replay."""
    driver = drive_judge(shards=1, epochs=1000, audit=AuditPolicy(streak=1, replay_steps=0, whole_epoch=0.05))
    for _ in range(300):
        accept(driver, HONEST, 0.9)
        while driver.state.auditing:
            driver.finish_audit("valid", driver.state.auditing)
    by_depth = [event.epoch for event in events(driver, AuditDue) if event.why == "depth"]
    gaps = [later - earlier for earlier, later in zip(by_depth, by_depth[1:], strict=False)]
    assert len(by_depth) >= 5
    assert max(gaps) < 80, "none stays without for long"
    assert unproved_depth(driver.state.run.shards[0]) < 80


# --- what a conviction drops ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "better"), [(0, True), (KEPT_DEPTH - 1, True), (KEPT_DEPTH, False)])
def test_little_or_worse_work_on_a_faked_epoch_is_dropped_with_it(depth: int, better: bool):
    driver, faked = buried(depth, better)
    driver.finish_audit("invalid", faked)
    assert [event.epoch for event in events(driver, LineageRolledBack)] == [1]
    assert not events(driver, LineageSuspected)


def test_good_work_on_a_faked_epoch_is_kept_once_replays_prove_it():
    driver, faked = buried()
    driver.finish_audit("invalid", faked)
    assert CHEAT.public_key in driver.state.run.quarantined
    assert driver.state.run.shards[0].suspects == (faked,)
    assert [event.epoch for event in events(driver, AuditDue) if event.why == "lineage"] == [4, 5, 6], "the newest"
    finish_audits(driver, "valid")
    assert not events(driver, LineageRolledBack)
    [kept] = events(driver, LineageKept)
    assert (kept.epoch, kept.checkpoint) == (2, faked)
    assert "4 epochs stand on it, 2 of them were replayed whole and valid" in sentence(kept)
    shard = driver.state.run.shards[0]
    assert (shard.epoch, shard.term, shard.suspects) == (6, 0, ())


def test_suspected_lineage_is_in_the_status_the_page_and_run_why():
    driver, faked = buried()
    driver.finish_audit("invalid", faked)
    shown = status(driver.state.run, driver.manifest, LiveView(), driver.now)
    [found] = [stall for stall in shown.stalls if stall.kind == "lineage"]
    assert (found.shard, found.epoch, found.owner, shown.stalled_shards) == (0, 2, CHEAT.public_key, ())
    assert "4 epochs stand on it. They are kept if replays prove them good; 3 are due" in found.why
    assert "goes back to epoch 1 by itself" in found.remedy
    reason = shard_reason(shown, 0, driver.now)
    assert reason["suspected"] == found.why
    for text in (reason["text"], render_page(shown), " ".join(stall_lines(shown, driver.now))):
        assert "An audit found epoch 2" in text
    finish_audits(driver, "valid")
    assert not status(driver.state.run, driver.manifest, LiveView(), driver.now).stalls


@pytest.mark.parametrize("outcome", ["invalid", "inconclusive"])
def test_work_that_no_replay_proves_is_dropped(outcome):
    driver, faked = buried()
    driver.finish_audit("invalid", faked)
    for _ in range(3 * driver.rules.audit_attempts):
        finish_audits(driver, outcome)
        driver.now += 4000
        driver.send(JudgeTick(driver.now))
    assert events(driver, LineageRolledBack)[-1].epoch == 1
    assert driver.state.run.shards[0].suspects == ()
    assert not events(driver, LineageKept)


def test_convicted_epoch_that_is_kept_is_not_audited_again():
    driver, faked = buried()
    driver.finish_audit("invalid", faked)
    finish_audits(driver, "valid")
    assert not [event for event in events(driver, AuditDue) if event.why == "re-audit" and event.checkpoint == faked]
    assert not driver.state.run.audits.get(faked)


def test_suspected_epoch_does_not_leave_the_history_undecided():
    driver, faked = buried()
    driver.finish_audit("invalid", faked)
    assert not audits_lag(driver.state.run, 0, HISTORY)
    assert audits_lag(driver.state.run, 0, HISTORY + 1)
    assert weigh_lineage(driver.state.run, 0, faked)[0] == "open"


def test_restart_in_between_decides_the_same():
    driver, faked = buried()
    driver.finish_audit("invalid", faked)
    state = RunState()
    for event in driver.events:
        state = apply(state, event)
    assert state == driver.state.run


@pytest.mark.parametrize("honest_first", [0, 3])
def test_time_bomb_voids_no_honest_epoch(honest_first: int):
    """A newcomer is caught at once; a cheater that begins honestly fakes an epoch in each shard, and convicts itself later."""
    found = time_bomb(shards=3, epochs=24, honest_first=honest_first)
    assert found.accepted >= 60
    assert found.lost == 0
    assert found.lazy >= (3 if honest_first else 1)


# --- refusals of several authors on one parent ------------------------------------------------------------------------------


def crafted_parent() -> JudgeDriver:
    """Epoch 1 passed an audit of its first steps; honest work on it will be refused."""
    driver = drive_judge(epochs=9, audit=AuditPolicy(whole_epoch=0.0))
    driver.accept(CHEAT)
    driver.finish_audit("valid")
    return driver


def refuse(driver: JudgeDriver, peer, check: CheckName = "raw", outcome: Outcome = "invalid", text: str = "") -> None:
    record = make_record(driver.manifest, peer, 0, 2, driver.state.run.shards[0].accepted, text=text)
    assert driver.offer(record).verdict == "queued"
    driver.send(CheckDone(record, Verdict(outcome, check, "worse than its parent"), driver.now))


def whole_audits(driver: JudgeDriver) -> list[AuditDue]:
    return [event for event in driver.events if isinstance(event, AuditDue) and event.whole]


@pytest.mark.parametrize("check", ["numbers", "holdout", "raw"])
def test_two_authors_refused_make_the_parent_due_whole(check):
    driver = crafted_parent()
    refuse(driver, HONEST, check)
    assert not whole_audits(driver)
    refuse(driver, OTHER, check)
    [due] = whole_audits(driver)
    assert (due.why, due.epoch, due.owner) == ("refusals", 1, CHEAT.public_key)
    assert "results of several authors that were built on it were refused" in sentence(due)
    assert driver.audits[-1].audit.whole, "the coordinator replays the whole epoch"
    driver.finish_audit("invalid")
    assert [event.epoch for event in driver.events if isinstance(event, LineageRolledBack)] == [0]


def test_one_author_refused_twice_proves_nothing():
    driver = crafted_parent()
    refuse(driver, HONEST)
    refuse(driver, HONEST, text="another try")
    assert not whole_audits(driver)


@pytest.mark.parametrize(("check", "outcome"), [("format", "invalid"), ("transfer", "inconclusive")])
def test_refusals_that_say_nothing_of_the_parent_do_not_count(check, outcome):
    driver = crafted_parent()
    refuse(driver, HONEST)
    refuse(driver, OTHER, check, outcome)
    assert not whole_audits(driver)


def test_each_parent_is_audited_for_this_once():
    driver = crafted_parent()
    for peer in (HONEST, OTHER, PEERS[3]):
        refuse(driver, peer)
    driver.finish_audit("valid")
    refuse(driver, PEERS[4])
    assert len(whole_audits(driver)) == 1


def test_running_replay_of_first_steps_does_not_settle_the_whole_epoch():
    driver = drive_judge(epochs=9, audit=AuditPolicy(whole_epoch=0.0))
    parent = driver.accept(CHEAT)
    assert not driver.audits[-1].audit.whole
    for peer in (HONEST, OTHER):
        refuse(driver, peer)
    driver.send(Audited(parent.digest, AuditFinding(outcome="valid"), driver.now, whole=False))
    assert driver.audits[-1].audit.whole
    assert driver.state.run.audits[parent.digest].whole
    assert driver.state.auditing == parent.digest
