"""Lanes at the judge: results are gathered, merged, checked, and merged again without a liar."""

from dataclasses import replace

import pytest

from lutetia.coordinator.acceptance.checks import Verdict
from lutetia.coordinator.acceptance.intake.fetch_queue import is_known
from lutetia.coordinator.acceptance.messages import CheckDone, JudgeTick, KeepResult, Merged, Publish, StartMerge
from lutetia.coordinator.acceptance.retention import needed_blobs
from lutetia.coordinator.ledger.events import LaneDropped, read_event
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.capabilities import LANES
from lutetia.protocol.schema.fields import MOST_LANES
from lutetia.protocol.schema.manifest import AuditPolicy
from lutetia.protocol.schema.model.team_spec import TeamSpec
from lutetia.protocol.schema.owner.orders import PauseOrder
from lutetia.protocol.schema.records import MAX_RECORD_BYTES, MOST_AUTHORS, CheckpointRecord, seal
from tests.coordinator.acceptance.judge_driver import COORDINATOR, PEERS, START, JudgeDriver, drive_judge, make_record

DEADLINE = 100.0
NOT_AUDITED = AuditPolicy(streak=1, replay_steps=0, whole_epoch=0.0)


class LanesDriver:
    """A judge of one shard with lanes."""

    def __init__(self, lanes: int = 4, audit: AuditPolicy = NOT_AUDITED, quorum: float = 0.75) -> None:
        team = TeamSpec(lanes=lanes, shares=(1.0, 1.0, 1.0, 0.5), quorum=quorum, deadline=DEADLINE)
        self.judge: JudgeDriver = drive_judge(shards=1, epochs=4, team=team, needs=(LANES,), audit=audit)

    @property
    def shard(self):
        return self.judge.state.run.shards[0]

    def result(self, lane: int, peer: int | None = None, loss: float = 0.4) -> CheckpointRecord:
        """The result of a lane for the next epoch, which passes its checks."""
        author = PEERS[lane if peer is None else peer]
        record = make_record(self.judge.manifest, author, 0, self.shard.epoch + 1, self.shard.accepted, text=f"{lane}", lane=lane)
        assert self.judge.offer(record).verdict == "queued"
        self.judge.verdict(record, loss)
        return record

    def tick(self, seconds: float = 0.0, at_work: set[int] | None = None) -> None:
        self.judge.now += seconds
        self.judge.send(JudgeTick(self.judge.now, None, None if at_work is None else {0: frozenset(at_work)}))

    def merges(self) -> list[StartMerge]:
        return [action for action in self.judge.actions if isinstance(action, StartMerge)]

    def merged(self, verdict: Verdict | None = None, merge: StartMerge | None = None) -> CheckpointRecord:
        """The last merge that was asked for ends."""
        merge = merge or self.merges()[-1]
        sources = tuple(source.acceptance.checkpoint for source in merge.sources)
        record = make_record(
            self.judge.manifest, COORDINATOR, 0, merge.epoch, merge.parent and merge.parent.checkpoint, text="|".join(sources)
        )
        verdict = verdict or Verdict("valid", "holdout", "", 0.39, 0.5)
        self.judge.send(Merged(0, sources, record, verdict, self.judge.now))
        return record


def lanes_of(merge: StartMerge) -> list[int]:
    return [source.lane for source in merge.sources]


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
    assert driver.judge.offer(late).verdict == "superseded"
    run = driver.judge.state.run
    assert [run.peer(PEERS[lane].public_key).accepted for lane in range(4)] == [1, 0, 1, 1]
    assert run.rejected == 0
    assert run.credit[PEERS[3].public_key][0].standing * 2 == run.credit[PEERS[0].public_key][0].standing  # half a share


def test_merge_waits_for_lanes_at_work_until_the_deadline_only() -> None:
    driver = LanesDriver()
    driver.result(0)
    driver.tick(DEADLINE / 2, at_work={0, 1})
    assert not driver.merges()
    driver.tick(at_work={0})  # the other node has gone
    assert len(driver.merges()) == 1
    slow = LanesDriver()
    slow.result(0)
    slow.tick(DEADLINE - 1, at_work={0, 1})
    assert not slow.merges()
    slow.tick(1, at_work={0, 1})
    assert len(slow.merges()) == 1


