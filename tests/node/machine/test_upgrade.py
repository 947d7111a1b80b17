"""A newer manifest during training: no work is lost, and no epoch is trained under two manifests."""

from __future__ import annotations

from dataclasses import replace

from lutetia.node.machine import messages as m
from lutetia.protocol.claims import ShardView
from tests.node.machine.machine_driver import ME, RULES, MachineDriver, acceptance, claimed

LONGER = replace(RULES, epochs=8)


def upgraded(machine: MachineDriver, training: bool) -> list[m.Action]:
    machine.rules = LONGER
    return machine.feed(m.ManifestChanged(machine.now, 2, training))


def test_raised_budget_keeps_the_trainer():
    machine = MachineDriver().training()
    machine.checkpoint(1, None)
    machine.feed(m.OfferAnswered(machine.now, "d1", "accepted"))
    machine.checkpoint(2, "d1")
    assert m.AllowEpochs(4) not in machine.actions
    actions = upgraded(machine, training=False)
    assert not [action for action in actions if isinstance(action, m.StopTrainer | m.StartTrainer)]
    machine.feed(m.OfferAnswered(machine.now, "d2", "accepted"))
    assert m.AllowEpochs(5) in machine.actions, "beyond the old budget of 4"


def test_changed_training_starts_a_new_trainer_next_epoch():
    machine = MachineDriver().training()
    machine.progress(0)
    assert m.AllowEpochs(1) in upgraded(machine, training=True), "the current epoch is finished first"
    assert not machine.actions_of(m.StopTrainer)
    actions = machine.checkpoint(1, None)
    assert m.StopTrainer(save=False) in actions
    started = machine.until(m.StartTrainer)
    assert isinstance(started, m.StartTrainer)
    assert (started.run, started.until) == (2, 3)
    assert machine.state.work
    assert [candidate.epoch for candidate in machine.state.work.pending] == [1], "no work is lost"


def test_crash_before_the_handover_restarts_the_trainer():
    """The local state decides the budget of that epoch: see `test_trainer.py`."""
    machine = MachineDriver().training()
    machine.progress(0)
    upgraded(machine, training=True)
    machine.feed(m.TrainerExited(machine.now, 1, "crash", "oops"))
    started = machine.until(m.StartTrainer)
    assert isinstance(started, m.StartTrainer)
    assert started.until == 3


def test_raised_budget_while_publishing_trains_further():
    machine = MachineDriver().training()
    parent = None
    for epoch in range(1, 5):
        machine.checkpoint(epoch, parent)
        parent = f"d{epoch}"
        if epoch < 4:
            machine.feed(m.OfferAnswered(machine.now, parent, "accepted"))
    assert machine.state.phase == "publishing"
    upgraded(machine, training=True)
    assert machine.state.phase == "training"
    assert machine.actions_of(m.StartTrainer) or machine.until(m.StartTrainer)


def test_raised_budget_of_a_finished_run_looks_again():
    machine = MachineDriver().idle()
    done = acceptance(0, 4, "d4", ME), acceptance(1, 4, "e4", ME)
    machine.feed(m.SwarmSeen(machine.now, tuple(ShardView(shard, (), given) for shard, given in enumerate(done))))
    assert "complete" in machine.state.why
    assert m.LookAtShards((0, 1)) in upgraded(machine, training=True)
    machine.feed(m.SwarmSeen(machine.now, tuple(ShardView(shard, (), given) for shard, given in enumerate(done))))
    assert machine.state.phase == "claiming"


def test_lowered_budget_ends_the_work():
    machine = MachineDriver().training()
    machine.checkpoint(1, None)
    machine.feed(m.OfferAnswered(machine.now, "d1", "accepted"))
    machine.rules = replace(RULES, epochs=1)
    machine.feed(m.ManifestChanged(machine.now, 2, False))
    assert machine.state.phase == "idle"
    assert machine.state.work is None
    assert claimed(0, ME, machine.now).live(machine.now) == []


def test_newer_rules_end_the_avoidance_of_a_shard():
    """The owner's remedy reaches a node that gave the shard up after refusals."""
    machine = MachineDriver().training()
    for _ in range(RULES.rejection_limit):
        machine.checkpoint(1, None)
        machine.feed(m.OfferAnswered(machine.now, "d1", "invalid", "held-out loss is worse"))
        machine.feed(m.SyncDone(machine.now, 0, 0, None))
    assert machine.state.avoided_until[0] > machine.now
    machine.feed(m.ManifestChanged(machine.now, 2, False))
    assert not machine.state.avoided_until
    assert not machine.state.rejections
    assert machine.state.look_at <= machine.now + RULES.heartbeat
