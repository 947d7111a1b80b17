"""What happens to the swarm from outside: joins, deaths, cuts and lies, each a step at its time. A plan is a list of them."""

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
    if step.what in _ONE_BY_ONE:
        for index in step.who:
            _ONE_BY_ONE[step.what](world.nodes[index], step)
    else:
        _ALL[step.what](world, step)


def plan(world: SimulatedWorld, steps: Sequence[Step]) -> None:
    for step in steps:
        world.queue.after(step.at, carry_out, world, step)


def _say(verb: m.Verb) -> Callable[[SimulatedNode, Step], None]:
    def tell(peer: SimulatedNode, step: Step) -> None:
        until = peer.clock() + step.value if verb == "pause" and step.value else None
        peer.hear(peer.boot, m.UserVerb, verb, until)

    return tell


def _disk_full(peer: SimulatedNode, step: Step) -> None:
    peer.disk_full = True
    peer.hear(peer.boot, m.DiskFull, "the disk is full; free some space")


def _disk_free(peer: SimulatedNode, step: Step) -> None:
    peer.disk_full = False
    peer.hear(peer.boot, m.DiskFree)


def _disk_lost(peer: SimulatedNode, step: Step) -> None:
    """The disk dies, and the box with it."""
    held = [parcel for parcel, holders in peer.world.blobs.holders.items() if peer.index in holders]
    peer.kill()
    peer.trainer.wipe()
    peer.world.invariants.after_loss(held)


def _device(works: bool) -> Callable[[SimulatedNode, Step], None]:
    def turn(peer: SimulatedNode, step: Step) -> None:
        peer.device_ok = works
        if not works:
            peer.trainer.fail("hardware", "the device has fallen off the bus")

    return turn


def _skew(peer: SimulatedNode, step: Step) -> None:
    """The clock jumps by `value` seconds."""
    peer.skew += step.value
    peer.hear(peer.boot, m.ClockTick)


def _spoil(peer: SimulatedNode, step: Step) -> None:
    """Everything that this box serves from now on is bad, as a failing disk makes it."""
    for parcel in list(peer.world.blobs.holders):
        peer.world.blobs.rotten.add((peer.index, parcel))


def _conduct(peer: SimulatedNode, step: Step) -> None:
    peer.trainer.conduct = step.word  # pyright: ignore[reportAttributeAccessIssue]


def _audits(peer: SimulatedNode, step: Step) -> None:
    peer.auditor.word = step.word  # pyright: ignore[reportAttributeAccessIssue]


def _copy_identity(world: SimulatedWorld, step: Step) -> None:
    """The second box runs with a copy of the first one's key."""
    first, second = (world.nodes[index] for index in step.who)
    machine = replace(second.machine, owner=first.machine.owner, identity=first.machine.identity, peer_id=first.machine.peer_id)
    second.kill()
    world.nodes[second.index] = SimulatedNode(world, second.index, machine)
    world.nodes[second.index].start()


def _second_coordinator(world: SimulatedWorld, step: Step) -> None:
    """Somebody starts another coordinator with the same key on a copy of the ledger."""
    twin = SimulatedCoordinator(world, -2, ledger=list(world.coordinators[0].ledger))
    world.blobs.origins.add(-2)
    world.coordinators.append(twin)
    twin.start()


def _old_ledger(world: SimulatedWorld, step: Step) -> None:
    """While the coordinator is down, its folder is replaced by a copy that is `value` seconds old."""
    coordinator = world.coordinators[0]
    coordinator.crash()
    coordinator.ledger = [event for event in coordinator.ledger if event.time <= world.queue.now - step.value]


def _upgrade(world: SimulatedWorld, step: Step) -> None:
    """The owner raises the budget by `value` epochs."""
    upgrade(world, {"samples_per_shard": world.manifest.samples_per_shard + int(step.value) * world.manifest.checkpoint_samples})


def _partition(world: SimulatedWorld, step: Step) -> None:
    """The boxes named are cut off from the others. `word` "with" takes the coordinator along, "with the second" another one."""
    along = {"with": (-1,), "with the second": (-2,)}.get(step.word, ())
    world.links.partition([[*step.who, *along]])


def _block(world: SimulatedWorld, step: Step) -> None:
    """The first box cannot dial the others, which can dial it."""
    for target in step.who[1:]:
        world.links.block(step.who[0], target)


def _loss(world: SimulatedWorld, step: Step) -> None:
    world.links.loss = step.value


def _latency(world: SimulatedWorld, step: Step) -> None:
    """`value` seconds in the median; `word`: jitter to either side."""
    world.links.draw(world.config, step.value, float(step.word or 0))


def _crash_after_writing(world: SimulatedWorld, step: Step) -> None:
    world.coordinators[0].refuse_publishing = True


_ONE_BY_ONE: dict[str, Callable[[SimulatedNode, Step], None]] = {
    "join": lambda peer, step: peer.start(),
    "kill": lambda peer, step: peer.kill(),
    "stop": lambda peer, step: peer.freeze(),
    "continue": lambda peer, step: peer.thaw(),
    "finish": _say("finish"),
    "leave": _say("leave"),
    "pause": _say("pause"),
    "resume": _say("resume"),
    "network process dies": lambda peer, step: peer.lose_network(),
    "trainer fails": lambda peer, step: peer.trainer.fail(step.word or "crash"),  # pyright: ignore[reportArgumentType]
    "disk full": _disk_full,
    "disk free": _disk_free,
    "disk lost": _disk_lost,
    "device lost": _device(False),
    "device back": _device(True),
    "clock jumps": _skew,
    "serves bad bytes": _spoil,
    "conduct": _conduct,
    "audits without replay": _audits,
    "slow line": lambda peer, step: peer.world.links.slow.__setitem__(peer.index, step.value),
    "denies records": lambda peer, step: setattr(peer, "denies", True),
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
    "coordinator starts": lambda world, step: world.coordinators[0].start(recover=step.word == "recover"),
    "old ledger": _old_ledger,
    "budget raised": _upgrade,
    "second coordinator": _second_coordinator,
    "copied identity": _copy_identity,
    "forgery": lambda world, step: forge(world, step.who[0], step.who[1], step.word),
}
