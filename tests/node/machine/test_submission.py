"""What the node does with its results and what is said of them, transition by transition."""

from __future__ import annotations

from lutetia.node.machine import messages as m
from tests.node.machine.machine_driver import ME, RULES, T, Walk, acceptance, claimed


def test_checkpoint_is_offered_while_training_goes_on():
    walk = Walk().training()
    walk.progress(1)
    actions = walk.checkpoint(1, None)
    assert m.PublishCheckpoint(m.OwnCheckpoint(0, 1, "d1", None)) in actions
    assert not walk.said(m.StopTrainer)
    walk.checkpoint(2, "d1")
    assert not walk.said(m.PublishCheckpoint), "the second waits for the verdict on the first"
    actions = walk.feed(m.OfferAnswered(walk.now, "d1", "accepted"))
    assert m.CheckpointsSuperseded(0, 1) in actions
    assert m.AllowEpochs(4) in actions
    assert m.PublishCheckpoint(m.OwnCheckpoint(0, 2, "d2", "d1")) in actions


def test_acceptance_seen_in_the_dht_counts_like_a_reply():
    walk = Walk().training()
    walk.checkpoint(1, None)
    walk.feed(m.SwarmSeen(walk.now, (claimed(0, ME, walk.now + 60, accepted=acceptance(0, 1, "d1", ME)),)))
    assert (walk.state.work.epoch, walk.state.work.checkpoint, walk.state.work.pending) == (1, "d1", ())  # type: ignore[union-attr]


def test_a_stale_replica_does_not_take_an_acceptance_back():
    walk = Walk().training()
    walk.checkpoint(1, None)
    walk.feed(m.OfferAnswered(walk.now, "d1", "accepted"))
    walk.feed(m.SwarmSeen(walk.now, (claimed(0, ME, walk.now + 60),)))
    assert walk.state.work
    assert walk.state.work.epoch == 1
    assert walk.state.phase == "training"


def test_too_many_unjudged_checkpoints_hold_the_trainer_without_hot_loop():
    walk = Walk().training()
    for epoch, parent in ((1, None), (2, "d1"), (3, "d2")):
        walk.progress(epoch, waiting=epoch == 3)
        walk.checkpoint(epoch, parent)
    walk.feed(m.OfferAnswered(walk.now, "d1", "unreachable"))
    for _ in range(100):
        walk.tick()
        for action in walk.said(m.PublishCheckpoint):
            walk.feed(m.OfferAnswered(walk.now, action.candidate.digest, "unreachable"))  # type: ignore[union-attr]
    assert walk.now > T + 300, "time passes"
    assert walk.state.work
    assert walk.state.work.trainer == "on"
    assert walk.state.phase == "training"


def test_offers_are_repeated_with_growing_pauses():
    walk = Walk().training()
    walk.checkpoint(1, None)
    times = []
    for _ in range(6):
        walk.feed(m.OfferAnswered(walk.now, "d1", "unreachable"))
        walk.progress(1)
        walk.until(m.PublishCheckpoint, limit=100)
        times.append(walk.now)
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert gaps == sorted(gaps)
    assert gaps[-1] > 15


def test_refused_checkpoint_is_trained_again_once_then_the_shard_is_given_up():
    walk = Walk().training()
    walk.checkpoint(1, None)
    actions = walk.feed(m.OfferAnswered(walk.now, "d1", "invalid", "held-out loss is worse"))
    assert m.DiscardWork(0, 0) in actions
    assert m.Sync(0, 0, None) in actions
    walk.feed(m.SyncDone(walk.now, 0, 0, None))
    walk.checkpoint(1, None)
    walk.feed(m.OfferAnswered(walk.now, "d1", "invalid", "held-out loss is worse"))
    assert walk.state.phase == "idle"
    assert walk.state.shunned[0] > walk.now


def test_a_box_whose_results_cannot_be_judged_leaves_the_work_to_others_for_a_while():
    walk = Walk().training()
    walk.checkpoint(1, None)
    for times in range(1, RULES.unjudged_limit + 1):
        assert walk.state.work, f"patient after {times - 1}"
        actions = walk.feed(m.OfferAnswered(walk.now, "d1", "inconclusive", "its weights did not arrive", retry_after=60.0))
        walk.now += 61
    assert m.StopTrainer(True) in actions, "what was trained stays on disk"
    assert m.PublishClaim(m.Claim(0, 0, 0, "released")) in actions
    assert walk.state.phase == "idle"
    assert set(walk.state.shunned) == set(range(RULES.shards)), "another shard would fare no better"
    assert "cannot judge its checkpoint (its weights did not arrive)" in walk.state.why


def test_rounds_that_end_in_an_acceptance_are_forgotten():
    walk = Walk().training()
    walk.checkpoint(1, None)
    for _ in range(RULES.unjudged_limit - 1):
        walk.feed(m.OfferAnswered(walk.now, "d1", "inconclusive", "its weights did not arrive"))
    walk.feed(m.OfferAnswered(walk.now, "d1", "accepted"))
    assert walk.state.work
    assert walk.state.work.unjudged == 0


def test_recovered_checkpoints_are_offered_after_a_restart():
    walk = Walk().syncing()
    kept = (m.OwnCheckpoint(0, 1, "d1", None), m.OwnCheckpoint(0, 2, "d2", "d1"))
    actions = walk.feed(m.SyncDone(walk.now, 0, 0, None, kept))
    assert m.PublishCheckpoint(kept[0]) in actions
    assert walk.state.work
    assert walk.state.work.at == 2
