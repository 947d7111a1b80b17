"""A node that is asked to finish does not exit while a result of its own is undecided and its time is not over, and says so."""

from __future__ import annotations

from lutetia.node import messages as m

from .walk import Walk


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
