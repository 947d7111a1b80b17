"""A node that is asked to finish does not exit while a result of its own is undecided and its time is not over, and says so."""

from __future__ import annotations

import pytest

from lutetia.node.machine import messages as m
from tests.node.machine.machine_driver import Walk


def paused_with_a_result() -> Walk:
    walk = Walk().training()
    walk.checkpoint(1, None)
    walk.feed(m.UserVerb(walk.now, "pause"))
    assert walk.state.phase == "paused"
    return walk


def test_finish_during_a_pause_waits_for_the_verdict():
    walk = paused_with_a_result()
    walk.feed(m.UserVerb(walk.now, "finish"))
    assert (walk.state.phase, walk.state.why) == ("draining", "waiting for the last checkpoint to be accepted")
    walk.feed(m.OfferAnswered(walk.now, "d1", "accepted"))
    assert walk.state.phase == "left"
    assert "accepted" in walk.state.why


def test_finish_during_a_pause_ends_when_its_time_is_over_and_says_what_becomes_of_the_result():
    walk = paused_with_a_result()
    walk.feed(m.UserVerb(walk.now, "finish"))
    assert walk.leaves_under("queued") >= walk.rules.lease
    assert "stays on this disk and is offered again" in walk.state.why


def test_a_pause_without_results_needs_no_waiting():
    walk = Walk().training()
    walk.feed(m.UserVerb(walk.now, "pause"))
    walk.feed(m.UserVerb(walk.now, "finish"))
    assert walk.state.phase == "left"


def draining() -> Walk:
    walk = Walk().training()
    walk.progress(0)
    walk.feed(m.UserVerb(walk.now, "finish"))
    assert walk.state.phase == "draining"
    return walk


def reports(walk: Walk) -> str:
    return "; ".join(action.text for action in walk.said(m.LogSentence))  # type: ignore[union-attr]


def handed_in(walk: Walk) -> None:
    """From the restart to the end."""
    started = walk.until(m.StartTrainer)
    assert isinstance(started, m.StartTrainer)
    assert (started.run, started.until) == (2, 1)
    walk.checkpoint(1, None)
    assert m.StopTrainer(save=False) in walk.actions
    walk.feed(m.OfferAnswered(walk.now, "d1", "accepted"))
    assert (walk.state.phase, walk.state.why) == ("left", "the last checkpoint is accepted; leaving")


@pytest.mark.parametrize("reason", ["crash", "out-of-memory"])
def test_a_trainer_that_fails_while_the_node_finishes_is_restarted_and_its_work_handed_in(reason: m.Exit):
    walk = draining()
    walk.feed(m.TrainerExited(walk.now, 1, reason, "it was killed by signal 9"))
    assert walk.state.phase == "draining"
    handed_in(walk)


def test_finish_during_a_back_off_waits_for_the_restart():
    walk = Walk().training()
    walk.progress(0)
    walk.feed(m.TrainerExited(walk.now, 1, "crash", "oops"))
    walk.feed(m.UserVerb(walk.now, "finish"))
    assert walk.state.phase == "draining"
    handed_in(walk)


def test_a_result_that_is_accepted_meanwhile_does_not_end_the_wait_for_the_restart():
    walk = Walk().training()
    walk.checkpoint(1, None)
    walk.progress(1)
    walk.feed(m.UserVerb(walk.now, "finish"))
    walk.feed(m.TrainerExited(walk.now, 1, "crash", "oops"))
    walk.feed(m.OfferAnswered(walk.now, "d1", "accepted"))
    assert walk.state.phase == "draining"
    started = walk.until(m.StartTrainer)
    assert isinstance(started, m.StartTrainer)
    assert started.until == 2


def test_a_trainer_that_fails_again_and_again_ends_the_wait_and_nothing_is_said_to_be_accepted():
    walk = draining()
    for _ in range(walk.rules.crash_limit + 1):
        assert walk.state.phase == "draining"
        if walk.state.work and walk.state.work.trainer == "off":
            walk.until(m.StartTrainer)
        walk.feed(m.TrainerExited(walk.now, walk.state.trainers, "crash", "oops"))
    assert walk.state.phase == "left"
    assert "accepted" not in walk.state.why
    assert "failed 7 times in a row" in reports(walk)


@pytest.mark.parametrize("reason", ["hardware", "bad-shard", "bad-state"])
def test_a_failure_that_no_restart_mends_ends_the_wait(reason: m.Exit):
    walk = draining()
    walk.feed(m.TrainerExited(walk.now, 1, reason, "oops"))
    assert walk.state.phase == "left"
    assert walk.state.why == "the shard was let go; leaving"
    assert "oops" in reports(walk)


def test_a_full_disk_ends_the_wait_and_says_what_becomes_of_the_work():
    walk = draining()
    walk.feed(m.TrainerExited(walk.now, 1, "disk-full", "cannot write /box: no space left on device"))
    assert walk.state.phase == "left"
    assert walk.state.why.startswith("the trainer failed (cannot write /box: no space left on device)")
    assert "not finished" in walk.state.why


def test_called_off_it_looks_for_a_shard_anew():
    walk = paused_with_a_result()
    walk.feed(m.UserVerb(walk.now, "finish"))
    walk.feed(m.UserVerb(walk.now, "resume"))
    assert walk.state.phase == "idle"
    assert walk.state.work is None, "it holds no lease any more"


def test_leave_does_not_wait():
    walk = paused_with_a_result()
    walk.feed(m.UserVerb(walk.now, "leave"))
    assert walk.state.phase == "left"
