"""A machine that is one device of several: it leaves their shards alone, is probed when hardware changes, and may go."""

from __future__ import annotations

from lutetia.node.machine import messages as m
from lutetia.protocol.claims import ShardView
from tests.node.machine.machine_driver import ME, MachineDriver, claimed


def test_shard_of_another_device_is_not_claimed_until_it_is_freed():
    """Both claims are of one peer, so the claim of the other device alone would look like one from before a restart."""
    node = MachineDriver().idle()
    node.feed(m.ShardsTaken(node.now, frozenset({0, 1})))
    node.feed(m.SwarmSeen(node.now, (claimed(0, ME, node.now + 60), ShardView(1))))
    assert node.state.phase == "idle"
    assert "other devices of this node" in node.state.why
    node.tick()
    assert not node.actions_of(m.LookAtShards), "it does not look at them again and again"
    assert m.LookAtShards((1,)) in node.feed(m.ShardsTaken(node.now, frozenset({0})))
    node.feed(m.SwarmSeen(node.now, (ShardView(1),)))
    assert (node.state.phase, node.state.target) == ("claiming", 1)


def test_device_that_failed_is_probed_at_once_when_the_hardware_changes():
    node = MachineDriver()
    node.feed(m.Joined(node.now))
    node.feed(m.ProbeFailed(node.now, "no driver"))
    assert not node.actions_of(m.ProbeHardware)
    node.feed(m.HardwareChanged(node.now))
    assert node.actions_of(m.ProbeHardware)
    assert not MachineDriver().training().feed(m.HardwareChanged(node.now)), "a device at work goes on"


def test_device_that_is_gone_hands_its_shard_back_and_offers_what_is_whole():
    node = MachineDriver().training()
    node.feed(m.DeviceGone(node.now, "cuda:1 is gone"))
    assert node.actions_of(m.StopTrainer)
    assert [action.claim.state for action in node.actions_of(m.PublishClaim)] == ["released"]  # type: ignore[union-attr]
    assert (node.state.phase, node.state.why) == ("left", "cuda:1 is gone")

    node = MachineDriver().training()
    node.checkpoint(1, None)
    node.feed(m.DeviceGone(node.now, "cuda:1 is gone"))
    assert node.state.phase == "draining"
    assert node.actions_of(m.PublishClaim)
    assert not node.actions_of(m.StartTrainer)
    node.feed(m.OfferAnswered(node.now, "d1", "accepted"))
    assert node.state.phase == "left"
