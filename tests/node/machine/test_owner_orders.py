"""The owner's pause and ban, as a node obeys them: it says why, loses no work, and goes on at once."""

from __future__ import annotations

from dataclasses import replace

from lutetia.node.machine import messages as m
from lutetia.node.machine.state import NodeRules
from lutetia.protocol.claims import ShardView
from tests.node.machine.machine_driver import ME, OTHER, RULES, MachineDriver, claimed

PAUSED = replace(RULES, paused="moving house")
BANNED = replace(RULES, banned="it copies results")


def ordered(machine: MachineDriver, rules: NodeRules) -> list[m.Action]:
    resumed = machine.rules.paused is not None and rules.paused is None
    machine.rules = rules
    return machine.feed(m.ManifestChanged(machine.now, 2, False, resumed))


def test_paused_run_lets_the_epoch_end_and_the_lease_stand():
    machine = MachineDriver().training()
    machine.progress(0)
    assert m.AllowEpochs(1) in ordered(machine, PAUSED)
    assert "paused by its owner: moving house; training waits after this epoch" in machine.state.why
    machine.checkpoint(1, None)
    machine.progress(1, waiting=True)
    assert machine.state.phase == "training"
    assert machine.state.why.endswith("training waits until it goes on")
    machine.feed(m.OfferAnswered(machine.now, "d1", "busy", "the run is paused", 60.0))
    renewed = machine.until(m.RenewRecords)
    assert isinstance(renewed, m.RenewRecords)
    assert renewed.claim, "it keeps its shard"
    machine.now += 3600.0
    actions = machine.feed(m.ClockTick(machine.now))
    assert not [action for action in actions if isinstance(action, m.AllowEpochs | m.StartTrainer | m.StopTrainer)]
    assert machine.state.work
    assert [candidate.epoch for candidate in machine.state.work.pending] == [1]


def test_resumed_run_trains_on_and_offers_what_waited_at_once():
    machine = MachineDriver().training()
    machine.progress(0)
    ordered(machine, PAUSED)
    machine.checkpoint(1, None)
    machine.progress(1, waiting=True)
    machine.feed(m.OfferAnswered(machine.now, "d1", "busy", "the run is paused", 60.0))
    actions = ordered(machine, RULES)
    assert m.AllowEpochs(3) in actions
    assert m.PublishCheckpoint(m.OwnCheckpoint(0, 1, "d1", None)) in actions
    assert "paused" not in machine.state.why


def test_paused_run_starts_no_trainer_until_it_is_resumed():
    machine = MachineDriver(PAUSED)
    machine.rules = RULES
    machine.syncing()
    machine.rules = PAUSED
    machine.feed(m.SyncDone(machine.now, 0, 0, None))
    assert not machine.actions_of(m.StartTrainer)
    ordered(machine, RULES)
    assert machine.actions_of(m.StartTrainer)


def test_standby_claims_nothing_in_a_paused_run_and_says_why():
    machine = MachineDriver(PAUSED).idle()
    machine.feed(m.SwarmSeen(machine.now, (ShardView(0), ShardView(1))))
    assert machine.state.phase == "idle"
    assert "paused by its owner: moving house" in machine.state.why
    ordered(machine, RULES)
    machine.feed(m.SwarmSeen(machine.now, (ShardView(0), ShardView(1))))
    assert machine.state.phase == "claiming"


def test_claims_do_not_count_as_idle_for_a_pause():
    """The holder reported nothing new for days, because the run was paused: nobody takes its shard afterwards."""
    machine = MachineDriver().idle({0: 1.0})
    seen = (claimed(0, OTHER, machine.now + 60),)
    machine.feed(m.SwarmSeen(machine.now, seen))
    ordered(machine, PAUSED)
    for _ in range(50):
        machine.now += 100.0
        machine.feed(m.SwarmSeen(machine.now, (claimed(0, OTHER, machine.now + 60),)))
    assert machine.state.views[0].claims == (), "by its own history it would be idle"
    ordered(machine, RULES)
    machine.feed(m.SwarmSeen(machine.now, (claimed(0, OTHER, machine.now + 60),)))
    assert machine.state.phase == "idle"
    assert "every shard has a holder" in machine.state.why


def test_banned_node_stops_at_once_keeps_its_work_and_says_why():
    machine = MachineDriver().training()
    machine.progress(0)
    actions = ordered(machine, BANNED)
    assert m.StopTrainer(True) in actions
    assert machine.state.phase == "paused"
    assert machine.state.why == "the run's owner has banned this node: it copies results"
    machine.feed(m.UserVerb(machine.now, "resume"))
    assert machine.state.phase == "paused"
    assert not [action for action in machine.tick() if isinstance(action, m.LookAtShards | m.PublishClaim)]
    ordered(machine, RULES)
    assert machine.state.phase == "idle"
    assert 0 in machine.state.remembered


def test_node_that_joins_while_it_is_banned_works_nothing():
    machine = MachineDriver(BANNED).idle()
    assert machine.state.phase == "paused"
    machine.feed(m.HoursChanged(machine.now, machine.now + 60))
    machine.feed(m.HoursChanged(machine.now, None))
    assert machine.state.phase == "paused"
    assert ME in machine.rules.owner
