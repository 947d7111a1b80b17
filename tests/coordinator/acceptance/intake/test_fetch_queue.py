"""Which results are fetched and checked first, and that results whose blobs never arrive delay nobody else."""

from __future__ import annotations

import pytest

from benchmarks.attacks.stalled_judging import ATTACKS, USUAL, honest_delay
from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.intake.fetch_queue import (
    FORGIVEN_AFTER,
    LEAST_PATIENCE,
    LONG_FETCH,
    in_line,
    is_known,
    key_of,
)
from lutetia.coordinator.acceptance.messages import CheckDone, DiscardCandidate, FetchDone, JudgeTick, LimitsKnown
from lutetia.coordinator.acceptance.transition import JudgeState
from lutetia.coordinator.ledger.events import ResultRefused
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import CheckpointRecord
from tests.coordinator.acceptance.judge_driver import PEERS, JudgeDriver, drive_judge, limits_of, make_record

ONE, OTHER = "198.51.100.1", "203.0.113.7"


def slow_driver(shards: int = 2, **rules: object) -> JudgeDriver:
    """Blobs arrive when the test says so."""
    driver = drive_judge(shards=shards, epochs=9, rules={"offers_per_minute": 1000, **rules})
    driver.arrives = False
    return driver


def sybils(driver: JudgeDriver, count: int, origin: str = ONE, shard: int = 0, name: str = "sybil") -> list[CheckpointRecord]:
    """Offer results of `count` keys at one address."""
    records = [make_record(driver.manifest, Identity.derived(f"{name}{index}"), shard) for index in range(count)]
    for record in records:
        assert driver.offer(record, origin=origin).verdict == "queued"
    return records


@pytest.mark.parametrize("attack", [ATTACKS[1], ATTACKS[2], ATTACKS[3], ATTACKS[5]], ids=lambda attack: attack.name)
def test_acceptance_under_stalled_results_takes_three_times_as_long_at_most(attack):
    assert max(honest_delay(attack, seed, newcomer=True) for seed in range(2)) <= 3 * USUAL
    assert honest_delay(attack, 0, newcomer=False) <= 3 * USUAL


def test_result_takes_a_check_place_only_once_it_has_arrived():
    driver = slow_driver(shards=6)
    for shard in range(4):
        sybils(driver, 1, f"198.51.100.{shard}", shard)
    honest = make_record(driver.manifest, PEERS[0], 5)
    driver.offer(honest, origin=OTHER)
    assert not driver.state.checking, "four results that never arrive hold none of the four places"
    driver.arrived(honest)
    assert list(driver.state.checking) == [5]


def test_results_of_one_shard_are_fetched_at_the_same_time():
    driver = slow_driver()
    first = make_record(driver.manifest, PEERS[0])
    second = make_record(driver.manifest, PEERS[1])
    driver.offer(first, origin=ONE)
    driver.offer(second, origin=OTHER)
    assert driver.state.fetching == {key_of(first), key_of(second)}
    driver.arrived(second)
    assert driver.state.checking[0] == (second.owner, second.digest)


def test_keys_of_one_origin_are_fetched_one_at_a_time():
    driver = slow_driver()
    crowd = sybils(driver, 8)
    assert driver.state.fetching == {key_of(crowd[0])}
    honest = make_record(driver.manifest, PEERS[0])
    driver.offer(honest, origin=OTHER)
    assert key_of(honest) in driver.state.fetching


def test_owner_with_accepted_work_goes_first():
    driver = drive_judge(epochs=9, rules={"checks_at_once": 1})
    driver.accept(PEERS[0], 1)
    driver.arrives = False
    stranger, busy = make_record(driver.manifest, PEERS[1]), make_record(driver.manifest, PEERS[2])
    known = make_record(driver.manifest, PEERS[0])
    for record, origin in ((busy, "192.0.2.1"), (stranger, ONE), (known, OTHER)):
        driver.offer(record, origin=origin)
        driver.now += 1
    driver.arrived(busy)
    driver.arrived(stranger)
    driver.arrived(known)
    driver.send(CheckDone(busy, Verdict("invalid", "holdout", "worse"), driver.now))
    assert driver.state.checking[0] == (known.owner, known.digest)


