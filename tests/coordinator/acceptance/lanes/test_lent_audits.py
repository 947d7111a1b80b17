"""Audits of lanes that are lent to peers: what is lent, to whom, and what a report does."""

from __future__ import annotations

import pytest

from lutetia.coordinator.acceptance.audit_comparison import AuditFinding
from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.messages import AuditDelivered, AuditWanted, LendAudit, Merged
from lutetia.coordinator.ledger.events import AuditDone, AuditReported
from lutetia.coordinator.runtime.audit_service import job_of
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import AuditPolicy
from tests.coordinator.acceptance.judge_driver import COORDINATOR, PEERS, make_record
from tests.coordinator.acceptance.lanes.lanes_driver import LanesDriver

WHOLE = AuditPolicy(streak=10, replay_steps=2, whole_epoch=1.0)
AUDITOR, OTHER = Identity.derived("auditor"), Identity.derived("other auditor")


def lane_driver() -> LanesDriver:
    """Three lanes are gathered, of which lane 0 is being replayed by the coordinator; a peer asked for audits before."""
    driver = LanesDriver(audit=WHOLE, quorum=1.0)
    ask(driver, AUDITOR)
    for lane in (0, 1, 3):
        driver.result(lane)
    return driver


def ask(driver: LanesDriver, peer: Identity, *related: Identity) -> LendAudit:
    wanted = AuditWanted(peer.public_key, driver.judge.now, frozenset(one.public_key for one in related))
    return next(action for action in driver.judge.send(wanted) if isinstance(action, LendAudit))


def deliver(driver: LanesDriver, peer: Identity, checkpoint: str, outcome: str) -> None:
    finding = AuditFinding.model_validate({"outcome": outcome, "text": "step 2: 0.7 and 0.9"})
    driver.judge.send(AuditDelivered(peer.public_key, checkpoint, finding, 2.0, driver.judge.now))


def test_each_lane_is_lent_once_with_its_own_steps_and_not_to_its_author() -> None:
    driver = lane_driver()
    lent = [ask(driver, peer, *related).audit for peer, related in ((PEERS[0], ()), (AUDITOR, ()), (OTHER, (PEERS[3],)))]
    lanes = [audit.audit.lane if audit else None for audit in lent]
    assert lanes == [1, 0, None], "to the author of lane 0 another; lane 3 not to a relative of its author"
    third = ask(driver, Identity.derived("third")).audit
    assert third
    manifest, job = driver.judge.manifest, job_of(third, 1.0, driver.judge.manifest)
    assert (job.lane, job.steps) == (3, manifest.lane_steps(3)), "half a share"
    assert job.steps < manifest.lane_steps(0)
    assert job.end_state == third.link.acceptance.state


@pytest.mark.parametrize("trusted", [False, True])
def test_valid_report_on_a_lane_counts_at_once_from_a_trusted_auditor_alone(trusted: bool) -> None:
    driver = lane_driver()
    run = driver.judge.state.run
    if trusted:
        peers = run.peers.set(AUDITOR.public_key, run.peer(AUDITOR.public_key).updated(trust=10**9))
        driver.with_run(peers=peers)
    lent = ask(driver, AUDITOR).audit
    assert lent
    deliver(driver, OTHER, lent.audit.checkpoint, "valid")
    assert lent.audit.checkpoint in driver.judge.state.run.audits, "it was not lent to that peer"
    deliver(driver, AUDITOR, lent.audit.checkpoint, "valid")
    event = next(event for event in reversed(driver.judge.events) if isinstance(event, AuditDone | AuditReported))
    assert isinstance(event, AuditDone) == trusted
    assert (event.by, event.owner) == (AUDITOR.public_key, PEERS[lent.audit.lane].public_key)
    steps = driver.judge.manifest.lane_steps(lent.audit.lane)
    assert event.samples == steps * driver.judge.manifest.optimisation.batch, "its credit is that of the lane's share"
    assert driver.shard.gathered[lent.audit.lane].audit == ("valid" if trusted else "due")


def test_reported_liar_is_convicted_after_the_merge_by_the_coordinators_own_replay_alone() -> None:
    driver = lane_driver()
    driver.result(2)
    driver.merged()
    lent = ask(driver, AUDITOR).audit
    assert lent
    liar = lent.audit.lane
    deliver(driver, AUDITOR, lent.audit.checkpoint, "invalid")
    run = driver.judge.state.run
    assert (run.quarantined, driver.shard.term) == ({}, 0), "no peer is convicted by another peer's report"
    driver.judge.finish_audit("invalid", lent.audit.checkpoint)
    assert driver.judge.state.run.quarantined.keys() == {PEERS[liar].public_key}
    assert (driver.shard.epoch, driver.shard.term, sorted(driver.shard.gathered)) == (0, 1, sorted({0, 1, 2, 3} - {liar}))
    assert driver.judge.state.run.peer(AUDITOR.public_key).trust == 1
    driver.tick()
    again = driver.merges()[-1]
    driver.judge.send(
        Merged(
            0, tuple(source.acceptance.checkpoint for source in again.sources),
            make_record(driver.judge.manifest, COORDINATOR, text="again"), Verdict("valid", "holdout", "", 0.39, 0.5),
            driver.judge.now,
        )
    )  # fmt: skip
    assert driver.shard.epoch == 1
    assert lent.audit.checkpoint not in driver.judge.state.run.audits


def test_report_on_a_lane_that_was_left_out_changes_nothing() -> None:
    driver = LanesDriver(audit=WHOLE, quorum=0.75)
    ask(driver, AUDITOR)
    for lane in range(3):
        driver.result(lane)
    driver.result(3)  # while the merge of the others is made
    lent = [ask(driver, Identity.derived(f"auditor {number}")).audit for number in range(4)]
    [late] = [(number, one.audit.checkpoint) for number, one in enumerate(lent) if one and one.audit.lane == 3]
    driver.merged()
    before = len(driver.judge.events)
    deliver(driver, Identity.derived(f"auditor {late[0]}"), late[1], "invalid")
    assert len(driver.judge.events) == before
    assert ask(driver, Identity.derived(f"auditor {late[0]}")).audit is None
