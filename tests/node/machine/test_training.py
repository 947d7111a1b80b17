"""The node's decisions with a shard in its hands, transition by transition."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lutetia.node.machine import messages as m
from lutetia.protocol.claims import ShardView
from tests.node.machine.machine_driver import ME, OTHER, RULES, T, Walk, acceptance, claimed


@pytest.mark.parametrize("owned_by_me", [True, False])
def test_fenced_when_another_peers_epoch_is_accepted(owned_by_me: bool):
    walk = Walk().training()
    walk.checkpoint(1, None)
    foreign = acceptance(0, 1, "x1", OTHER, tenure_until=walk.now + 600)
    walk.feed(m.SwarmSeen(walk.now, (claimed(0, ME if owned_by_me else OTHER, walk.now + 60, accepted=foreign),)))
    assert m.StopTrainer(save=False) in walk.actions
    assert m.DiscardWork(0, 0) in walk.actions
    if owned_by_me:
        assert m.Sync(0, 1, "x1") in walk.actions
        assert walk.state.phase == "syncing"
    else:
        assert walk.state.phase == "idle"
        assert m.PublishClaim(m.Claim(0, 0, 0, "released")) in walk.actions
    late = m.CheckpointReady(walk.now, 1, m.OwnCheckpoint(0, 2, "d2", "d1"))
    walk.feed(late)
    assert not walk.state.work or not walk.state.work.pending, "what the stopped trainer still writes is void"


def overtaken(walk: Walk, epochs: range) -> None:
    """Others' epochs are accepted, and nobody's claim is to be seen but ours."""
    for epoch in epochs:
        given = acceptance(0, epoch, f"x{epoch}", OTHER, tenure_until=walk.now + 600)
        walk.feed(m.SwarmSeen(walk.now, (claimed(0, ME, walk.now + 60, accepted=given),)))


def test_late_results_of_the_holder_before_us_are_built_upon():
    walk = Walk(replace(RULES, epochs=40)).training()
    overtaken(walk, range(1, RULES.max_pending + 1))
    assert (walk.state.phase, walk.state.work and walk.state.work.epoch) == ("syncing", RULES.max_pending)


def test_who_is_overtaken_again_and_again_gives_the_shard_up_for_a_lease():
    """Our clock is a lease ahead: every claim looks expired, and its holder's work is accepted all the time."""
    walk = Walk(replace(RULES, epochs=40)).training()
    overtaken(walk, range(1, RULES.max_pending + 2))
    assert walk.state.phase == "idle"
    assert "clock" in walk.state.why
    overtaken(walk, range(5, 9))
    assert walk.state.phase == "idle"
    walk.now += RULES.lease
    walk.feed(m.SwarmSeen(walk.now, (ShardView(0, (), acceptance(0, 9, "x9", OTHER)),)))
    assert walk.state.phase == "claiming", "the holder may have died"


def test_own_accepted_work_ends_the_count():
    walk = Walk(replace(RULES, epochs=40)).training()
    overtaken(walk, range(1, RULES.max_pending + 1))
    walk.feed(m.SyncDone(walk.now, 0, 3, "x3"))
    walk.checkpoint(4, "x3")
    walk.feed(m.OfferAnswered(walk.now, "d4", "accepted"))
    overtaken(walk, range(5, 6))
    assert walk.state.phase == "syncing"


def test_pause_releases_the_lease_and_resume_returns():
    walk = Walk().training()
    actions = walk.feed(m.UserVerb(walk.now, "pause", until=walk.now + 7200))
    assert m.StopTrainer(save=True) in actions
    assert m.PublishClaim(m.Claim(0, 0, 0, "released")) in actions
    assert m.RenewRecords(None) in actions, "the swarm hears of it"
    assert walk.state.phase == "paused"
    for _ in range(10):
        walk.tick()
        assert not walk.said(m.PublishClaim)
    walk.now = T + 7300
    walk.feed(m.ClockTick(walk.now))
    assert walk.state.phase == "idle"
    assert 0 in walk.state.remembered


def test_checkpoints_that_are_whole_are_offered_while_paused():
    walk = Walk().training()
    walk.checkpoint(1, None)
    walk.feed(m.OfferAnswered(walk.now, "d1", "queued"))
    walk.feed(m.UserVerb(walk.now, "pause"))
    assert walk.until(m.PublishCheckpoint)
    walk.feed(m.OfferAnswered(walk.now, "d1", "accepted"))
    assert walk.state.phase == "paused"
    assert walk.state.work
    assert not walk.state.work.pending
    assert not walk.state.work.owned


def test_finish_trains_to_the_next_checkpoint_waits_for_its_acceptance_and_leaves():
    walk = Walk().training()
    walk.progress(0)
    actions = walk.feed(m.UserVerb(walk.now, "finish"))
    assert m.AllowEpochs(1) in actions
    assert walk.state.phase == "draining"
    assert not any(isinstance(action, m.AllowEpochs) for action in walk.progress(1)), "the end does not move"
    walk.progress(1, waiting=True)
    actions = walk.checkpoint(1, None)
    assert m.StopTrainer(save=False) in actions
    assert m.PublishCheckpoint(m.OwnCheckpoint(0, 1, "d1", None)) in actions
    actions = walk.feed(m.OfferAnswered(walk.now, "d1", "accepted"))
    assert m.PublishClaim(m.Claim(0, 1, 100, "released")) in actions
    assert actions[-2:] == [m.RenewRecords(None), m.Leave()]
    assert walk.state.phase == "left"
    assert walk.feed(m.ClockTick(walk.now)) == []


