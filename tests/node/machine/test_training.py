"""The node's decisions while it trains a shard."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lutetia.node.machine import messages as m
from lutetia.protocol.claims import ShardView
from tests.node.machine.machine_driver import ME, OTHER, RULES, MachineDriver, T, acceptance, claimed


@pytest.mark.parametrize("owned_by_me", [True, False])
def test_acceptance_of_another_peer_fences_the_node(owned_by_me: bool):
    machine = MachineDriver().training()
    machine.checkpoint(1, None)
    foreign = acceptance(0, 1, "x1", OTHER, tenure_until=machine.now + 600)
    machine.feed(m.SwarmSeen(machine.now, (claimed(0, ME if owned_by_me else OTHER, machine.now + 60, accepted=foreign),)))
    assert m.StopTrainer(save=False) in machine.actions
    assert m.DiscardWork(0, 0) in machine.actions
    if owned_by_me:
        assert m.Sync(0, 1, "x1") in machine.actions
        assert machine.state.phase == "syncing"
    else:
        assert machine.state.phase == "idle"
        assert m.PublishClaim(m.Claim(0, 0, 0, "released")) in machine.actions
    late = m.CheckpointReady(machine.now, 1, m.OwnCheckpoint(0, 2, "d2", "d1"))
    machine.feed(late)
    assert not machine.state.work or not machine.state.work.pending, "checkpoints of the stopped trainer do not count"


def overtaken(machine: MachineDriver, epochs: range) -> None:
    """Another peer's epochs are accepted while only our claim is visible."""
    for epoch in epochs:
        given = acceptance(0, epoch, f"x{epoch}", OTHER, tenure_until=machine.now + 600)
        machine.feed(m.SwarmSeen(machine.now, (claimed(0, ME, machine.now + 60, accepted=given),)))


def test_late_results_of_the_previous_holder_are_followed():
    machine = MachineDriver(replace(RULES, epochs=40)).training()
    overtaken(machine, range(1, RULES.max_pending + 1))
    assert (machine.state.phase, machine.state.work and machine.state.work.epoch) == ("syncing", RULES.max_pending)


def test_repeatedly_overtaken_node_gives_up_for_a_lease():
    """Our clock is a lease ahead: the holder's claim looks expired, and its work is accepted again and again."""
    machine = MachineDriver(replace(RULES, epochs=40)).training()
    overtaken(machine, range(1, RULES.max_pending + 2))
    assert machine.state.phase == "idle"
    assert "clock" in machine.state.why
    overtaken(machine, range(5, 9))
    assert machine.state.phase == "idle"
    machine.now += RULES.lease
    machine.feed(m.SwarmSeen(machine.now, (ShardView(0, (), acceptance(0, 9, "x9", OTHER)),)))
    assert machine.state.phase == "claiming", "the holder may have died"


def test_own_acceptance_resets_the_overtaken_count():
    machine = MachineDriver(replace(RULES, epochs=40)).training()
    overtaken(machine, range(1, RULES.max_pending + 1))
    machine.feed(m.SyncDone(machine.now, 0, 3, "x3"))
    machine.checkpoint(4, "x3")
    machine.feed(m.OfferAnswered(machine.now, "d4", "accepted"))
    overtaken(machine, range(5, 6))
    assert machine.state.phase == "syncing"


def test_pause_releases_the_lease_until_it_ends():
    machine = MachineDriver().training()
    actions = machine.feed(m.UserVerb(machine.now, "pause", until=machine.now + 7200))
    assert m.StopTrainer(save=True) in actions
    assert m.PublishClaim(m.Claim(0, 0, 0, "released")) in actions
    assert m.RenewRecords(None) in actions, "it is published at once"
    assert machine.state.phase == "paused"
    for _ in range(10):
        machine.tick()
        assert not machine.actions_of(m.PublishClaim)
    machine.now = T + 7300
    machine.feed(m.ClockTick(machine.now))
    assert machine.state.phase == "idle"
    assert 0 in machine.state.remembered


