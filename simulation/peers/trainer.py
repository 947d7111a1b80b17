"""A node's trainer process and its work on disk.

Steps pass evenly at the node's speed. It reports once per lease, which is often enough for every rule that reads it. The state
is saved every `save_every` seconds; a kill leaves the last saved one. An epoch's checkpoint is on disk `write_seconds` after its
last step; a kill before that leaves a torn file, which counts as none.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from lutetia.node.machine.messages import CheckpointReady, Exit, StartTrainer, TrainerExited, TrainerProgress
from lutetia.node.machine.messages import OwnCheckpoint as Whole
from lutetia.protocol.claims import shard_and_lane, slot_of
from lutetia.protocol.schema.records import CheckpointRecord
from lutetia.simulation.config import blob
from lutetia.simulation.interfaces import Node
from lutetia.simulation.network.blobs import Content, honest_loss, with_span

Spans = tuple[tuple[int, int], ...]
Behaviour = Literal["honest", "untrained", "not-a-number", "wrong-shapes", "corrupt", "poisoned"]
"""What a dishonest trainer makes. `untrained` offers its parent again; `poisoned` takes the first steps only."""


@dataclass(frozen=True, slots=True)
class SimulatedState:
    """A saved training state: `steps` taken on top of (`epoch`, `parent`)."""

    epoch: int
    parent: str | None
    steps: int
    spans: Spans


@dataclass(slots=True)
class SimulatedDisk:
    """What one node has on disk of its own work on one shard."""

    kept: list[CheckpointRecord] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    local: SimulatedState | None = None


@dataclass(slots=True)
class SimulatedTraining:
    """Trains the epoch after `epoch`, while that is below `until`; `steps` were done at `since`. `turn` makes old timers void."""

    number: int
    shard: int
    epoch: int
    parent: str | None
    until: int
    steps: int
    spans: Spans
    since: float
    waiting: bool = False
    turn: int = 0


class SimulatedTrainer:
    def __init__(self, node: Node) -> None:
        self._node, self._world = node, node.world
        self.training: SimulatedTraining | None = None
        self.exiting = False
        """The trainer has ended by itself, and the machine does not know yet."""
        self.disks: dict[int, SimulatedDisk] = {} if node.host is node else node.host.trainer.disks
        self.behaviour: Behaviour = "honest"
        self.steps_per_epoch = node.world.manifest.steps_per_epoch
        self.speed = node.machine.speed * self.steps_per_epoch / node.world.config.epoch_seconds
        self.taken = 0
        """Steps that this node really took."""

    @property
    def rate(self) -> float:
        """Samples per second."""
        return self.speed * self._world.manifest.optimisation.batch

    def disk(self, shard: int) -> SimulatedDisk:
        return self.disks.setdefault(shard, SimulatedDisk())

    # orders

    def start(self, order: StartTrainer) -> None:
        disk = self.disk(order.shard)
        epoch, parent = order.epoch, order.checkpoint
        while (following := _following(disk, epoch, parent)) is not None:
            epoch, parent = epoch + 1, following
        if parent is not None and not self._world.blobs.has(parent, self._node.host):
            self.exiting = True
            self._node.soon(TrainerExited, order.run, "bad-state", "the accepted state is not on this disk")
            return
        local = disk.local if disk.local and (disk.local.epoch, disk.local.parent) == (epoch, parent) else None
        self.training = SimulatedTraining(
            order.run, order.shard, epoch, parent, order.until, local.steps if local else 0, local.spans if local else (),
            self._world.queue.now, waiting=epoch >= order.until,
        )  # fmt: skip
        self._go(self.training)
        self._report(self._node.boot, self.training, self.training.turn)

    def allow(self, until: int) -> None:
        training = self.training
        if training is None:
            return
        training.until = until
        if training.waiting and training.epoch < until:
            training.waiting, training.since = False, self._world.queue.now
            self._go(training)

    def stop(self, *, save: bool) -> None:
        """End the trainer. With `save` the current state is saved, else the last saved one is left."""
        training, self.training, self.exiting = self.training, None, False
        if training is None:
            return
        done = self._done(training, saved=not save)
        self.taken += self._done(training) - training.steps
        self.disk(training.shard).local = SimulatedState(
            training.epoch, training.parent, done, with_span(training.spans, training.steps, done)
        )

    def fail(self, reason: Exit, text: str = "") -> None:
        """The trainer exits by itself."""
        if self.training is not None:
            number = self.training.number
            self.stop(save=False)
            self.exiting = True
            self._node.soon(TrainerExited, number, reason, text or reason)

    def freeze(self) -> None:
        """SIGSTOP: no step is taken until `thaw`."""
        if training := self.training:
            done = self._done(training)
            self.taken += done - training.steps
            training.spans, training.steps = with_span(training.spans, training.steps, done), done
            training.turn += 1

    def thaw(self) -> None:
        if training := self.training:
            training.since = self._world.queue.now
            if not training.waiting:
                self._go(training)
            self._report(self._node.boot, training, training.turn)

    # the disk

    def pending(self, shard: int, epoch: int, checkpoint: str | None) -> tuple[Whole, ...]:
        """Own whole checkpoints that descend from the accepted one, oldest first."""
        disk, pending = self.disk(shard), []
        while (digest := _following(disk, epoch, checkpoint)) is not None:
            pending.append(Whole(shard, epoch + 1, digest, checkpoint))
            epoch, checkpoint = epoch + 1, digest
        return tuple(pending)

    def kept(self, shard: int, digest: str) -> CheckpointRecord | None:
        disk = self.disk(shard)
        return disk.kept[disk.digests.index(digest)] if digest in disk.digests else None

    def forget(self, shard: int, *, above: int | None = None, below: int | None = None) -> None:
        """Remove own checkpoints of epochs above or below a bound."""
        disk = self.disk(shard)
        remaining = [
            (record, digest) for record, digest in zip(disk.kept, disk.digests, strict=True)
            if (above is None or record.epoch <= above) and (below is None or record.epoch >= below)
        ]  # fmt: skip
        disk.kept, disk.digests = [record for record, _ in remaining], [digest for _, digest in remaining]
        if above is not None:
            disk.local = None

    def wipe(self) -> None:
        self.disks.clear()
        self._world.blobs.wipe(self._node.host)

    # the model of training

    def _go(self, training: SimulatedTraining) -> None:
        training.turn += 1
        if not training.waiting:
            left = (self._steps(training) - training.steps) / self._pace()
            self._world.queue.after(left, self._finish, self._node.boot, training, training.turn)

    def _steps(self, training: SimulatedTraining) -> int:
        """Steps of an epoch in the lane that is trained."""
        return self._world.manifest.lane_steps(shard_and_lane(training.shard)[1])

    def _pace(self) -> float:
        return self.speed * (20 if self.behaviour in ("untrained", "poisoned") else 1)

    def _done(self, training: SimulatedTraining, *, saved: bool = False) -> int:
        """Steps of this epoch that are done or, with `saved`, saved on disk."""
        if training.waiting or self._node.frozen:
            return training.steps
        seconds = self._world.queue.now - training.since
        if saved:
            every = self._world.config.save_every
            seconds = seconds // every * every
        return min(self._steps(training), training.steps + int(seconds * self._pace()))

    def _report(self, boot: int, training: SimulatedTraining, turn: int) -> None:
        if boot != self._node.boot or self.training is not training or self._node.frozen:
            return
        samples = (training.epoch * self.steps_per_epoch + self._done(training)) * 16
        self._node.feed(boot, TrainerProgress, training.number, training.epoch, samples, training.waiting)
        self._world.queue.after(self._world.config.lease, self._report, boot, training, turn)

    def _finish(self, boot: int, training: SimulatedTraining, turn: int) -> None:
        """The last step of an epoch: its checkpoint is written while the next epoch begins."""
        node, world = self._node, self._world
        if boot != node.boot or self.training is not training or training.turn != turn or node.frozen:
            return
        if node.disk_full:
            self.fail("disk-full", "no space left on device")
            return
        self.taken += self._steps(training) - training.steps
        record = self._result(training, with_span(training.spans, training.steps, self._steps(training)))
        digest = record.digest
        world.queue.after(world.config.write_seconds, self._written, boot, training.number, record, digest)
        training.epoch, training.parent = record.epoch, digest
        training.steps, training.spans, training.since = 0, (), world.queue.now
        training.waiting = training.epoch >= training.until
        self._go(training)

    def _written(self, boot: int, number: int, record: CheckpointRecord, digest: str) -> None:
        if boot != self._node.boot or self._node.disk_full:
            return
        slot = slot_of(record.shard, record.lane)
        disk = self.disk(slot)
        if digest not in disk.digests:
            disk.kept.append(record)
            disk.digests.append(digest)
        self._world.blobs.put(digest, self._node.host)
        training = self.training
        if training and training.number == number:
            samples = (training.epoch * self.steps_per_epoch) * 16
            self._node.feed(boot, TrainerProgress, number, training.epoch, samples, training.waiting)
        self._node.feed(boot, CheckpointReady, number, Whole(slot, record.epoch, digest, record.parent))

    def _result(self, training: SimulatedTraining, spans: Spans) -> CheckpointRecord:
        world, node, epoch = self._world, self._node, training.epoch + 1
        blobs, config = world.blobs, world.config
        parent = blobs.contents.get(training.parent or "")
        before = parent.weights if parent else "the initial model"
        weights = world.decide.weights(training.shard, epoch, before, node.machine.device, spans)
        shard, lane = shard_and_lane(training.shard)
        content = Content(weights, honest_loss(shard, epoch, weights))
        if held_out := world.held_out:
            quality = parent.quality if parent and parent.quality else held_out.initial(shard)
            content = replace(content, quality=held_out.trained(shard, epoch, before, quality))
        content = _tampered(self.behaviour, content, parent, node.machine.owner)
        record = CheckpointRecord(
            run=world.manifest.run_id, owner=node.machine.owner, issued=node.clock(), shard=shard, lane=lane, epoch=epoch,
            parent=training.parent, weights=blob("weights" + content.weights, config.weights_bytes),
            state=blob("state" + content.weights, config.state_bytes), trace=blob("trace" + content.weights, 4096),
            samples=epoch * world.manifest.checkpoint_samples, loss=content.loss, peer_id=node.machine.peer_id,
        )  # fmt: skip
        blobs.contents[record.digest] = content
        if self.behaviour == "honest":
            whole = world.decide.weights(training.shard, epoch, before, node.machine.device, ((0, self._steps(training)),))
            world.invariants.trained(node, record, weights, whole)
        return record


def _following(disk: SimulatedDisk, epoch: int, parent: str | None) -> str | None:
    """The digest of the own checkpoint whose parent is (`epoch`, `parent`)."""
    for record, digest in zip(disk.kept, disk.digests, strict=True):
        if record.epoch == epoch + 1 and record.parent == parent:
            return digest
    return None


def _tampered(behaviour: Behaviour, honest: Content, parent: Content | None, owner: str) -> Content:
    match behaviour:
        case "untrained":
            return replace(parent, faked="all") if parent else replace(honest, faked="all", loss=3 * honest.loss)
        case "not-a-number" | "wrong-shapes":
            return replace(honest, weights=f"{behaviour} {owner[:8]} {honest.weights}", sound=False)
        case "corrupt":
            return replace(honest, weights=f"spoilt {owner[:8]} {honest.weights}", intact=False)
        case "poisoned":
            return replace(honest, weights=f"poisoned {owner[:8]} {honest.weights}", faked="end")
        case _:
            return honest
