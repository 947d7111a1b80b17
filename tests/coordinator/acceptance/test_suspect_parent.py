"""Refusals of several authors on one parent make the parent's whole epoch due for an audit, once."""

from __future__ import annotations

import pytest

from lutetia.coordinator.acceptance.audit_comparison import AuditFinding
from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.messages import Audited, CheckDone
from lutetia.coordinator.ledger.describe import sentence
from lutetia.coordinator.ledger.events import AuditDue, LineageRolledBack, Outcome
from lutetia.protocol.schema.manifest import AuditPolicy
from lutetia.protocol.schema.verdicts import CheckName
from tests.coordinator.acceptance.judge_driver import PEERS, JudgeDriver, drive_judge, make_record

CRAFTED, ONE, OTHER, THIRD = PEERS[0], PEERS[1], PEERS[2], PEERS[3]


def crafted_parent() -> JudgeDriver:
    """Epoch 1 passed an audit of its first steps; honest work on it will be refused."""
    driver = drive_judge(epochs=9, audit=AuditPolicy(whole_epoch=0.0))
    driver.accept(CRAFTED)
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
    refuse(driver, ONE, check)
    assert not whole_audits(driver)
    refuse(driver, OTHER, check)
    [due] = whole_audits(driver)
    assert (due.why, due.epoch, due.owner) == ("refusals", 1, CRAFTED.public_key)
    assert "results of several authors that were built on it were refused" in sentence(due)
    assert driver.audits[-1].audit.whole, "the coordinator replays the whole epoch"
    driver.finish_audit("invalid")
    assert [event.epoch for event in driver.events if isinstance(event, LineageRolledBack)] == [0]


def test_one_author_refused_twice_proves_nothing():
    driver = crafted_parent()
    refuse(driver, ONE)
    refuse(driver, ONE, text="another try")
    assert not whole_audits(driver)


@pytest.mark.parametrize(("check", "outcome"), [("format", "invalid"), ("transfer", "inconclusive")])
def test_refusals_that_say_nothing_of_the_parent_do_not_count(check, outcome):
    driver = crafted_parent()
    refuse(driver, ONE)
    refuse(driver, OTHER, check, outcome)
    assert not whole_audits(driver)


def test_each_parent_is_audited_for_this_once():
    driver = crafted_parent()
    for peer in (ONE, OTHER, THIRD):
        refuse(driver, peer)
    driver.finish_audit("valid")
    refuse(driver, PEERS[4])
    assert len(whole_audits(driver)) == 1


def test_running_replay_of_first_steps_does_not_settle_the_whole_epoch():
    driver = drive_judge(epochs=9, audit=AuditPolicy(whole_epoch=0.0))
    parent = driver.accept(CRAFTED)
    assert not driver.audits[-1].audit.whole
    for peer in (ONE, OTHER):
        refuse(driver, peer)
    driver.send(Audited(parent.digest, AuditFinding(outcome="valid"), driver.now, whole=False))
    assert driver.audits[-1].audit.whole
    assert driver.state.run.audits[parent.digest].whole
    assert driver.state.auditing == parent.digest
