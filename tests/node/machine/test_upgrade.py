"""A newer manifest in the middle of the work: nothing is thrown away, and no epoch is trained half one way, half another."""

from __future__ import annotations

from dataclasses import replace

from lutetia.node.machine import messages as m
from lutetia.protocol.claims import ShardView
from tests.node.machine.machine_driver import ME, RULES, Walk, acceptance, claimed

LONGER = replace(RULES, epochs=8)


def upgraded(walk: Walk, training: bool) -> list[m.Action]:
    walk.rules = LONGER
    return walk.feed(m.ManifestChanged(walk.now, 2, training))


def test_a_raised_budget_lets_the_same_trainer_go_on():
    walk = Walk().training()
    walk.checkpoint(1, None)
    walk.feed(m.OfferAnswered(walk.now, "d1", "accepted"))
    walk.checkpoint(2, "d1")
    assert m.AllowEpochs(4) not in walk.actions
    actions = upgraded(walk, training=False)
    assert not [action for action in actions if isinstance(action, m.StopTrainer | m.StartTrainer)]
    walk.feed(m.OfferAnswered(walk.now, "d2", "accepted"))
    assert m.AllowEpochs(5) in walk.actions, "beyond the old budget of 4"


def test_where_training_changes_the_next_epoch_is_for_a_new_trainer():
    walk = Walk().training()
    walk.progress(0)
    assert m.AllowEpochs(1) in upgraded(walk, training=True), "the epoch under way ends as it began"
    assert not walk.said(m.StopTrainer)
    actions = walk.checkpoint(1, None)
    assert m.StopTrainer(save=False) in actions
    started = walk.until(m.StartTrainer)
    assert isinstance(started, m.StartTrainer)
    assert (started.run, started.until) == (2, 3)
    assert walk.state.work
    assert [candidate.epoch for candidate in walk.state.work.pending] == [1], "nothing is lost"


def test_a_trainer_that_crashes_before_it_hands_over_is_simply_started_anew():
    """Under which budget the epoch goes on is the local state's matter: `test_trainer.py`."""
    walk = Walk().training()
    walk.progress(0)
    upgraded(walk, training=True)
    walk.feed(m.TrainerExited(walk.now, 1, "crash", "oops"))
    started = walk.until(m.StartTrainer)
    assert isinstance(started, m.StartTrainer)
    assert started.until == 3


def test_who_waits_for_its_last_verdicts_trains_on():
    walk = Walk().training()
    parent = None
    for epoch in range(1, 5):
        walk.checkpoint(epoch, parent)
        parent = f"d{epoch}"
        if epoch < 4:
            walk.feed(m.OfferAnswered(walk.now, parent, "accepted"))
    assert walk.state.phase == "publishing"
    upgraded(walk, training=True)
    assert walk.state.phase == "training"
    assert walk.said(m.StartTrainer) or walk.until(m.StartTrainer)


def test_a_node_that_stands_by_a_finished_run_looks_again():
    walk = Walk().idle()
    done = acceptance(0, 4, "d4", ME), acceptance(1, 4, "e4", ME)
    walk.feed(m.SwarmSeen(walk.now, tuple(ShardView(shard, (), given) for shard, given in enumerate(done))))
    assert "complete" in walk.state.why
    assert m.LookAtShards((0, 1)) in upgraded(walk, training=True)
    walk.feed(m.SwarmSeen(walk.now, tuple(ShardView(shard, (), given) for shard, given in enumerate(done))))
    assert walk.state.phase == "claiming"


def test_a_lowered_budget_ends_the_work():
    walk = Walk().training()
    walk.checkpoint(1, None)
    walk.feed(m.OfferAnswered(walk.now, "d1", "accepted"))
    walk.rules = replace(RULES, epochs=1)
    walk.feed(m.ManifestChanged(walk.now, 2, False))
    assert walk.state.phase == "idle"
    assert walk.state.work is None
    assert claimed(0, ME, walk.now).live(walk.now) == []