def test_complete_checkpoints_are_offered_while_paused():
    machine = MachineDriver().training()
    machine.checkpoint(1, None)
    machine.feed(m.OfferAnswered(machine.now, "d1", "queued"))
    machine.feed(m.UserVerb(machine.now, "pause"))
    assert machine.until(m.PublishCheckpoint)
    machine.feed(m.OfferAnswered(machine.now, "d1", "accepted"))
    assert machine.state.phase == "paused"
    assert machine.state.work
    assert not machine.state.work.pending
    assert not machine.state.work.owned


def test_finish_leaves_after_the_next_acceptance():
    machine = MachineDriver().training()
    machine.progress(0)
    actions = machine.feed(m.UserVerb(machine.now, "finish"))
    assert m.AllowEpochs(1) in actions
    assert machine.state.phase == "draining"
    assert not any(isinstance(action, m.AllowEpochs) for action in machine.progress(1)), "the end does not move"
    machine.progress(1, waiting=True)
    actions = machine.checkpoint(1, None)
    assert m.StopTrainer(save=False) in actions
    assert m.PublishCheckpoint(m.OwnCheckpoint(0, 1, "d1", None)) in actions
    actions = machine.feed(m.OfferAnswered(machine.now, "d1", "accepted"))
    assert m.PublishClaim(m.Claim(0, 1, 100, "released")) in actions
    assert actions[-2:] == [m.RenewRecords(None), m.Leave()]
    assert machine.state.phase == "left"
    assert machine.feed(m.ClockTick(machine.now)) == []


def test_finish_with_a_silent_coordinator_leaves_in_time():
    machine = MachineDriver().training()
    machine.feed(m.UserVerb(machine.now, "finish"))
    machine.progress(1, waiting=True)
    machine.checkpoint(1, None)
    assert machine.seconds_to_leave("unreachable") <= 61


def test_resume_cancels_finish():
    machine = MachineDriver().training()
    machine.feed(m.UserVerb(machine.now, "finish"))
    actions = machine.feed(m.UserVerb(machine.now, "resume"))
    assert machine.state.phase == "training"
    assert m.AllowEpochs(3) in actions


@pytest.mark.parametrize("where", ["idle", "claiming", "syncing", "training"])
def test_leave_in_any_phase_ends_at_once(where: str):
    machine = getattr(MachineDriver(), where)()
    actions = machine.feed(m.UserVerb(machine.now, "leave"))
    assert machine.state.phase == "left"
    assert actions[-1] == m.Leave()
    assert (m.StopTrainer(save=True) in actions) == (where == "training")


def test_checkpoint_resets_the_crash_backoff():
    machine = MachineDriver().training()
    waits = []
    for _ in range(4):
        machine.feed(m.TrainerExited(machine.now, machine.state.trainers_started, "crash"))
        before = machine.now
        machine.until(m.StartTrainer)
        waits.append(machine.now - before)
    assert [1 <= waits[0] < 1.3, 2 <= waits[1] < 2.6, 4 <= waits[2] < 5.1, 8 <= waits[3] < 10.1] == [True] * 4
    machine.checkpoint(1, None)
    assert machine.state.work
    assert machine.state.work.crashes == 0


def test_crash_limit_gives_up_the_shard():
    machine = MachineDriver().training()
    for _ in range(RULES.crash_limit + 1):
        if machine.state.phase != "training":
            break
        machine.feed(m.TrainerExited(machine.now, machine.state.trainers_started, "crash"))
        if machine.state.phase == "training":
            machine.until(m.StartTrainer, limit=40)
    assert machine.state.phase == "idle"
    machine.feed(m.SwarmSeen(machine.now, (ShardView(0), ShardView(1))))
    assert machine.state.target != 0, "it is avoided"


def test_out_of_memory_halves_the_micro_batch():
    machine = MachineDriver().training()
    machine.feed(m.TrainerExited(machine.now, 1, "out-of-memory"))
    start = machine.until(m.StartTrainer)
    assert isinstance(start, m.StartTrainer)
    assert start.halvings == 1