def test_quorum_waits_a_little_for_lanes_that_were_in_the_last_merge_alone() -> None:
    driver = LanesDriver(lanes=4)
    for lane in range(3):
        driver.result(lane)
    driver.merged()  # of the lanes 0, 1 and 2
    driver.tick(80.0, at_work={0, 1, 2, 3})
    for lane in (0, 1):
        driver.result(lane)
    driver.result(3)  # the quorum, after 80 s
    driver.tick(9.9, at_work={0, 1, 2, 3})
    assert len(driver.merges()) == 1
    driver.result(2)
    assert lanes_of(driver.merges()[-1]) == [0, 1, 2, 3]
    driver.merged()
    driver.tick(80.0, at_work={0, 1, 2, 3})
    for lane in range(3):
        driver.result(lane)
    driver.tick(9.9, at_work={0, 1, 2, 3})
    assert len(driver.merges()) == 2
    driver.tick(0.2, at_work={0, 1, 2, 3})
    assert lanes_of(driver.merges()[-1]) == [0, 1, 2], "an eighth of 80 s, and no longer"
    driver.merged()


def test_quorum_waits_for_no_lane_that_missed_the_last_merge_but_in_one_epoch_of_four() -> None:
    driver = LanesDriver(lanes=4)
    waits = []
    for _ in range(4):
        driver.tick(80.0, at_work={0, 1, 2, 3})
        for lane in range(3):
            driver.result(lane)
        began, before = driver.judge.now, len(driver.judge.actions)
        while not any(isinstance(action, StartMerge) for action in driver.judge.actions[before - 1 :]):
            driver.tick(1.0, at_work={0, 1, 2, 3})
        waits.append(driver.judge.now - began)
        driver.merged()
    assert waits == [0.0, 0.0, 0.0, pytest.approx(10.0, abs=1.0)]


def test_acceptance_of_a_merge_names_the_authors_of_its_lanes() -> None:
    driver = LanesDriver()
    for lane in (3, 0, 2):
        driver.result(lane, peer=lane)
    driver.merged()
    accepted = driver.shard.acceptance
    assert accepted
    assert accepted.authors == tuple(PEERS[lane].public_key for lane in (0, 2, 3))
    run = driver.judge.state.run
    assert all(run.has_accepted_work(author) and is_known(run, author) for author in accepted.authors)
    assert not run.has_accepted_work(PEERS[1].public_key)
    assert all(run.pace(author, 0) is not None for author in accepted.authors)
    most = accepted.model_copy(update={"lanes": tuple(range(MOST_LANES)), "authors": (PEERS[0].public_key,) * MOST_AUTHORS})
    assert len(seal(most, COORDINATOR, START + 1e6)) <= MAX_RECORD_BYTES


def test_lane_that_exceeds_its_bound_is_accepted_at_once_after_a_proof_of_the_shard() -> None:
    driver = LanesDriver()
    for lane in range(3):
        driver.result(lane)
    driver.merged()
    before = driver.judge.state.run
    link = driver.shard.lineage[-1]
    proved = replace(link, sources=tuple(replace(source, proved=source.lane == 2) for source in link.sources))
    peers = before.peers.set(PEERS[0].public_key, before.peer(PEERS[0].public_key).updated(audited=1))
    shards = before.shards.set(0, driver.shard.updated(lineage=(proved,)))
    driver.judge.state = replace(driver.judge.state, run=replace(before, peers=peers, shards=shards))
    record = make_record(driver.judge.manifest, PEERS[0], 0, 2, driver.shard.accepted, text="0", lane=0)
    assert driver.judge.offer(record).verdict == "queued"
    failed = Verdict("invalid", "holdout", "its held-out loss 0.45 is above 0.41", 0.45, 0.4, over=0.1)
    driver.judge.send(CheckDone(record, failed, driver.judge.now))
    assert driver.shard.gathered[0].acceptance.checkpoint == record.digest
    assert driver.shard.gathered[0].proved


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