def test_finish_does_not_wait_for_a_silent_coordinator_for_ever():
    walk = Walk().training()
    walk.feed(m.UserVerb(walk.now, "finish"))
    walk.progress(1, waiting=True)
    walk.checkpoint(1, None)
    assert walk.leaves_under("unreachable") <= 61


def test_finish_can_be_called_off():
    walk = Walk().training()
    walk.feed(m.UserVerb(walk.now, "finish"))
    actions = walk.feed(m.UserVerb(walk.now, "resume"))
    assert walk.state.phase == "training"
    assert m.AllowEpochs(3) in actions


@pytest.mark.parametrize("where", ["idle", "claiming", "syncing", "training"])
def test_leave_ends_at_once_from_anywhere(where: str):
    walk = getattr(Walk(), where)()
    actions = walk.feed(m.UserVerb(walk.now, "leave"))
    assert walk.state.phase == "left"
    assert actions[-1] == m.Leave()
    assert (m.StopTrainer(save=True) in actions) == (where == "training")


def test_crashes_back_off_and_a_checkpoint_forgives_them():
    walk = Walk().training()
    waits = []
    for _ in range(4):
        walk.feed(m.TrainerExited(walk.now, walk.state.trainers, "crash"))
        before = walk.now
        walk.until(m.StartTrainer)
        waits.append(walk.now - before)
    assert [1 <= waits[0] < 1.3, 2 <= waits[1] < 2.6, 4 <= waits[2] < 5.1, 8 <= waits[3] < 10.1] == [True] * 4
    walk.checkpoint(1, None)
    assert walk.state.work
    assert walk.state.work.crashes == 0


def test_a_trainer_that_keeps_crashing_makes_the_node_give_the_shard_up():
    walk = Walk().training()
    for _ in range(RULES.crash_limit + 1):
        if walk.state.phase != "training":
            break
        walk.feed(m.TrainerExited(walk.now, walk.state.trainers, "crash"))
        if walk.state.phase == "training":
            walk.until(m.StartTrainer, limit=40)
    assert walk.state.phase == "idle"
    walk.feed(m.SwarmSeen(walk.now, (ShardView(0), ShardView(1))))
    assert walk.state.target != 0, "left alone for a while"


def test_out_of_memory_halves_the_micro_batch():
    walk = Walk().training()
    walk.feed(m.TrainerExited(walk.now, 1, "out-of-memory"))
    start = walk.until(m.StartTrainer)
    assert isinstance(start, m.StartTrainer)
    assert start.shrink == 1


def test_exit_of_an_earlier_trainer_is_stale():
    walk = Walk().training()
    walk.feed(m.TrainerExited(walk.now, 1, "crash"))
    walk.until(m.StartTrainer)
    walk.feed(m.TrainerExited(walk.now, 1, "crash"))
    assert walk.state.work
    assert walk.state.work.trainer == "on"


def test_bad_state_is_thrown_away_and_synced_again():
    walk = Walk().training()
    actions = walk.feed(m.TrainerExited(walk.now, 1, "bad-state", "moments do not match"))
    assert m.DiscardWork(0, None) in actions
    assert m.Sync(0, 0, None) in actions


def test_bad_shard_is_left_alone():
    walk = Walk().training()
    walk.feed(m.TrainerExited(walk.now, 1, "bad-shard", "shard 0 cannot be read"))
    assert walk.state.phase == "idle"
    assert walk.state.shunned[0] > walk.now


def test_a_lost_device_is_probed_again():
    walk = Walk().training()
    actions = walk.feed(m.TrainerExited(walk.now, 1, "hardware", "CUDA error"))
    assert m.ProbeHardware() in actions
    assert m.PublishClaim(m.Claim(0, 0, 0, "released")) in actions


def test_a_hung_trainer_is_killed_and_restarted():
    walk = Walk().training()
    for _ in range(40):
        walk.tick()
        walk.feed(m.SwarmSeen(walk.now, (claimed(0, ME, walk.now + 60),)))
        if m.StartTrainer in map(type, walk.actions) or walk.state.trainers == 2:
            break
    assert walk.state.trainers == 2
    assert walk.now - T >= RULES.hang_after


def test_a_trainer_that_has_not_begun_is_given_time_to_import_its_libraries():
    walk = Walk(replace(RULES, hang_after=5.0)).training()
    walk.now += 60
    walk.feed(m.ClockTick(walk.now))
    assert not walk.said(m.StopTrainer)
    walk.progress(0)
    walk.now += 6
    walk.feed(m.ClockTick(walk.now))
    assert walk.said(m.StopTrainer), "but once it has begun, silence counts"