def test_exit_of_an_earlier_trainer_is_ignored():
    machine = MachineDriver().training()
    machine.feed(m.TrainerExited(machine.now, 1, "crash"))
    machine.until(m.StartTrainer)
    machine.feed(m.TrainerExited(machine.now, 1, "crash"))
    assert machine.state.work
    assert machine.state.work.trainer == "on"


def test_bad_state_is_discarded_and_synced_again():
    machine = MachineDriver().training()
    actions = machine.feed(m.TrainerExited(machine.now, 1, "bad-state", "moments do not match"))
    assert m.DiscardWork(0, None) in actions
    assert m.Sync(0, 0, None) in actions


def test_bad_shard_is_avoided():
    machine = MachineDriver().training()
    machine.feed(m.TrainerExited(machine.now, 1, "bad-shard", "shard 0 cannot be read"))
    assert machine.state.phase == "idle"
    assert machine.state.avoided_until[0] > machine.now


def test_lost_device_is_probed_again():
    machine = MachineDriver().training()
    actions = machine.feed(m.TrainerExited(machine.now, 1, "hardware", "CUDA error"))
    assert m.ProbeHardware() in actions
    assert m.PublishClaim(m.Claim(0, 0, 0, "released")) in actions


def test_hung_trainer_is_killed_and_restarted():
    machine = MachineDriver().training()
    for _ in range(40):
        machine.tick()
        machine.feed(m.SwarmSeen(machine.now, (claimed(0, ME, machine.now + 60),)))
        if m.StartTrainer in map(type, machine.actions) or machine.state.trainers_started == 2:
            break
    assert machine.state.trainers_started == 2
    assert machine.now - T >= RULES.hang_after


def test_trainer_without_a_first_report_gets_start_time():
    machine = MachineDriver(replace(RULES, hang_after=5.0)).training()
    machine.now += 60
    machine.feed(m.ClockTick(machine.now))
    assert not machine.actions_of(m.StopTrainer)
    machine.progress(0)
    machine.now += 6
    machine.feed(m.ClockTick(machine.now))
    assert machine.actions_of(m.StopTrainer), "after its first report, silence counts"


def test_full_disk_is_logged_once_and_keeps_the_trainer():
    machine = MachineDriver().training()
    actions = machine.feed(m.DiskFull(machine.now, "the disk is full"))
    assert m.LogSentence("warning", "the disk is full") in actions
    assert machine.feed(m.DiskFull(machine.now, "the disk is full")) == []
    for _ in range(40):
        machine.tick()
        machine.feed(m.SwarmSeen(machine.now, (claimed(0, ME, machine.now + 60),)))
    assert machine.state.work
    assert machine.state.work.trainer == "on", "silence is no hang while the disk is full"
    assert machine.state.work.checking, "the lease is released after a while"
    machine.feed(m.DiskFree(machine.now))
    machine.until(m.LookAtShards)
    machine.feed(m.SwarmSeen(machine.now, (ShardView(0),)))
    assert m.RenewRecords(m.Claim(0, 0, 0, "training")) in machine.actions


def test_short_disk_recovery_does_not_restart_the_timer():
    machine = MachineDriver().training()
    machine.feed(m.DiskFull(machine.now, "the disk is full"))
    until = machine.now + RULES.stuck_after + RULES.lease
    while machine.now < until:
        machine.tick()
        machine.feed(m.SwarmSeen(machine.now, (claimed(0, ME, machine.now + 60),)))
        machine.feed(m.DiskFree(machine.now))
        machine.now += 1
        machine.feed(m.DiskFull(machine.now, "the disk is full"))
    assert machine.state.work is None or machine.state.work.checking, "the lease is released"
    machine.feed(m.DiskFree(machine.now))
    machine.now += 600
    machine.feed(m.DiskFull(machine.now, "the disk is full"))
    assert machine.state.disk_full_since == machine.now, "a later full disk starts a new timer"


def test_trainer_refused_by_a_full_disk_starts_with_space():
    machine = MachineDriver().training()
    machine.feed(m.TrainerExited(machine.now, 1, "disk-full", "no space"))
    for _ in range(5):
        machine.tick()
        assert not machine.actions_of(m.StartTrainer)
    assert machine.feed(m.DiskFree(machine.now))
    assert machine.actions_of(m.StartTrainer)


