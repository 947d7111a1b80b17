"""Results under the owner's orders: a paused run accepts none and loses none, a banned peer's are refused."""

from __future__ import annotations

from dataclasses import replace

from lutetia.coordinator.acceptance.messages import AuditWanted, DiscardCandidate, JudgeTick, LendAudit
from lutetia.coordinator.ledger.events import CheckpointAccepted, ResultRefused
from lutetia.protocol.schema.manifest_upgrade import next_version
from lutetia.protocol.schema.owner.orders import Order, OwnerOrders, with_order
from tests.coordinator.acceptance.judge_driver import PEERS, JudgeDriver, drive_judge, make_record


def order(driver: JudgeDriver, *orders: Order) -> None:
    """The owner's next manifest, as the coordinator adopts it."""
    given = driver.rules.manifest.orders
    for each in orders:
        given = with_order(given, each, driver.now)
    newer = next_version(driver.rules.manifest, {"orders": given.model_dump(mode="json")}, driver.now)
    driver.rules = replace(driver.rules, manifest=newer)
    driver.send(JudgeTick(driver.now))


def accepted(driver: JudgeDriver) -> list[str]:
    return [event.acceptance.checkpoint for event in driver.events if isinstance(event, CheckpointAccepted)]


def test_paused_run_answers_a_new_result_busy_and_writes_nothing():
    driver = drive_judge()
    order(driver, Order("pause", text="moving house"))
    before = len(driver.events)
    reply = driver.offer(make_record(driver.manifest, PEERS[0]))
    assert (reply.verdict, reply.retry_after) == ("busy", driver.manifest.timing.lease)
    assert "paused by its owner: moving house" in reply.text
    assert len(driver.events) == before
    order(driver, Order("resume"))
    assert driver.offer(make_record(driver.manifest, PEERS[0])).verdict == "queued"


def test_result_whose_checks_end_in_a_pause_is_accepted_when_the_run_goes_on():
    driver = drive_judge()
    record = make_record(driver.manifest, PEERS[0])
    driver.offer(record)
    order(driver, Order("pause"))
    driver.verdict(record, 0.5)
    driver.now += 1e6
    driver.send(JudgeTick(driver.now))
    assert not accepted(driver)
    assert driver.offer(record).verdict == "queued", "its author is told that it waits"
    order(driver, Order("resume"))
    assert accepted(driver) == [record.digest]


def test_result_that_arrives_in_a_pause_is_checked_afterwards():
    driver = drive_judge()
    driver.arrives = False
    record = make_record(driver.manifest, PEERS[0])
    driver.offer(record)
    order(driver, Order("pause"))
    driver.arrived(record)
    assert not driver.checks
    order(driver, Order("resume"))
    assert [check.record for check in driver.checks] == [record]


def test_banned_peers_results_are_refused_and_what_it_had_accepted_stays():
    driver = drive_judge()
    first = driver.accept(PEERS[0])
    waiting = make_record(driver.manifest, PEERS[0], shard=1)
    driver.offer(waiting)
    order(driver, Order("ban", PEERS[0].public_key, "it copies results"))
    refused = [event for event in driver.events if isinstance(event, ResultRefused)]
    assert [(event.checkpoint, event.check) for event in refused] == [(waiting.digest, "quarantine")]
    assert DiscardCandidate(waiting) in driver.actions
    reply = driver.offer(make_record(driver.manifest, PEERS[0], epoch=2, parent=first.digest))
    assert (reply.verdict, reply.check) == ("invalid", "quarantine")
    assert reply.text == "the run's owner has banned this peer: it copies results"
    assert driver.state.run.shards[0].accepted == first.digest
    driver.send(AuditWanted(PEERS[0].public_key, driver.now))
    lent = driver.actions[-1]
    assert isinstance(lent, LendAudit)
    assert (lent.audit, lent.retry_after) == (None, 3600.0)
    order(driver, Order("unban", PEERS[0].public_key))
    assert driver.offer(make_record(driver.manifest, PEERS[0], epoch=2, parent=first.digest)).verdict == "queued"


def test_late_verdict_on_a_banned_peers_result_accepts_nothing():
    driver = drive_judge()
    record = make_record(driver.manifest, PEERS[0])
    driver.offer(record)
    order(driver, Order("pause"))
    driver.verdict(record, 0.5)
    order(driver, Order("ban", PEERS[0].public_key), Order("resume"))
    assert not accepted(driver)
    assert OwnerOrders().refusal_of(PEERS[0].public_key) == ""
