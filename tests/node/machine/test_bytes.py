"""The cap on bytes, as the machine obeys it: an epoch that has begun ends and is uploaded, then the shard is handed back."""

from __future__ import annotations

from lutetia.node.machine import messages as m
from lutetia.protocol.claims import ShardView
from tests.node.machine.machine_driver import MachineDriver

WHY = "the cap of 20 GB a day leaves 1 GB; training goes on at midnight"


def spend(machine: MachineDriver, *, offers: bool = True) -> list[m.Action]:
    return machine.feed(m.BytesAllowed(machine.now, machine.now + 3600, WHY, offers))


def test_spent_cap_lets_the_epoch_end_and_its_result_be_judged():
    machine = MachineDriver().training()
    machine.progress(0)
    assert m.AllowEpochs(1) in spend(machine)
    assert machine.state.why.startswith(WHY)
    machine.checkpoint(1, None)
    machine.progress(1, waiting=True)
    assert machine.state.phase == "training", "its upload is under way"
    actions = machine.feed(m.OfferAnswered(machine.now, "d1", "accepted"))
    assert m.StopTrainer(True) in actions
    assert [action.claim.state for action in actions if isinstance(action, m.PublishClaim)] == ["released"]
    assert (machine.state.phase, machine.state.why) == ("paused", WHY)


def test_new_day_lets_it_look_for_a_shard_and_the_volunteer_cannot_pass_the_cap():
    machine = MachineDriver().idle()
    spend(machine)
    assert (machine.state.phase, machine.state.why) == ("paused", WHY)
    machine.feed(m.UserVerb(machine.now, "resume"))
    assert machine.state.phase == "paused"
    machine.feed(m.HoursChanged(machine.now, machine.now + 60))
    machine.feed(m.HoursChanged(machine.now, None))
    assert (machine.state.phase, machine.state.why) == ("paused", WHY)
    machine.feed(m.BytesAllowed(machine.now, None))
    assert machine.state.phase == "idle"


def test_new_day_before_the_epoch_ended_lets_training_go_on():
    machine = MachineDriver().training()
    machine.progress(0)
    spend(machine)
    assert m.AllowEpochs(3) in machine.feed(m.BytesAllowed(machine.now, None))
    assert machine.state.why.startswith("training shard 0")


def test_result_that_cannot_be_uploaded_is_kept_and_the_shard_handed_back_at_once():
    machine = MachineDriver().training()
    machine.checkpoint(1, None)
    machine.feed(m.OfferAnswered(machine.now, "d1", "unreachable"))
    actions = spend(machine, offers=False)
    assert [action.claim.state for action in actions if isinstance(action, m.PublishClaim)] == ["released"]
    for _ in range(5):
        machine.now += 600
        assert not [action for action in machine.feed(m.ClockTick(machine.now)) if isinstance(action, m.PublishCheckpoint)]
    machine.feed(m.BytesAllowed(machine.now, None))
    assert machine.state.phase == "idle"
    assert 0 in machine.state.remembered, "it takes the same shard first"


def test_failed_trainer_is_not_started_again_under_a_spent_cap():
    machine = MachineDriver().training()
    machine.progress(0)
    spend(machine)
    machine.feed(m.TrainerExited(machine.now, machine.state.trainers_started, "crash", "killed"))
    assert machine.state.phase == "paused"


def test_node_that_joins_with_a_spent_cap_claims_nothing():
    machine = MachineDriver()
    spend(machine)
    machine.idle()
    assert machine.state.phase == "paused"
    assert not machine.feed(m.SwarmSeen(machine.now, (ShardView(0), ShardView(1))))
