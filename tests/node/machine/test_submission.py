"""How the node offers its results and acts on the verdicts."""

from __future__ import annotations

from dataclasses import replace

from lutetia.node.machine import messages as m
from tests.node.machine.machine_driver import ME, RULES, MachineDriver, T, acceptance, claimed


def test_checkpoint_is_offered_while_training_goes_on():
    machine = MachineDriver().training()
    machine.progress(1)
    actions = machine.checkpoint(1, None)
    assert m.PublishCheckpoint(m.OwnCheckpoint(0, 1, "d1", None)) in actions
    assert not machine.actions_of(m.StopTrainer)
    machine.checkpoint(2, "d1")
    assert not machine.actions_of(m.PublishCheckpoint), "the second waits for the verdict on the first"
    actions = machine.feed(m.OfferAnswered(machine.now, "d1", "accepted"))
    assert m.CheckpointsSuperseded(0, 1) in actions
    assert m.AllowEpochs(4) in actions
    assert m.PublishCheckpoint(m.OwnCheckpoint(0, 2, "d2", "d1")) in actions


def test_acceptance_seen_in_the_dht_counts_like_a_reply():
    machine = MachineDriver().training()
    machine.checkpoint(1, None)
    machine.feed(m.SwarmSeen(machine.now, (claimed(0, ME, machine.now + 60, accepted=acceptance(0, 1, "d1", ME)),)))
    assert (machine.state.work.epoch, machine.state.work.checkpoint, machine.state.work.pending) == (1, "d1", ())  # type: ignore[union-attr]


def test_stale_replica_does_not_revert_an_acceptance():
    machine = MachineDriver().training()
    machine.checkpoint(1, None)
    machine.feed(m.OfferAnswered(machine.now, "d1", "accepted"))
    machine.feed(m.SwarmSeen(machine.now, (claimed(0, ME, machine.now + 60),)))
    assert machine.state.work
    assert machine.state.work.epoch == 1
    assert machine.state.phase == "training"


def test_max_pending_holds_the_trainer_without_hot_loop():
    machine = MachineDriver().training()
    for epoch, parent in ((1, None), (2, "d1"), (3, "d2")):
        machine.progress(epoch, waiting=epoch == 3)
        machine.checkpoint(epoch, parent)
    machine.feed(m.OfferAnswered(machine.now, "d1", "unreachable"))
    for _ in range(100):
        machine.tick()
        for action in machine.actions_of(m.PublishCheckpoint):
            machine.feed(m.OfferAnswered(machine.now, action.candidate.digest, "unreachable"))  # type: ignore[union-attr]
    assert machine.now > T + 300, "time passes"
    assert machine.state.work
    assert machine.state.work.trainer == "on"
    assert machine.state.phase == "training"


def test_offers_are_repeated_with_growing_pauses():
    machine = MachineDriver().training()
    machine.checkpoint(1, None)
    times = []
    for _ in range(6):
        machine.feed(m.OfferAnswered(machine.now, "d1", "unreachable"))
        machine.progress(1)
        machine.until(m.PublishCheckpoint, limit=100)
        times.append(machine.now)
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert gaps == sorted(gaps)
    assert gaps[-1] > 15


def test_second_refusal_in_a_row_gives_up_the_shard():
    machine = MachineDriver().training()
    machine.checkpoint(1, None)
    actions = machine.feed(m.OfferAnswered(machine.now, "d1", "invalid", "held-out loss is worse"))
    assert m.DiscardWork(0, 0) in actions
    assert m.Sync(0, 0, None) in actions
    machine.feed(m.SyncDone(machine.now, 0, 0, None))
    machine.checkpoint(1, None)
    machine.feed(m.OfferAnswered(machine.now, "d1", "invalid", "held-out loss is worse"))
    assert machine.state.phase == "idle"
    assert machine.state.avoided_until[0] > machine.now