def test_sync_failures_back_off_then_give_up():
    machine = MachineDriver().syncing()
    for _ in range(RULES.crash_limit - 1):
        machine.feed(m.SyncFailed(machine.now, 0, "no provider"))
        assert machine.until(m.Sync)
    machine.feed(m.SyncFailed(machine.now, 0, "no provider"))
    assert machine.state.phase == "idle"


def test_sync_answer_for_an_older_epoch_is_ignored():
    machine = MachineDriver().syncing()
    machine.feed(m.SwarmSeen(machine.now, (claimed(0, ME, machine.now + 60, accepted=acceptance(0, 2, "x2", OTHER)),)))
    assert m.Sync(0, 2, "x2") in machine.actions
    machine.feed(m.SyncDone(machine.now, 0, 0, None))
    assert machine.state.phase == "syncing"
    machine.feed(m.SyncDone(machine.now, 0, 2, "x2"))
    assert machine.actions_of(m.StartTrainer)


def test_last_epoch_waits_for_acceptance_then_looks_again():
    machine = MachineDriver().syncing()
    kept = tuple(m.OwnCheckpoint(0, e, f"d{e}", f"d{e - 1}" if e > 1 else None) for e in (1, 2, 3))
    machine.feed(m.SyncDone(machine.now, 0, 0, None, kept))
    assert not machine.actions_of(m.StartTrainer), "three are pending already"
    for epoch in (1, 2):
        machine.feed(m.OfferAnswered(machine.now, f"d{epoch}", "accepted"))
    machine.progress(4, waiting=True)
    machine.checkpoint(4, "d3")
    assert machine.state.phase == "publishing"
    machine.feed(m.OfferAnswered(machine.now, "d3", "accepted"))
    machine.feed(m.OfferAnswered(machine.now, "d4", "accepted"))
    assert machine.state.phase == "idle"
    done = ShardView(0, (), acceptance(0, 4, "d4", ME))
    machine.feed(m.SwarmSeen(machine.now, (done, ShardView(1, (), acceptance(1, 4, "y4", OTHER)))))
    assert "complete" in machine.state.why


def test_training_continues_while_the_network_is_down():
    machine = MachineDriver().training()
    machine.feed(m.NetworkLost(machine.now))
    machine.progress(1)
    actions = machine.checkpoint(1, None)
    assert not any(isinstance(a, (m.PublishCheckpoint, m.StopTrainer, m.RenewRecords)) for a in actions)
    actions = machine.feed(m.NetworkBack(machine.now + 5))
    assert machine.actions_of(m.PublishCheckpoint)
    assert machine.actions_of(m.RenewRecords)


def test_finish_between_two_epochs_starts_no_new_one():
    machine = MachineDriver().training()
    machine.progress(3, waiting=True)
    for epoch, parent in ((1, None), (2, "d1"), (3, "d2")):
        machine.checkpoint(epoch, parent)
    actions = machine.feed(m.UserVerb(machine.now, "finish"))
    assert m.StopTrainer(save=False) in actions


def test_nodes_that_fit_nothing_are_probed_again_at_unlike_times():
    """Nodes of one machine that were started together would else slow down each other's probe for ever."""
    again = set()
    for owner in ("11" * 32, "22" * 32, "33" * 32):
        machine = MachineDriver(replace(RULES, owner=owner)).idle({})
        assert machine.state.probe_at is not None
        again.add(machine.state.probe_at - machine.now)
    assert len(again) == 3
    assert 0.75 * RULES.probe_again <= min(again) < max(again) <= 1.25 * RULES.probe_again


def test_node_that_fits_after_all_looks_at_every_shard():
    machine = MachineDriver().idle({})
    machine.feed(m.WatchedShardsSet(machine.now, frozenset(), machine.now + 600))
    actions = machine.feed(m.Probed(machine.now, {0: 1.0, 1: 1.0}))
    assert m.LookAtShards((0, 1)) in actions