def test_full_disk_reports_once_and_keeps_the_trainer():
    walk = Walk().training()
    actions = walk.feed(m.DiskFull(walk.now, "the disk is full"))
    assert m.LogSentence("warning", "the disk is full") in actions
    assert walk.feed(m.DiskFull(walk.now, "the disk is full")) == []
    for _ in range(40):
        walk.tick()
        walk.feed(m.SwarmSeen(walk.now, (claimed(0, ME, walk.now + 60),)))
    assert walk.state.work
    assert walk.state.work.trainer == "on", "silence is no hang while the disk is full"
    assert walk.state.work.checking, "but the lease is let go after a while"
    walk.feed(m.DiskFree(walk.now))
    walk.until(m.LookAtShards)
    walk.feed(m.SwarmSeen(walk.now, (ShardView(0),)))
    assert m.RenewRecords(m.Claim(0, 0, 0, "training")) in walk.actions


def test_hope_that_was_in_vain_does_not_hold_the_shard_for_longer():
    walk = Walk().training()
    walk.feed(m.DiskFull(walk.now, "the disk is full"))
    until = walk.now + RULES.stuck_after + RULES.lease
    while walk.now < until:
        walk.tick()
        walk.feed(m.SwarmSeen(walk.now, (claimed(0, ME, walk.now + 60),)))
        walk.feed(m.DiskFree(walk.now))
        walk.now += 1
        walk.feed(m.DiskFull(walk.now, "the disk is full"))
    assert walk.state.work is None or walk.state.work.checking, "the lease is let go"
    walk.feed(m.DiskFree(walk.now))
    walk.now += 600
    walk.feed(m.DiskFull(walk.now, "the disk is full"))
    assert walk.state.disk_full_since == walk.now, "another time, another patience"


def test_trainer_that_could_not_start_on_a_full_disk_starts_when_there_is_space():
    walk = Walk().training()
    walk.feed(m.TrainerExited(walk.now, 1, "disk-full", "no space"))
    for _ in range(5):
        walk.tick()
        assert not walk.said(m.StartTrainer)
    assert walk.feed(m.DiskFree(walk.now))
    assert walk.said(m.StartTrainer)


def test_sync_failures_back_off_then_give_up():
    walk = Walk().syncing()
    for _ in range(RULES.crash_limit - 1):
        walk.feed(m.SyncFailed(walk.now, 0, "no provider"))
        assert walk.until(m.Sync)
    walk.feed(m.SyncFailed(walk.now, 0, "no provider"))
    assert walk.state.phase == "idle"


def test_sync_answer_of_an_older_epoch_is_ignored():
    walk = Walk().syncing()
    walk.feed(m.SwarmSeen(walk.now, (claimed(0, ME, walk.now + 60, accepted=acceptance(0, 2, "x2", OTHER)),)))
    assert m.Sync(0, 2, "x2") in walk.actions
    walk.feed(m.SyncDone(walk.now, 0, 0, None))
    assert walk.state.phase == "syncing"
    walk.feed(m.SyncDone(walk.now, 0, 2, "x2"))
    assert walk.said(m.StartTrainer)


def test_done_budget_waits_for_acceptance_then_looks_for_other_work():
    walk = Walk().syncing()
    kept = tuple(m.OwnCheckpoint(0, e, f"d{e}", f"d{e - 1}" if e > 1 else None) for e in (1, 2, 3))
    walk.feed(m.SyncDone(walk.now, 0, 0, None, kept))
    assert not walk.said(m.StartTrainer), "three wait already"
    for epoch in (1, 2):
        walk.feed(m.OfferAnswered(walk.now, f"d{epoch}", "accepted"))
    walk.progress(4, waiting=True)
    walk.checkpoint(4, "d3")
    assert walk.state.phase == "publishing"
    walk.feed(m.OfferAnswered(walk.now, "d3", "accepted"))
    walk.feed(m.OfferAnswered(walk.now, "d4", "accepted"))
    assert walk.state.phase == "idle"
    done = ShardView(0, (), acceptance(0, 4, "d4", ME))
    walk.feed(m.SwarmSeen(walk.now, (done, ShardView(1, (), acceptance(1, 4, "y4", OTHER)))))
    assert "complete" in walk.state.why


def test_training_goes_on_while_the_network_is_down():
    walk = Walk().training()
    walk.feed(m.NetworkLost(walk.now))
    walk.progress(1)
    actions = walk.checkpoint(1, None)
    assert not any(isinstance(a, (m.PublishCheckpoint, m.StopTrainer, m.RenewRecords)) for a in actions)
    actions = walk.feed(m.NetworkBack(walk.now + 5))
    assert walk.said(m.PublishCheckpoint)
    assert walk.said(m.RenewRecords)


def test_finish_between_two_epochs_begins_no_new_one():
    walk = Walk().training()
    walk.progress(3, waiting=True)
    for epoch, parent in ((1, None), (2, "d1"), (3, "d2")):
        walk.checkpoint(epoch, parent)
    actions = walk.feed(m.UserVerb(walk.now, "finish"))
    assert m.StopTrainer(save=False) in actions