def test_owner_with_many_refusals_is_not_known():
    driver = drive_judge(epochs=20)
    for _ in range(8):
        driver.accept(PEERS[0])
    assert is_known(driver.state.run, PEERS[0].public_key)
    shard = driver.state.run.shards[0]
    driver.refuse(make_record(driver.manifest, PEERS[0], 0, shard.epoch + 1, shard.accepted))
    assert not is_known(driver.state.run, PEERS[0].public_key)


def test_patience_halves_with_each_failure_of_the_origin_and_comes_back():
    driver = slow_driver(attempts=1)
    granted = []
    for index in range(5):
        [record] = sybils(driver, 1, name=f"key {index} of ")
        granted.append(driver.fetches[-1].patience)
        driver.arrived(record, failed="no chunk came")
    assert granted == [1.0, 0.5, 0.25, 0.125, LEAST_PATIENCE]
    driver.offer(make_record(driver.manifest, PEERS[0]), origin=OTHER)
    assert driver.fetches[-1].patience == 1.0, "of another origin nothing is held against it"
    driver.now += FORGIVEN_AFTER
    sybils(driver, 1, name="late ")
    assert driver.fetches[-1].patience == 1.0


def test_accepted_result_restores_the_patience_with_its_origin():
    driver = slow_driver(attempts=1)
    [record] = sybils(driver, 1)
    driver.arrived(record, failed="no chunk came")
    good = make_record(driver.manifest, PEERS[0])
    driver.offer(good, origin=ONE)
    assert driver.fetches[-1].patience == 0.5
    driver.arrived(good)
    driver.verdict(good)
    driver.offer(make_record(driver.manifest, PEERS[1], 1), origin=ONE)
    assert driver.fetches[-1].patience == 1.0


def test_failed_fetch_goes_to_the_end_of_the_line():
    driver = slow_driver(fetches_at_once=2, retry_delay=1.0)
    [stalled] = sybils(driver, 1)
    honest = make_record(driver.manifest, PEERS[0])
    driver.offer(honest, origin=OTHER)
    assert driver.state.fetching == {key_of(stalled)}
    driver.arrived(stalled, failed="no chunk came")
    assert driver.state.fetching == {key_of(honest)}
    driver.now += 5
    driver.arrived(honest)
    driver.send(JudgeTick(driver.now))
    assert driver.state.fetching == {key_of(stalled)}


def test_refused_results_put_their_origin_behind_others():
    driver = slow_driver()
    one, two = sybils(driver, 2)
    driver.arrived(one)
    driver.send(CheckDone(one, Verdict("invalid", "holdout", "worse"), driver.now))
    honest = make_record(driver.manifest, PEERS[0])
    driver.offer(honest, origin=OTHER)
    driver.arrived(two)
    driver.arrived(honest)
    driver.send(CheckDone(two, Verdict("inconclusive", "holdout", "the worker ended"), driver.now))
    assert driver.state.checking[0] == (honest.owner, honest.digest)


def test_full_shard_makes_room_for_another_origin():
    driver = slow_driver()
    crowd = [*sybils(driver, 8), *sybils(driver, 8, "198.51.100.2", name="more ")]
    honest = make_record(driver.manifest, PEERS[0])
    assert driver.offer(honest, origin=OTHER).verdict == "queued"
    gone = [record for record in crowd if (record.owner, record.digest) not in driver.state.run.shards[0].candidates]
    assert len(gone) == 1
    assert [action.record for action in driver.actions if isinstance(action, DiscardCandidate)] == gone
    refusal = next(event for event in driver.events if isinstance(event, ResultRefused))
    assert (refusal.verdict, refusal.again_at) == ("inconclusive", None)
    assert "offer it again later" in refusal.text
    assert driver.state.run.rejected == 0


