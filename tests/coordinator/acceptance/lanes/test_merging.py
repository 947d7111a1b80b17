"""Lanes at the judge: results are gathered, merged, checked, and merged again without a liar."""

from dataclasses import replace

import pytest

from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.intake.rate_limits import may_become_candidate
from lutetia.coordinator.acceptance.messages import CheckDone, KeepResult, Merged, Publish
from lutetia.coordinator.acceptance.retention import needed_blobs
from lutetia.coordinator.ledger.events import LaneDropped, read_event
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.manifest import AuditPolicy
from lutetia.protocol.schema.owner.orders import PauseOrder
from tests.coordinator.acceptance.judge_driver import COORDINATOR, PEERS, START, make_record
from tests.coordinator.acceptance.lanes.lanes_driver import DEADLINE, LanesDriver, lanes_of


def test_quorum_of_lanes_is_merged_into_one_epoch_that_names_them() -> None:
    driver = LanesDriver()
    results = [driver.result(lane) for lane in (2, 0)]
    assert driver.judge.offer(results[0]).verdict == "gathered"
    assert not driver.merges()
    results.append(driver.result(3))  # three of four lanes are the quorum
    assert lanes_of(driver.merges()[0]) == [0, 2, 3]
    assert [action.record for action in driver.judge.actions if isinstance(action, KeepResult)] == results
    record = driver.merged()
    assert (driver.shard.epoch, driver.shard.accepted) == (1, record.digest)
    published = [action.acceptance for action in driver.judge.actions if isinstance(action, Publish)]
    assert [(given.author, given.lanes) for given in published] == [(COORDINATOR.public_key, (0, 2, 3))]
    late = make_record(driver.judge.manifest, PEERS[1], 0, 1, None, lane=1)
    reply = driver.judge.offer(late)
    assert reply.verdict == "superseded"
    assert "merged before this result was there, which costs its author nothing" in reply.text
    assert driver.judge.offer(results[1]).verdict == "gathered", "its author asks again after the merge"
    copy = make_record(driver.judge.manifest, PEERS[5], 0, 1, None, lane=2)
    assert driver.judge.offer(copy).verdict == "superseded"
    run = driver.judge.state.run
    assert [run.peer(PEERS[lane].public_key).accepted for lane in range(4)] == [1, 0, 1, 1]
    assert run.rejected == 0
    assert run.credit[PEERS[3].public_key][0].standing * 2 == run.credit[PEERS[0].public_key][0].standing  # half a share


def test_question_about_a_gathered_result_is_answered_and_starts_nothing() -> None:
    driver = LanesDriver()
    first = driver.result(0)
    driver.judge.now += DEADLINE + 1
    assert driver.judge.offer(first).verdict == "gathered"
    assert not may_become_candidate(driver.judge.state.run, first), "read from the DHT, it is not offered to the judge again"
    assert not driver.merges()
    driver.tick()
    assert len(driver.merges()) == 1, "what time makes due starts at the tick"


def test_lane_takes_one_result_and_none_beyond_its_number() -> None:
    driver = LanesDriver()
    first = driver.result(1)
    second = make_record(driver.judge.manifest, PEERS[4], 0, 1, None, text="another", lane=1)
    assert driver.judge.offer(second).verdict == "superseded"
    beyond = make_record(driver.judge.manifest, PEERS[4], 0, 1, None, lane=4)
    reply = driver.judge.offer(beyond)
    assert (reply.verdict, reply.check) == ("invalid", "lineage")
    assert driver.shard.gathered[1].acceptance.checkpoint == first.digest


def test_other_candidates_of_a_gathered_lane_are_superseded_during_their_check() -> None:
    driver = LanesDriver()
    rival = make_record(driver.judge.manifest, PEERS[5], 0, 1, None, text="rival", lane=1)
    assert driver.judge.offer(rival).verdict == "queued"  # its check runs
    driver.result(0)
    third = make_record(driver.judge.manifest, PEERS[1], 0, 1, None, text="same lane", lane=1)
    assert driver.judge.offer(third).verdict == "queued"
    driver.judge.verdict(rival)
    assert driver.shard.gathered[1].acceptance.author == PEERS[5].public_key
    assert driver.judge.offer(third).verdict == "superseded"
    driver.judge.send(CheckDone(third, Verdict("valid", "holdout", "", 0.4, 0.5), driver.judge.now))  # a late answer
    assert driver.shard.gathered[1].acceptance.author == PEERS[5].public_key


def test_merge_that_fails_its_check_lets_the_best_lane_go_on_alone() -> None:
    driver = LanesDriver()
    for lane, loss in ((0, 0.42), (1, 0.40), (2, 0.41)):
        driver.result(lane, loss=loss)
    worse = Verdict("invalid", "holdout", "its held-out loss 0.60000 is worse", 0.6, 0.5)
    driver.merged(worse)
    assert driver.judge.kinds()[-1] == "merge-refused"
    assert lanes_of(driver.merges()[-1]) == [1]
    driver.merged(worse)  # other rows; its own checks were passed before
    accepted = driver.shard.acceptance
    assert accepted
    assert accepted.lanes == (1,)


