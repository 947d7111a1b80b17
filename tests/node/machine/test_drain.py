"""A node that finishes waits for the verdict on its results, within limits, and logs why it leaves."""

from __future__ import annotations

import pytest

from lutetia.node.machine import messages as m
from tests.node.machine.machine_driver import MachineDriver


def paused_with_a_result() -> MachineDriver:
    machine = MachineDriver().training()
    machine.checkpoint(1, None)
    machine.feed(m.UserVerb(machine.now, "pause"))
    assert machine.state.phase == "paused"
    return machine


def test_finish_while_paused_waits_for_the_verdict():
    machine = paused_with_a_result()
    machine.feed(m.UserVerb(machine.now, "finish"))
    assert (machine.state.phase, machine.state.why) == ("draining", "waiting for the last checkpoint to be accepted")
    machine.feed(m.OfferAnswered(machine.now, "d1", "accepted"))
    assert machine.state.phase == "left"
    assert "accepted" in machine.state.why


def test_finish_while_paused_leaves_after_its_patience():
    machine = paused_with_a_result()
    machine.feed(m.UserVerb(machine.now, "finish"))
    assert machine.seconds_to_leave("queued") >= machine.rules.lease
    assert "stays on this disk and is offered again" in machine.state.why


def test_finish_while_paused_without_results_leaves_at_once():
    machine = MachineDriver().training()
    machine.feed(m.UserVerb(machine.now, "pause"))
    machine.feed(m.UserVerb(machine.now, "finish"))
    assert machine.state.phase == "left"


def draining() -> MachineDriver:
    machine = MachineDriver().training()
    machine.progress(0)
    machine.feed(m.UserVerb(machine.now, "finish"))
    assert machine.state.phase == "draining"
    return machine


def reports(machine: MachineDriver) -> str:
    return "; ".join(action.text for action in machine.actions_of(m.LogSentence))  # type: ignore[union-attr]


def handed_in(machine: MachineDriver) -> None:
    """The trainer restarts, the checkpoint is accepted, and the node leaves."""
    started = machine.until(m.StartTrainer)
    assert isinstance(started, m.StartTrainer)
    assert (started.run, started.until) == (2, 1)
    machine.checkpoint(1, None)
    assert m.StopTrainer(save=False) in machine.actions
    machine.feed(m.OfferAnswered(machine.now, "d1", "accepted"))
    assert (machine.state.phase, machine.state.why) == ("left", "the last checkpoint is accepted; leaving")


@pytest.mark.parametrize("reason", ["crash", "out-of-memory"])
def test_drain_restarts_a_failed_trainer(reason: m.Exit):
    machine = draining()
    machine.feed(m.TrainerExited(machine.now, 1, reason, "it was killed by signal 9"))
    assert machine.state.phase == "draining"
    handed_in(machine)


def test_finish_during_backoff_waits_for_the_restart():
    machine = MachineDriver().training()
    machine.progress(0)
    machine.feed(m.TrainerExited(machine.now, 1, "crash", "oops"))
    machine.feed(m.UserVerb(machine.now, "finish"))
    assert machine.state.phase == "draining"
    handed_in(machine)


def test_drain_acceptance_does_not_cancel_the_restart():
    machine = MachineDriver().training()
    machine.checkpoint(1, None)
    machine.progress(1)
    machine.feed(m.UserVerb(machine.now, "finish"))
    machine.feed(m.TrainerExited(machine.now, 1, "crash", "oops"))
    machine.feed(m.OfferAnswered(machine.now, "d1", "accepted"))
    assert machine.state.phase == "draining"
    started = machine.until(m.StartTrainer)
    assert isinstance(started, m.StartTrainer)
    assert started.until == 2


def test_drain_ends_after_the_crash_limit():
    machine = draining()
    for _ in range(machine.rules.crash_limit + 1):
        assert machine.state.phase == "draining"
        if machine.state.work and machine.state.work.trainer == "off":
            machine.until(m.StartTrainer)
        machine.feed(m.TrainerExited(machine.now, machine.state.trainers_started, "crash", "oops"))
    assert machine.state.phase == "left"
    assert "accepted" not in machine.state.why
    assert "failed 7 times in a row" in reports(machine)


@pytest.mark.parametrize("reason", ["hardware", "bad-shard", "bad-state"])
def test_drain_ends_when_a_restart_cannot_help(reason: m.Exit):
    machine = draining()
    machine.feed(m.TrainerExited(machine.now, 1, reason, "oops"))
    assert machine.state.phase == "left"
    assert machine.state.why == "the shard was released; leaving"
    assert "oops" in reports(machine)


def test_drain_on_a_full_disk_ends_and_says_what_is_kept():
    machine = draining()
    machine.feed(m.TrainerExited(machine.now, 1, "disk-full", "cannot write /box: no space left on device"))
    assert machine.state.phase == "left"
    assert machine.state.why.startswith("the trainer failed (cannot write /box: no space left on device)")
    assert "not finished" in machine.state.why


def test_resume_after_finish_looks_for_a_shard():
    machine = paused_with_a_result()
    machine.feed(m.UserVerb(machine.now, "finish"))
    machine.feed(m.UserVerb(machine.now, "resume"))
    assert machine.state.phase == "idle"
    assert machine.state.work is None, "it holds no lease"


def test_leave_while_paused_does_not_wait():
    machine = paused_with_a_result()
    machine.feed(m.UserVerb(machine.now, "leave"))
    assert machine.state.phase == "left"
