"""A verdict counts under the version of the manifest by which it was reached: the owner's remedy reaches who was refused."""

from __future__ import annotations

from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.messages import CheckDone, LedgerFacts
from lutetia.coordinator.ledger.events import ManifestPublished
from tests.coordinator.acceptance.judge_driver import PEERS, START, JudgeDriver, drive_judge, make_record

WORSE = Verdict("invalid", "numbers", "a norm is out of bounds", rules=1)


def publish(driver: JudgeDriver, version: int) -> None:
    event = ManifestPublished(time=driver.now, version=version, digest="c" * 64, expires=START + 1e6)
    driver.send(LedgerFacts((event,), driver.now))


def test_a_refused_result_is_checked_again_under_newer_rules():
    driver = drive_judge()
    publish(driver, 1)
    record = make_record(driver.manifest, PEERS[0])
    driver.offer(record)
    driver.send(CheckDone(record, WORSE, driver.now))
    assert driver.offer(record).verdict == "invalid", "remembered under the same rules"
    publish(driver, 2)
    assert driver.offer(record).verdict == "queued"
    driver.verdict(record)
    assert driver.state.run.shards[0].accepted == record.digest


def test_a_refusal_under_replaced_rules_is_not_written_down():
    driver = drive_judge()
    record = make_record(driver.manifest, PEERS[0])
    driver.offer(record)
    publish(driver, 2)
    driver.send(CheckDone(record, WORSE, driver.now))
    assert [check.record for check in driver.checks] == [record, record], "it is checked again at once"
    assert driver.state.run.rejected == 0


def test_a_superseded_result_stays_superseded_under_newer_rules():
    driver = drive_judge()
    first, late = make_record(driver.manifest, PEERS[0]), make_record(driver.manifest, PEERS[1])
    driver.offer(first)
    driver.offer(late)
    driver.verdict(first)
    publish(driver, 2)
    assert driver.offer(late).verdict == "superseded"