def test_merge_without_a_verdict_is_made_again_later() -> None:
    driver = LanesDriver()
    for lane in range(3):
        driver.result(lane)
    driver.merged(Verdict("inconclusive", "holdout", "the worker process ended"))
    assert len(driver.merges()) == 1
    driver.tick(10.0)
    assert len(driver.merges()) == 2
    assert driver.shard.epoch == 0


def test_convicted_lane_is_taken_out_and_the_epoch_merged_again() -> None:
    driver = LanesDriver(lanes=3, audit=AuditPolicy(streak=10, replay_steps=2, whole_epoch=0.0), quorum=1.0)
    results = [driver.result(lane) for lane in range(3)]
    driver.merged()
    later = driver.result(0)
    kept = needed_blobs(driver.judge.state.run, 1)
    assert {ref.digest for one in (*results, later) for ref in (one.weights, one.state, one.trace)} <= kept
    driver.judge.finish_audit("invalid", results[1].digest)
    assert (driver.shard.epoch, driver.shard.term) == (0, 1)
    assert sorted(driver.shard.gathered) == [0, 2]
    driver.tick()
    again = driver.merges()[-1]
    assert lanes_of(again) == [0, 2]
    driver.merged(merge=again)
    accepted = driver.shard.acceptance
    assert accepted
    assert (driver.shard.epoch, driver.shard.term, accepted.lanes) == (1, 1, (0, 2))
    run = driver.judge.state.run
    assert [peer.public_key in run.quarantined for peer in PEERS[:3]] == [False, True, False]
    assert [run.credit[peer.public_key][0].standing > 0 for peer in PEERS[:3]] == [True, False, True]


def test_gathered_result_of_a_quarantined_author_is_dropped_before_its_merge() -> None:
    driver = LanesDriver(lanes=3, audit=AuditPolicy(streak=10, replay_steps=2, whole_epoch=0.0), quorum=1.0)
    for lane in range(3):
        driver.result(lane)
    running = driver.merges()[0]
    driver.judge.finish_audit("invalid", running.sources[1].acceptance.checkpoint)
    assert sorted(driver.shard.gathered) == [0, 2]
    assert driver.shard.term == 0
    driver.merged(merge=running)  # its outcome does not count any more
    assert driver.shard.epoch == 0
    driver.tick(DEADLINE)
    assert lanes_of(driver.merges()[-1]) == [0, 2]


@pytest.mark.parametrize("steps", [1, 3])
def test_ledger_gives_the_same_state_again(steps: int) -> None:
    driver = LanesDriver()
    for _ in range(steps):
        for lane in range(3):
            driver.result(lane)
        driver.merged()
    state = RunState()
    for event in driver.judge.events:
        state = apply(state, read_event(canonical(event)))
    assert state == driver.judge.state.run
    assert state.shards[0].epoch == steps
    assert state.accepted == 3 * steps


def test_result_of_which_no_epoch_can_be_made_is_dropped_and_the_others_are_merged() -> None:
    driver = LanesDriver()
    for lane, loss in ((0, 0.42), (1, 0.40), (2, 0.41)):
        driver.result(lane, loss=loss)
    lost = Verdict("inconclusive", "transfer", "blob 12 is not in the store")
    for _ in range(2 * driver.judge.rules.attempts):  # of all three, then of the best alone
        driver.judge.send(Merged(0, tuple(one.acceptance.checkpoint for one in driver.merges()[-1].sources), None, lost, 0.0))
        driver.tick(3600.0, at_work=set())
    assert [event.lane for event in driver.judge.events if isinstance(event, LaneDropped)] == [1]
    assert lanes_of(driver.merges()[-1]) == [0, 2]
    driver.merged()
    assert driver.judge.state.run.peer(PEERS[1].public_key).accepted == 1, "its author did what was asked"


def test_paused_run_merges_nothing_until_it_goes_on() -> None:
    driver = LanesDriver()
    for lane in range(3):
        driver.result(lane)
    manifest = driver.judge.manifest
    orders = manifest.orders.model_copy(update={"paused": PauseOrder(since=START)})
    going, paused = driver.judge.rules, replace(driver.judge.rules, manifest=manifest.model_copy(update={"orders": orders}))
    driver.judge.rules = paused
    driver.merged()
    driver.tick(DEADLINE)
    assert (driver.shard.epoch, len(driver.merges())) == (0, 1)
    driver.judge.rules = going
    driver.tick(1.0)
    driver.merged()
    assert driver.shard.epoch == 1
