"""Carries out the steps of a plan: joins, deaths, partitions and lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lutetia.node.machine import messages as m
from lutetia.simulation.faults.forgery import forge
from lutetia.simulation.faults.step import Step
from lutetia.simulation.peers.coordinator import SimulatedCoordinator
from lutetia.simulation.peers.manifest_updates import upgrade
from lutetia.simulation.peers.node import SimulatedNode

if TYPE_CHECKING:
    from lutetia.simulation.world import SimulatedWorld


def carry_out(world: SimulatedWorld, step: Step) -> None:
    if world.trace is not None:
        world.queue.cause = -1
        world.trace.step(step)
    if step.action in _ONE_BY_ONE:
        for index in step.nodes:
            _ONE_BY_ONE[step.action](world.nodes[index], step)
    else:
        _ALL[step.action](world, step)


def schedule(world: SimulatedWorld, steps: Sequence[Step]) -> None:
    for step in steps:
        world.queue.after(step.at, carry_out, world, step)


def _command(verb: m.Verb) -> Callable[[SimulatedNode, Step], None]:
    def give(peer: SimulatedNode, step: Step) -> None:
        until = peer.clock() + step.value if verb == "pause" and step.value else None
        for device in peer.devices:
            device.feed(device.boot, m.UserVerb, verb, until)

    return give


def _disk_full(peer: SimulatedNode, step: Step) -> None:
    for device in peer.devices:
        device.disk_full = True
        device.feed(device.boot, m.DiskFull, "the disk is full; free some space")


def _disk_free(peer: SimulatedNode, step: Step) -> None:
    for device in peer.devices:
        device.disk_full = False
        device.feed(device.boot, m.DiskFree)


def _disk_lost(peer: SimulatedNode, step: Step) -> None:
    """The disk fails, and the node dies with it."""
    held = [parcel for parcel, holders in peer.world.blobs.holders.items() if peer.index in holders]
    peer.kill()
    peer.trainer.wipe()
    peer.world.invariants.after_loss(held)


def _device(works: bool) -> Callable[[SimulatedNode, Step], None]:
    """The last device of the node, if it has several."""

    def switch(peer: SimulatedNode, step: Step) -> None:
        device = peer.devices[-1]
        device.device_ok = works
        if not works:
            device.trainer.fail("hardware", "the device has fallen off the bus")

    return switch


def _skew(peer: SimulatedNode, step: Step) -> None:
    """The clock jumps by `value` seconds."""
    for device in peer.devices:
        device.skew += step.value
        device.feed(device.boot, m.ClockTick)


def _corrupt(peer: SimulatedNode, step: Step) -> None:
    """All blobs that this node holds are corrupt from now on, as on a failing disk."""
    for parcel in list(peer.world.blobs.holders):
        peer.world.blobs.corrupt.add((peer.index, parcel))


def _behaviour(peer: SimulatedNode, step: Step) -> None:
    for device in peer.devices:
        device.trainer.behaviour = step.detail  # pyright: ignore[reportAttributeAccessIssue]


def _audits(peer: SimulatedNode, step: Step) -> None:
    peer.auditor.policy = step.detail  # pyright: ignore[reportAttributeAccessIssue]


def _checks(peer: SimulatedNode, step: Step) -> None:
    peer.checker.policy = step.detail  # pyright: ignore[reportAttributeAccessIssue]


def _hide(peer: SimulatedNode, step: Step) -> None:
    """From now on the replica returns no record."""
    peer.denies = True
    peer.world.dht.changed(peer)


def _copy_identity(world: SimulatedWorld, step: Step) -> None:
    """The second node runs with a copy of the first one's key."""
    first, second = (world.nodes[index] for index in step.nodes)
    machine = replace(second.machine, owner=first.machine.owner, identity=first.machine.identity, peer_id=first.machine.peer_id)
    second.kill()
    world.nodes[second.index] = SimulatedNode(world, second.index, machine)
    world.nodes[second.index].start()