def test_full_shard_does_not_make_room_for_more_of_the_same():
    driver = slow_driver()
    for index in range(16):
        sybils(driver, 1, f"198.51.100.{index}", name=f"origin {index} ")
    driver.now += 1
    late = make_record(driver.manifest, Identity.derived("late"))
    assert driver.offer(late, origin="198.51.100.3").verdict == "busy"
    assert driver.offer(late, "poll").verdict == "busy"
    driver.now += LONG_FETCH
    assert driver.offer(late, origin="198.51.100.77").verdict == "queued", "a fetch without end keeps no place"


def test_results_read_from_the_dht_share_their_turns():
    driver = slow_driver()
    for index in range(8):
        driver.offer(make_record(driver.manifest, Identity.derived(f"dht {index}")), "poll")
    assert len(driver.state.fetching) == 4
    honest = make_record(driver.manifest, PEERS[0])
    driver.offer(honest, origin=OTHER)
    assert key_of(honest) in driver.state.fetching


def test_strangers_leave_places_to_known_owners():
    driver = drive_judge(shards=8, epochs=9, rules={"fetches_at_once": 4})
    driver.accept(PEERS[0], 7)
    driver.arrives = False
    for shard in range(6):
        sybils(driver, 1, f"198.51.100.{shard}", shard, name=f"s{shard}")
    assert len(driver.state.fetching) == 3
    known = make_record(driver.manifest, PEERS[0])
    driver.offer(known, origin=OTHER)
    assert key_of(known) in driver.state.fetching


def test_one_result_at_a_time_is_fetched_beside_one_that_has_arrived():
    driver = slow_driver()
    records = [make_record(driver.manifest, peer) for peer in PEERS[:4]]
    driver.offer(records[0], origin="192.0.2.0")
    driver.arrived(records[0])
    for index, record in enumerate(records[1:], 1):
        driver.offer(record, origin=f"192.0.2.{index}")
    assert len(driver.state.fetching) == 1


def test_fetches_end_with_the_epoch_and_late_ones_change_nothing():
    driver = slow_driver()
    late, good = make_record(driver.manifest, PEERS[0]), make_record(driver.manifest, PEERS[1])
    driver.offer(late, origin=ONE)
    driver.offer(good, origin=OTHER)
    driver.arrived(good)
    driver.verdict(good)
    assert (driver.state.fetching, dict(driver.state.fetched), dict(driver.state.checking)) == (frozenset(), {}, {})
    before = driver.state
    assert driver.send(FetchDone(late, Verdict("valid", "transfer"), driver.now)) == ()
    assert driver.state == before


def test_restart_fetches_again_what_had_arrived():
    driver = slow_driver()
    record = make_record(driver.manifest, PEERS[0])
    driver.offer(record, origin=ONE)
    driver.arrived(record)
    driver.state = JudgeState.restored(driver.state.run)
    driver.send(LimitsKnown(limits_of(2), driver.now))
    assert driver.state.fetching == {key_of(record)}
    assert not driver.state.checking


def test_results_of_one_prefix_wait_behind_those_of_others_beyond_four():
    driver = drive_judge(shards=1, epochs=9, rules={"candidates_per_shard": 12})
    driver.arrives = False
    crowd = [Identity.derived(f"neighbour {number}") for number in range(12)]
    for number, peer in enumerate(crowd):
        driver.offer(make_record(driver.manifest, peer), origin=f"8.8.4.{number}")
    late = make_record(driver.manifest, Identity.derived("late"))
    assert driver.offer(late, origin="9.9.9.9").verdict == "queued", "the last of the crowd gives way"
    left = driver.state.run.shards[0].candidates
    assert len(left) == 12
    waiting = [one.record.owner for one in in_line(driver.state, left.values())]
    assert waiting.index(late.owner) <= 4