def test_inconclusive_verdicts_make_the_node_release_the_shard():
    machine = MachineDriver().training()
    machine.checkpoint(1, None)
    for times in range(1, RULES.unjudged_limit + 1):
        assert machine.state.work, f"released after {times - 1}"
        actions = machine.feed(m.OfferAnswered(machine.now, "d1", "inconclusive", "its weights did not arrive", retry_after=60.0))
        machine.now += 61
    assert m.StopTrainer(True) in actions, "what was trained stays on disk"
    assert m.PublishClaim(m.Claim(0, 0, 0, "released")) in actions
    assert machine.state.phase == "idle"
    assert set(machine.state.avoided_until) == set(range(RULES.shards)), "another shard would fare no better"
    assert "cannot judge its checkpoint (its weights did not arrive)" in machine.state.why


def test_acceptance_resets_the_inconclusive_count():
    machine = MachineDriver().training()
    machine.checkpoint(1, None)
    for _ in range(RULES.unjudged_limit - 1):
        machine.feed(m.OfferAnswered(machine.now, "d1", "inconclusive", "its weights did not arrive"))
    machine.feed(m.OfferAnswered(machine.now, "d1", "accepted"))
    assert machine.state.work
    assert machine.state.work.unjudged == 0


def test_recovered_checkpoints_are_offered_after_a_restart():
    machine = MachineDriver().syncing()
    kept = (m.OwnCheckpoint(0, 1, "d1", None), m.OwnCheckpoint(0, 2, "d2", "d1"))
    actions = machine.feed(m.SyncDone(machine.now, 0, 0, None, kept))
    assert m.PublishCheckpoint(kept[0]) in actions
    assert machine.state.work
    assert machine.state.work.trainer_epoch == 2


def unanswered(machine: MachineDriver, room: int, epochs: int) -> list[m.Action]:
    """Train `epochs` epochs while no coordinator answers and the disk has room for `room` more checkpoints."""
    machine.rules = replace(RULES, epochs=100)
    parent, actions = None, []
    for epoch in range(1, epochs + 1):
        machine.progress(epoch)
        actions += machine.checkpoint(epoch, parent)
        parent = f"d{epoch}"
        machine.now += 120
        machine.tick()
        actions += machine.feed(m.OfferAnswered(machine.now, "d1", "unreachable", "no answer", room=room - epoch + 1))
    return actions


def test_without_a_coordinator_training_goes_on_as_far_as_the_disk_has_room():
    machine = MachineDriver().training()
    actions = unanswered(machine, 9, 6)
    assert machine.state.work
    assert machine.state.work.newest == 6, "three were the limit"
    assert [action.until for action in actions if isinstance(action, m.AllowEpochs)][-1] == 10
    machine.feed(m.OfferAnswered(machine.now, "d1", "accepted"))
    assert machine.state.work.epoch_limit(machine.rules) == 4, "with a coordinator that answers, three may wait again"
    assert machine.state.work.pending, "and none of what was trained is lost"


def test_a_trainer_without_a_coordinator_stops_before_the_disk_is_full_and_says_so():
    machine = MachineDriver().training()
    unanswered(machine, 3, 4)
    machine.progress(4, waiting=True)
    machine.tick()
    assert machine.state.work
    assert not machine.state.work.may_train(machine.rules)
    assert machine.state.why == (
        "4 checkpoints wait for acceptance, and no coordinator answers; training waits until one is accepted"
    )
    machine.feed(m.OfferAnswered(machine.now, "d1", "accepted"))
    for epoch in (2, 3):
        machine.now += 60
        machine.tick()
        machine.feed(m.OfferAnswered(machine.now, f"d{epoch}", "accepted"))
    assert machine.state.why == "training shard 0 from epoch 4"


def test_a_judge_that_is_slow_holds_the_trainer_and_the_status_says_so():
    machine = MachineDriver().training()
    for epoch, parent in ((1, None), (2, "d1"), (3, "d2")):
        machine.progress(epoch, waiting=epoch == 3)
        machine.checkpoint(epoch, parent)
    machine.feed(m.OfferAnswered(machine.now, "d1", "queued"))
    machine.tick()
    assert machine.state.why.startswith("3 checkpoints wait for acceptance, and the coordinator has not judged them")