def _second_coordinator(world: SimulatedWorld, step: Step) -> None:
    """A second coordinator starts with the same key on a copy of the ledger."""
    twin = SimulatedCoordinator(world, -2, ledger=list(world.coordinators[0].ledger))
    world.blobs.origins.add(-2)
    world.coordinators.append(twin)
    twin.start()


def _old_ledger(world: SimulatedWorld, step: Step) -> None:
    """The coordinator crashes, and its folder is replaced by a copy that is `value` seconds old."""
    coordinator = world.coordinators[0]
    coordinator.crash()
    coordinator.ledger = [event for event in coordinator.ledger if event.time <= world.queue.now - step.value]


def _upgrade(world: SimulatedWorld, step: Step) -> None:
    """The owner raises the budget by `value` epochs."""
    upgrade(world, {"samples_per_shard": world.manifest.samples_per_shard + int(step.value) * world.manifest.checkpoint_samples})


def _partition(world: SimulatedWorld, step: Step) -> None:
    """Cut `nodes` off from all others. `detail` "with": the coordinator is on their side; "with the second": the second one."""
    side = {"with": (-1,), "with the second": (-2,)}.get(step.detail, ())
    world.links.partition([[*step.nodes, *side]])


def _block(world: SimulatedWorld, step: Step) -> None:
    """The first node cannot dial the others, but they can dial it."""
    for target in step.nodes[1:]:
        world.links.block(step.nodes[0], target)


def _loss(world: SimulatedWorld, step: Step) -> None:
    world.links.loss = step.value


def _latency(world: SimulatedWorld, step: Step) -> None:
    """`value`: median in seconds; `detail`: jitter to either side in seconds."""
    world.links.draw(world.config, step.value, float(step.detail or 0))


def _crash_after_writing(world: SimulatedWorld, step: Step) -> None:
    world.coordinators[0].refuse_publishing = True


_ONE_BY_ONE: dict[str, Callable[[SimulatedNode, Step], None]] = {
    "join": lambda peer, step: peer.start(),
    "kill": lambda peer, step: peer.kill(),
    "stop": lambda peer, step: peer.freeze(),
    "continue": lambda peer, step: peer.thaw(),
    "finish": _command("finish"),
    "leave": _command("leave"),
    "pause": _command("pause"),
    "resume": _command("resume"),
    "network process dies": lambda peer, step: peer.lose_network(),
    "trainer fails": lambda peer, step: peer.trainer.fail(step.detail or "crash"),  # pyright: ignore[reportArgumentType]
    "disk full": _disk_full,
    "disk free": _disk_free,
    "disk lost": _disk_lost,
    "device lost": _device(False),
    "device back": _device(True),
    "clock jumps": _skew,
    "serves corrupt bytes": _corrupt,
    "behaviour": _behaviour,
    "audits without replay": _audits,
    "checks": _checks,
    "slow link": lambda peer, step: peer.world.links.slow.__setitem__(peer.index, step.value),
    "hides records": _hide,
    "newer version": lambda peer, step: setattr(peer.network, "newer", True),
}
_ALL: dict[str, Callable[[SimulatedWorld, Step], None]] = {
    "partition": _partition,
    "heal": lambda world, step: world.links.heal(),
    "one-way": _block,
    "loss": _loss,
    "latency": _latency,
    "coordinator crashes": lambda world, step: world.coordinators[0].crash(),
    "coordinator dies before publishing": _crash_after_writing,
    "coordinator starts": lambda world, step: world.coordinators[0].start(recover=step.detail == "recover"),
    "old ledger": _old_ledger,
    "budget raised": _upgrade,
    "second coordinator": _second_coordinator,
    "copied identity": _copy_identity,
    "forgery": lambda world, step: forge(world, step.nodes[0], step.nodes[1], step.detail),
}
