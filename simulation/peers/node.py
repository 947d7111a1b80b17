"""One node: the real state machine, and a model of the shell around it (clock, timers, network, trainer)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lutetia.node.machine import messages as m
from lutetia.node.machine.state import MachineState, NodeRules, next_wake
from lutetia.node.pacing import tick_pause
from lutetia.simulation.config import SimulatedMachine
from lutetia.simulation.interfaces import World
from lutetia.simulation.network.blobs import drive
from lutetia.simulation.peers.auditor import SimulatedAuditor
from lutetia.simulation.peers.lent_checks import SimulatedChecker
from lutetia.simulation.peers.manifest_updates import SimulatedManifestUpdates
from lutetia.simulation.peers.node_network import SimulatedNodeNetwork
from lutetia.simulation.peers.streams import offer_round, sync_round
from lutetia.simulation.peers.trainer import SimulatedTrainer

_PROBE_SECONDS = 0.5
_LEAVE_SECONDS = 1.0
_TICK = 1e-6  # so that no timer comes too early by a rounding error


class SimulatedNode:
    """A node, or a further device of one: `host` is the node that it belongs to, else it is its own host.

    A device has a state machine and a trainer of its own. Identity, network, disk and process are its host's, which starts, kills
    and stops all its devices. `boot` counts the starts, so that answers to an earlier process do not reach a later one.
    """

    def __init__(self, world: World, index: int, machine: SimulatedMachine, host: SimulatedNode | None = None) -> None:
        self.world, self.index, self.machine = world, index, machine
        self._queue = world.queue
        self.host: SimulatedNode = self if host is None else host
        self.devices: list[SimulatedNode] = [self]
        if host is not None:
            host.devices.append(self)
        self.access_latency, self.up, self.skew = machine.access_latency, machine.up, machine.skew
        self.rules = NodeRules.of(world.manifest, machine.owner)
        """Of the manifest version on its disk."""
        self.state = MachineState()
        self.running = self.online = self.frozen = self.denies = self.disk_full = False
        self.device_ok = True
        self.met = False
        self.boot = self.joins = self.sync_number = 0
        self.parts: dict[str, dict[str, Any]] = {}
        self.network = SimulatedNodeNetwork(self)
        self.trainer = SimulatedTrainer(self)
        self.auditor, self.checker = SimulatedAuditor(self), SimulatedChecker(self)
        self.manifest_updates = SimulatedManifestUpdates(self)
        self.holds: int | None = None
        self.eligible_since: float | None = None
        self._backlog: list[tuple[Callable[..., m.Event], tuple[Any, ...]]] = []
        self._timer = float("inf")
        self._armed: tuple[MachineState, float | None] | None = None
        """The state at the last look at its next wake, and what that was."""

    def __repr__(self) -> str:
        return f"node {self.index}"

    @property
    def answering(self) -> bool:
        return self.running and self.online and not self.frozen

    def clock(self) -> float:
        return self._queue.now + self.skew

    # --- life -----------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the process, with what its disk holds."""
        if self.running:
            return
        for device in self.devices:
            device._boot()
        self._join(self.boot, 1)

    def _boot(self) -> None:
        self.boot += 1
        self.running, self.frozen, self.online = True, False, False
        remembered = frozenset(shard for shard, disk in self.trainer.disks.items() if disk.kept or disk.local)
        self.state = MachineState(since=self.clock(), remembered=remembered)
        self._timer = float("inf")

    def _join(self, boot: int, attempt: int) -> None:
        """Dial the bootstrap peers and, if this node has been online before, the peers that it met."""
        if boot != self.boot or not self.running or self.online:
            return
        if not self.world.can_join(self):
            self.world.queue.after(self.rules.backoff(attempt, "rejoin"), self._join, boot, attempt + 1)
            return
        self.world.queue.after(6 * self.world.links.packet(self, self), self._joined, boot)

    def _joined(self, boot: int) -> None:
        if boot != self.boot or not self.running or self.online:
            return
        self.met = True
        first = self.state.phase == "joining"
        for device in self.devices:
            device.online = True
            device.joins += 1
        self.world.dht.enter(self, self.machine.peer_id)
        for device in self.devices:
            device.feed(device.boot, m.Joined if first else m.NetworkBack)
        if first:
            self.auditor.begin(boot)
            if self.world.config.lent:
                self.checker.begin(boot)
            self.manifest_updates.begin(boot)
        for device in self.devices:
            device.network.joined()
        self.network.begin(boot)

    def lose_network(self) -> None:
        """p2pd died; it is restarted at once."""
        if self.online:
            for device in self.devices:
                device.online = False
            self.world.dht.depart(self)
            for device in self.devices:
                device.feed(device.boot, m.NetworkLost)
            self._join(self.boot, 1)

    def kill(self) -> None:
        """SIGKILL, or a power cut."""
        if not self.running:
            return
        for device in self.devices:
            device.trainer.stop(save=False)
        self._end()

    def _end(self) -> None:
        online = self.online
        for device in self.devices:
            device.running = device.frozen = device.online = False
            device.boot += 1
            device._backlog.clear()
        if online:
            self.world.dht.depart(self)
        for device in self.devices:
            self.world.invariants.after_peer(device)

    def freeze(self) -> None:
        """SIGSTOP, or a closed lid: only the clock runs on."""
        if self.running and not self.frozen:
            for device in self.devices:
                device.trainer.freeze()
                device.frozen = True
            self.world.dht.changed(self)

    def thaw(self) -> None:
        if not self.frozen:
            return
        for device in self.devices:
            device.frozen = False
        self.world.dht.changed(self)
        for device in self.devices:
            device._wake_up()

    def _wake_up(self) -> None:
        self.trainer.thaw()
        backlog, self._backlog = self._backlog, []
        for kind, arguments in backlog:
            self.feed(self.boot, kind, *arguments)
        if self.running:
            self.feed(self.boot, m.ClockTick)

    # --- the machine ----------------------------------------------------------------------------------------------------

    def soon(self, kind: Callable[..., m.Event], *arguments: Any) -> None:
        """Feed an event at once, but not within the current call of the machine."""
        self.world.queue.after(0.0, self.feed, self.boot, kind, *arguments)

    def feed(self, boot: int, kind: Callable[..., m.Event], *arguments: Any) -> None:
        """Feed the machine an event of this moment; a frozen process gets it when it wakes."""
        if boot != self.boot or not self.running:
            return
        if self.frozen:
            self._backlog.append((kind, arguments))
            return
        world = self.world
        event = kind(self._queue.now + self.skew, *arguments)
        if kind is m.TrainerExited:
            self.trainer.exiting = False
        before = self.state.phase
        self.state, actions = world.decide.advance(self.rules, self.state, event)
        if world.trace is not None:
            world.trace.machine(self, event, before, actions)
        for action in actions:
            if type(action) is not m.LogSentence:
                _HANDLERS[type(action)](self, action)
        world.invariants.after_peer(self)
        if self.running:
            self._arm()
        if len(self.host.devices) > 1:
            self._tell_others()

    def _tell_others(self) -> None:
        """Tell each device of the node which slots the others have, as `NodeShell.device_changed`."""
        devices = self.host.devices
        used = [device.slots_in_use for device in devices]
        for device in devices:
            taken = frozenset[int]().union(*(slots for other, slots in zip(devices, used, strict=True) if other is not device))
            if device.running and device.state.phase != "left" and taken != device.state.taken:
                device.feed(device.boot, m.ShardsTaken, taken)

    @property
    def slots_in_use(self) -> frozenset[int]:
        """Slots that no other device of the node may take."""
        state, training = self.state, self.trainer.training
        used = {training.shard} if training else set[int]()
        if (work := state.work) and (work.owned or work.pending or work.trainer == "on"):
            used.add(work.shard)
        return frozenset(used if state.target is None else used | {state.target})

    def _arm(self) -> None:
        due = next_wake(self.rules, self.state)
        self._armed = self.state, due
        if due is None:
            return
        now = self._queue.now
        wait = tick_pause(due, now + self.skew, self.rules.heartbeat) + _TICK
        if self._timer > now + wait or self._timer < now:
            self._timer = now + wait
            self._queue.after(wait, self._wake, self.boot, self._timer)

    def _wake(self, boot: int, timer: float) -> None:
        if boot != self.boot or timer != self._timer:
            return
        self._timer = float("inf")
        if self.frozen:
            self._backlog.append((m.ClockTick, ()))
            return
        known = self._armed
        due = known[1] if known is not None and known[0] is self.state else next_wake(self.rules, self.state)
        if due is not None and due <= self.clock():
            self.feed(boot, m.ClockTick)
        elif self.running:
            self._arm()

    # --- what the machine asks for ----------------------------------------------------------------------------------------

    def _probe(self, action: m.ProbeHardware) -> None:
        self.world.queue.after(_PROBE_SECONDS, self._probed, self.boot)

    def _probed(self, boot: int) -> None:
        if self.device_ok:
            self.feed(boot, m.Probed, self.machine.fitness, self.trainer.rate)
        else:
            self.feed(boot, m.ProbeFailed, "no driver")

    def _look(self, action: m.LookAtShards) -> None:
        if self.online:
            self.network.look(action.shards)

    def _publish_claim(self, action: m.PublishClaim) -> None:
        if self.online:
            self.network.publish_claim(action.claim)

    def _renew(self, action: m.RenewRecords) -> None:
        if self.online:
            self.network.renew(action.claim)

    def _sync(self, action: m.Sync) -> None:
        self.sync_number += 1
        boot, number = self.boot, self.sync_number

        def done(event: tuple[Any, ...]) -> None:
            if number == self.sync_number and self.state.phase == "syncing":
                self.feed(boot, *event)

        drive(self.world.queue, sync_round(self, action, boot), done)

    def _publish_checkpoint(self, action: m.PublishCheckpoint) -> None:
        boot, candidate = self.boot, action.candidate
        drive(
            self.world.queue, offer_round(self, candidate, boot),
            lambda answer: self.feed(boot, m.OfferAnswered, candidate.digest, *answer),
        )  # fmt: skip

    def _superseded(self, action: m.CheckpointsSuperseded) -> None:
        self.trainer.forget(action.shard, below=action.epoch)

    def _discard(self, action: m.DiscardWork) -> None:
        self.trainer.forget(action.shard, above=-1 if action.epoch is None else action.epoch)

    def _leave(self, action: m.Leave) -> None:
        self.world.queue.after(_LEAVE_SECONDS, self._left, self.boot)

    def _left(self, boot: int) -> None:
        if boot == self.boot and self.running and all(device.state.phase == "left" for device in self.host.devices):
            self.host._end()


_HANDLERS: dict[type, Callable[[SimulatedNode, Any], None]] = {
    m.ProbeHardware: SimulatedNode._probe,
    m.LookAtShards: SimulatedNode._look,
    m.PublishClaim: SimulatedNode._publish_claim,
    m.RenewRecords: SimulatedNode._renew,
    m.Sync: SimulatedNode._sync,
    m.StartTrainer: lambda peer, action: peer.trainer.start(action),
    m.AllowEpochs: lambda peer, action: peer.trainer.allow(action.until),
    m.StopTrainer: lambda peer, action: peer.trainer.stop(save=action.save),
    m.PublishCheckpoint: SimulatedNode._publish_checkpoint,
    m.DiscardWork: SimulatedNode._discard,
    m.CheckpointsSuperseded: SimulatedNode._superseded,
    m.Leave: SimulatedNode._leave,
}
