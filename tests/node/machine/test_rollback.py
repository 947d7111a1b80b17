"""The node after a rollback of its shard, and when it is quarantined."""

from __future__ import annotations

from lutetia.node.machine import messages as m
from lutetia.protocol.claims import ShardView
from tests.node.machine.machine_driver import ME, OTHER, MachineDriver, acceptance, claimed


def rolled_back(machine: MachineDriver, epoch: int, digest: str, author: str) -> m.SwarmSeen:
    """Our claim, and the acceptance of `epoch` in the next term."""
    accepted = acceptance(0, epoch, digest, author, term=1)
    return m.SwarmSeen(machine.now, (claimed(0, ME, machine.now + 60, accepted=accepted),))


def at_epoch_two() -> MachineDriver:
    """Epoch 1 came from another peer, epoch 2 is our own and accepted, epoch 3 is pending."""
    machine = MachineDriver().training()
    machine.feed(m.SwarmSeen(machine.now, (claimed(0, ME, machine.now + 60, accepted=acceptance(0, 1, "x1", OTHER)),)))
    machine.feed(m.SyncDone(machine.now, 0, 1, "x1"))
    machine.checkpoint(2, "x1")
    machine.feed(m.OfferAnswered(machine.now, "d2", "accepted"))
    machine.checkpoint(3, "d2")
    assert machine.state.work
    assert machine.state.work.stand == (0, 2, "d2")
    return machine


def test_rollback_discards_newer_work_and_syncs_lower_epoch():
    machine = at_epoch_two()
    actions = machine.feed(rolled_back(machine, 1, "x1", OTHER))
    assert m.StopTrainer(save=False) in actions
    assert m.DiscardWork(0, 1) in actions, "our accepted epoch 2 is discarded too"
    assert m.Sync(0, 1, "x1") in actions
    assert machine.state.work
    assert machine.state.work.stand == (1, 1, "x1")
    assert machine.state.phase == "syncing"


def test_rollback_to_the_beginning_syncs_epoch_zero():
    machine = at_epoch_two()
    view = claimed(0, ME, machine.now + 60)
    actions = machine.feed(m.SwarmSeen(machine.now, (ShardView(0, view.claims, None, reset=1),)))
    assert m.DiscardWork(0, 0) in actions
    assert m.Sync(0, 0, None) in actions
    assert machine.state.work
    assert machine.state.work.stand == (1, 0, None)


def test_old_term_on_a_stale_replica_is_ignored():
    machine = at_epoch_two()
    machine.feed(rolled_back(machine, 1, "x1", OTHER))
    machine.feed(m.SyncDone(machine.now, 0, 1, "x1"))
    actions = machine.feed(m.SwarmSeen(machine.now, (claimed(0, ME, machine.now + 60, accepted=acceptance(0, 2, "d2", ME)),)))
    assert not any(isinstance(action, m.StopTrainer | m.Sync | m.DiscardWork) for action in actions)
    assert machine.state.work
    assert machine.state.work.stand == (1, 1, "x1")
    assert machine.state.views[0].place == (1, 1)


def test_rollback_above_our_base_keeps_the_work():
    machine = at_epoch_two()
    actions = machine.feed(rolled_back(machine, 2, "d2", ME))
    assert not any(isinstance(action, m.StopTrainer | m.Sync | m.DiscardWork) for action in actions)
    assert machine.state.work
    assert machine.state.work.stand == (1, 2, "d2")
    assert [candidate.epoch for candidate in machine.state.work.pending] == [3]


def test_own_result_accepted_first_in_a_new_term_counts():
    machine = at_epoch_two()
    machine.feed(rolled_back(machine, 3, "d3", ME))
    assert machine.state.work
    assert machine.state.work.stand == (1, 3, "d3")
    assert machine.state.phase == "training"


def test_quarantined_node_releases_and_avoids_all_shards():
    machine = at_epoch_two()
    actions = machine.feed(m.OfferAnswered(machine.now, "d3", "quarantined", "this peer is quarantined: ask the run's operator"))
    assert any(isinstance(action, m.PublishClaim) and action.claim.state == "released" for action in actions)
    assert machine.state.work is None
    assert machine.state.phase == "idle"
    assert "operator" in machine.state.why
    assert min(machine.state.avoided_until.values()) >= machine.now + 10 * machine.rules.lease
    assert len(machine.state.avoided_until) == machine.rules.shards
    machine.feed(m.SwarmSeen(machine.now, (ShardView(0), ShardView(1))))
    assert machine.state.phase == "idle", "it avoids free shards"
