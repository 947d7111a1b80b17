"""The node when the coordinator takes accepted work back: fenced by the term, and out of work when it is quarantined."""

from __future__ import annotations

from lutetia.node.machine import messages as m
from lutetia.protocol.claims import ShardView
from tests.node.machine.machine_driver import ME, OTHER, Walk, acceptance, claimed


def at_epoch_two() -> Walk:
    """Epoch 1 came from somebody else, epoch 2 is our own and accepted, epoch 3 waits."""
    walk = Walk().training()
    walk.feed(m.SwarmSeen(walk.now, (claimed(0, ME, walk.now + 60, accepted=acceptance(0, 1, "x1", OTHER)),)))
    walk.feed(m.SyncDone(walk.now, 0, 1, "x1"))
    walk.checkpoint(2, "x1")
    walk.feed(m.OfferAnswered(walk.now, "d2", "accepted"))
    walk.checkpoint(3, "d2")
    assert walk.state.work
    assert walk.state.work.stand == (0, 2, "d2")
    return walk


def test_a_rollback_stops_the_trainer_drops_what_is_beyond_and_syncs_the_lower_epoch():
    walk = at_epoch_two()
    actions = walk.feed(m.SwarmSeen(walk.now, (claimed(0, ME, walk.now + 60, accepted=acceptance(0, 1, "x1", OTHER, term=1)),)))
    assert m.StopTrainer(save=False) in actions
    assert m.DiscardWork(0, 1) in actions, "our accepted epoch 2 is void, too"
    assert m.Sync(0, 1, "x1") in actions
    assert walk.state.work
    assert walk.state.work.stand == (1, 1, "x1")
    assert walk.state.phase == "syncing"


def test_a_rollback_to_the_beginning_has_no_acceptance():
    walk = at_epoch_two()
    view = claimed(0, ME, walk.now + 60)
    actions = walk.feed(m.SwarmSeen(walk.now, (ShardView(0, view.claims, None, reset=1),)))
    assert m.DiscardWork(0, 0) in actions
    assert m.Sync(0, 0, None) in actions
    assert walk.state.work
    assert walk.state.work.stand == (1, 0, None)


def test_the_old_term_on_a_stale_replica_changes_nothing():
    walk = at_epoch_two()
    walk.feed(m.SwarmSeen(walk.now, (claimed(0, ME, walk.now + 60, accepted=acceptance(0, 1, "x1", OTHER, term=1)),)))
    walk.feed(m.SyncDone(walk.now, 0, 1, "x1"))
    actions = walk.feed(m.SwarmSeen(walk.now, (claimed(0, ME, walk.now + 60, accepted=acceptance(0, 2, "d2", ME)),)))
    assert not any(isinstance(action, m.StopTrainer | m.Sync | m.DiscardWork) for action in actions)
    assert walk.state.work
    assert walk.state.work.stand == (1, 1, "x1")
    assert walk.state.views[0].place == (1, 1)


def test_a_rollback_that_leaves_our_base_where_it_is_costs_nothing():
    walk = at_epoch_two()
    actions = walk.feed(m.SwarmSeen(walk.now, (claimed(0, ME, walk.now + 60, accepted=acceptance(0, 2, "d2", ME, term=1)),)))
    assert not any(isinstance(action, m.StopTrainer | m.Sync | m.DiscardWork) for action in actions)
    assert walk.state.work
    assert walk.state.work.stand == (1, 2, "d2")
    assert [candidate.epoch for candidate in walk.state.work.pending] == [3]


def test_our_result_may_be_the_first_of_the_new_term():
    walk = at_epoch_two()
    walk.feed(m.SwarmSeen(walk.now, (claimed(0, ME, walk.now + 60, accepted=acceptance(0, 3, "d3", ME, term=1)),)))
    assert walk.state.work
    assert walk.state.work.stand == (1, 3, "d3")
    assert walk.state.phase == "training"


def test_a_quarantined_node_gives_its_shard_up_and_leaves_all_of_them_alone():
    walk = at_epoch_two()
    actions = walk.feed(m.OfferAnswered(walk.now, "d3", "quarantined", "this peer is quarantined: ask the run's operator"))
    assert any(isinstance(action, m.PublishClaim) and action.claim.state == "released" for action in actions)
    assert walk.state.work is None
    assert walk.state.phase == "idle"
    assert "operator" in walk.state.why
    assert min(walk.state.shunned.values()) >= walk.now + 10 * walk.rules.lease
    assert len(walk.state.shunned) == walk.rules.shards
    walk.feed(m.SwarmSeen(walk.now, (ShardView(0), ShardView(1))))
    assert walk.state.phase == "idle", "free shards are none of its business"
