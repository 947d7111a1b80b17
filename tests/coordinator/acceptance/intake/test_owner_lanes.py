"""Several lanes of one owner: each result counts, and many of them take no place that others would have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.intake.fetch_queue import LANES_OF_OWNER, key_of
from lutetia.coordinator.acceptance.intake.rate_limits import may_become_candidate
from lutetia.coordinator.acceptance.messages import CheckDone
from lutetia.coordinator.acceptance.rollback import quarantine
from lutetia.coordinator.acceptance.transition import JudgeTransition
from lutetia.coordinator.ledger.events import PeerQuarantined, read_event
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.capabilities import LANES
from lutetia.protocol.schema.manifest import AuditPolicy
from lutetia.protocol.schema.model.team_spec import TeamSpec
from lutetia.protocol.schema.records import CheckpointRecord
from tests.coordinator.acceptance.judge_driver import PEERS, JudgeDriver, drive_judge, make_record

MINE, OTHER = PEERS[:2]


def drive_lanes(lanes: int = 16, **rules: object) -> JudgeDriver:
    team, audit = TeamSpec(lanes=lanes, quorum=1.0), AuditPolicy(streak=1, replay_steps=0, whole_epoch=0.0)
    return drive_judge(epochs=4, team=team, needs=(LANES,), audit=audit, rules=rules)


def results(driver: JudgeDriver, lanes: Iterator[int] | range, peer=MINE, shard: int = 0) -> list[CheckpointRecord]:
    """Results of one peer in these lanes, which are all offered."""
    made = [make_record(driver.manifest, peer, shard, text=f"{lane}", lane=lane) for lane in lanes]
    for record in made:
        assert driver.offer(record, origin="198.51.100.1").verdict == "queued"
    return made


def test_results_of_two_lanes_of_one_owner_wait_and_count_side_by_side() -> None:
    driver = drive_lanes(checks_at_once=1)
    first, second = results(driver, range(2))
    again = make_record(driver.manifest, MINE, 0, text="another", lane=1)
    assert driver.offer(again).verdict == "busy", "one of each lane"
    assert not may_become_candidate(driver.state.run, again)
    assert may_become_candidate(driver.state.run, make_record(driver.manifest, MINE, 0, lane=2))
    driver.verdict(first)
    driver.verdict(second)
    shard = driver.state.run.shards[0]
    assert {lane: link.acceptance.checkpoint for lane, link in shard.gathered.items()} == {0: first.digest, 1: second.digest}
    assert driver.state.run.peer(MINE.public_key).accepted == 2
    state = RunState()
    for event in driver.events:
        state = apply(state, read_event(canonical(event)))
    assert state == driver.state.run


def test_refused_lane_leaves_the_other_of_its_owner_alone() -> None:
    driver = drive_lanes()
    first, second = results(driver, range(2))
    refused = make_record(driver.manifest, MINE, 0, text="2", lane=2)
    driver.refuse(refused)
    assert [one.record for one in driver.state.run.shards[0].undecided_of(MINE.public_key)] == [first, second]
    caught = PeerQuarantined(time=driver.now, owner=MINE.public_key, shard=0, epoch=1, checkpoint=refused.digest)
    transition = JudgeTransition(driver.rules, driver.state, driver.now)
    quarantine(transition, caught)
    assert not transition.run.shards[0].candidates
    assert not transition.state.checking


def test_same_files_of_two_owners_are_two_results() -> None:
    driver = drive_lanes()
    [own] = results(driver, range(1))
    copy = own.model_copy(update={"owner": OTHER.public_key, "peer_id": OTHER.peer_id})
    assert copy.digest == own.digest
    assert driver.offer(copy).verdict == "queued"
    assert len(driver.state.run.shards[0].candidates) == 2


@pytest.mark.parametrize("known", [False, True])
def test_many_lanes_of_one_owner_take_one_fetch_and_no_check_before_others(known: bool) -> None:
    driver = drive_lanes(checks_at_once=2)
    for peer, lane in ((MINE, 14), (OTHER, 15)) if known else ():
        [accepted] = results(driver, range(lane, lane + 1), peer, shard=1)
        driver.verdict(accepted)
    driver.arrives = False
    crowd = results(driver, range(LANES_OF_OWNER))
    assert driver.state.fetching == {key_of(crowd[0])}
    beyond = make_record(driver.manifest, MINE, 0, text="beyond", lane=LANES_OF_OWNER)
    assert driver.offer(beyond).verdict == "busy"
    for record in crowd[:4]:  # each is fetched when the one before it has arrived
        assert driver.state.fetching == {key_of(record)}
        driver.arrived(record)
    assert len(driver.state.checking) == 2
    honest = make_record(driver.manifest, OTHER, 0, lane=9)
    assert driver.offer(honest, origin="203.0.113.7").verdict == "queued"
    driver.arrived(honest)
    driver.send(CheckDone(crowd[0], Verdict("inconclusive", "holdout", "the worker process ended"), driver.now))
    assert (honest.owner, honest.digest) in driver.state.checking.values(), "before the owner's third result"
