"""A volunteer's hands in the simulation: its trainer and the disk it works on.

Steps pass evenly at the box's speed. Every `save_every` seconds the state is saved; a kill leaves the last saved one. An epoch's
checkpoint is on disk `write_seconds` after its last step; a kill before that leaves a torn file, which counts as none.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from lutetia.node.machine.messages import CheckpointReady, Exit, StartTrainer, TrainerExited, TrainerProgress
from lutetia.node.machine.messages import OwnCheckpoint as Whole
from lutetia.protocol.schema.records import CheckpointRecord
from lutetia.simulation.config import blob
from lutetia.simulation.network.blobs import Content, honest_loss, sitting

if TYPE_CHECKING:
    from lutetia.simulation.peers.node import SimulatedNode

Spans = tuple[tuple[int, int], ...]
Conduct = Literal["honest", "untrained", "not-a-number", "wrong-shapes", "spoilt", "poisoned"]
"""What the hands do behind the machine's back. `untrained` offers its parent again; `poisoned` looks well and is not trained."""


@dataclass(frozen=True, slots=True)
class SimulatedState:
    """A saved training state: `steps` taken on top of (`epoch`, `parent`)."""

    epoch: int
    parent: str | None
    steps: int
    spans: Spans


@dataclass(slots=True)
class SimulatedDisk:
    """What one box has on disk of its own work on one shard."""

    kept: list[CheckpointRecord] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    local: SimulatedState | None = None


@dataclass(slots=True)
class SimulatedTraining:
    """Works on top of `epoch`, may do so below `until`; `steps` were done when it was at `since`. `turn` outdates old timers."""

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
    def __init__(self, box: SimulatedNode) -> None:
        self._box, self._world = box, box.world
        self.trainer: SimulatedTraining | None = None
        self.exiting = False
        """The trainer has ended by itself, and the machine has not heard of it yet."""
        self.shelves: dict[int, SimulatedDisk] = {}
        self.conduct: Conduct = "honest"
        self.steps_per_epoch = box.world.manifest.steps_per_epoch
        self.speed = box.box.speed * self.steps_per_epoch / box.world.setting.epoch_seconds
        self.taken = 0
        """Steps really taken: the work that this box did."""

    def shelf(self, shard: int) -> SimulatedDisk:
        return self.shelves.setdefault(shard, SimulatedDisk())

    # orders

    def start(self, order: StartTrainer) -> None:
        shelf = self.shelf(order.shard)
        epoch, parent = order.epoch, order.checkpoint
        while (following := _following(shelf, epoch, parent)) is not None:
            epoch, parent = epoch + 1, following
        if parent is not None and not self._world.goods.has(parent, self._box):
            self.exiting = True
            self._box.soon(TrainerExited, order.run, "bad-state", "the accepted state is not on this disk")
            return
        local = shelf.local if shelf.local and (shelf.local.epoch, shelf.local.parent) == (epoch, parent) else None
        self.trainer = SimulatedTraining(
            order.run, order.shard, epoch, parent, order.until, local.steps if local else 0, local.spans if local else (),
            self._world.agenda.now, waiting=epoch >= order.until,
        )  # fmt: skip
        self._go(self.trainer)
        self._report(self._box.boot, self.trainer, self.trainer.turn)

    def allow(self, until: int) -> None:
        trainer = self.trainer
        if trainer is None:
            return
        trainer.until = until
        if trainer.waiting and trainer.epoch < until:
            trainer.waiting, trainer.since = False, self._world.agenda.now
            self._go(trainer)

    def stop(self, *, save: bool) -> None:
        """An orderly end saves the state under way; a kill leaves what was saved last."""
        trainer, self.trainer, self.exiting = self.trainer, None, False
        if trainer is None:
            return
        done = self._done(trainer, saved=not save)
        self.taken += self._done(trainer) - trainer.steps
        self.shelf(trainer.shard).local = SimulatedState(
            trainer.epoch, trainer.parent, done, sitting(trainer.spans, trainer.steps, done)
        )

    def fail(self, reason: Exit, text: str = "") -> None:
        """The trainer ends by itself."""
        if self.trainer is not None:
            number = self.trainer.number
            self.stop(save=False)
            self.exiting = True
            self._box.soon(TrainerExited, number, reason, text or reason)

    def freeze(self) -> None:
        """SIGSTOP: no step is taken until `thaw`."""
        if trainer := self.trainer:
            done = self._done(trainer)
            self.taken += done - trainer.steps
            trainer.spans, trainer.steps = sitting(trainer.spans, trainer.steps, done), done
            trainer.turn += 1

    def thaw(self) -> None:
        if trainer := self.trainer:
            trainer.since = self._world.agenda.now
            if not trainer.waiting:
                self._go(trainer)
            self._report(self._box.boot, trainer, trainer.turn)

    # the disk

    def pending(self, shard: int, epoch: int, checkpoint: str | None) -> tuple[Whole, ...]:
        """Own whole checkpoints that stand on the accepted one, oldest first."""
        shelf, found = self.shelf(shard), []
        while (digest := _following(shelf, epoch, checkpoint)) is not None:
            found.append(Whole(shard, epoch + 1, digest, checkpoint))
            epoch, checkpoint = epoch + 1, digest
        return tuple(found)

    def kept(self, shard: int, digest: str) -> CheckpointRecord | None:
        shelf = self.shelf(shard)
        return shelf.kept[shelf.digests.index(digest)] if digest in shelf.digests else None

    def forget(self, shard: int, *, above: int | None = None, below: int | None = None) -> None:
        """Remove own checkpoints of epochs above or below a bound."""
        shelf = self.shelf(shard)
        rest = [
            (record, digest) for record, digest in zip(shelf.kept, shelf.digests, strict=True)
            if (above is None or record.epoch <= above) and (below is None or record.epoch >= below)
        ]  # fmt: skip
        shelf.kept, shelf.digests = [record for record, _ in rest], [digest for _, digest in rest]
        if above is not None:
            shelf.local = None

    def wipe(self) -> None:
        self.shelves.clear()
        self._world.goods.wipe(self._box)

    # the model of training

    def _go(self, trainer: SimulatedTraining) -> None:
        trainer.turn += 1
        if not trainer.waiting:
            left = (self.steps_per_epoch - trainer.steps) / self._pace()
            self._world.agenda.after(left, self._finish, self._box.boot, trainer, trainer.turn)

    def _pace(self) -> float:
        return self.speed * (20 if self.conduct in ("untrained", "poisoned") else 1)

    def _done(self, trainer: SimulatedTraining, *, saved: bool = False) -> int:
        """Steps of this epoch that are done, or `saved` on disk."""
        if trainer.waiting or self._box.frozen:
            return trainer.steps
        seconds = self._world.agenda.now - trainer.since
        if saved:
            every = self._world.setting.save_every
            seconds = seconds // every * every
        return min(self.steps_per_epoch, trainer.steps + int(seconds * self._pace()))

    def _report(self, boot: int, trainer: SimulatedTraining, turn: int) -> None:
        if boot != self._box.boot or self.trainer is not trainer or self._box.frozen:
            return
        samples = (trainer.epoch * self.steps_per_epoch + self._done(trainer)) * 16
        self._box.hear(boot, TrainerProgress, trainer.number, trainer.epoch, samples, trainer.waiting)
        self._world.agenda.after(self._world.setting.heartbeat, self._report, boot, trainer, turn)

    def _finish(self, boot: int, trainer: SimulatedTraining, turn: int) -> None:
        """The last step of an epoch: its checkpoint is being written while the next epoch begins."""
        box, world = self._box, self._world
        if boot != box.boot or self.trainer is not trainer or trainer.turn != turn or box.frozen:
            return
        if box.disk_full:
            self.fail("disk-full", "no space left on device")
            return
        self.taken += self.steps_per_epoch - trainer.steps
        record = self._result(trainer, sitting(trainer.spans, trainer.steps, self.steps_per_epoch))
        digest = record.digest
        world.agenda.after(world.setting.write_seconds, self._written, boot, trainer.number, record, digest)
        trainer.epoch, trainer.parent = record.epoch, digest
        trainer.steps, trainer.spans, trainer.since = 0, (), world.agenda.now
        trainer.waiting = trainer.epoch >= trainer.until
        self._go(trainer)

    def _written(self, boot: int, number: int, record: CheckpointRecord, digest: str) -> None:
        if boot != self._box.boot or self._box.disk_full:
            return
        shelf = self.shelf(record.shard)
        if digest not in shelf.digests:
            shelf.kept.append(record)
            shelf.digests.append(digest)
        self._world.goods.put(digest, self._box)
        trainer = self.trainer
        if trainer and trainer.number == number:
            samples = (trainer.epoch * self.steps_per_epoch) * 16
            self._box.hear(boot, TrainerProgress, number, trainer.epoch, samples, trainer.waiting)
        self._box.hear(boot, CheckpointReady, number, Whole(record.shard, record.epoch, digest, record.parent))

    def _result(self, trainer: SimulatedTraining, spans: Spans) -> CheckpointRecord:
        world, box, epoch = self._world, self._box, trainer.epoch + 1
        goods, setting = world.goods, world.setting
        parent = goods.contents.get(trainer.parent or "")
        before = parent.weights if parent else "the initial model"
        weights = world.decide.weights(trainer.shard, epoch, before, box.box.device, spans)
        content = Content(weights, honest_loss(trainer.shard, epoch, weights))
        content = _tampered(self.conduct, content, parent, box.box.owner)
        record = CheckpointRecord(
            run=world.manifest.run_id, owner=box.box.owner, issued=box.clock(), shard=trainer.shard, epoch=epoch,
            parent=trainer.parent, weights=blob("weights" + content.weights, setting.weights_bytes),
            state=blob("state" + content.weights, setting.state_bytes), trace=blob("trace" + content.weights, 4096),
            samples=epoch * world.manifest.checkpoint_samples, loss=content.loss, peer_id=box.box.peer_id,
        )  # fmt: skip
        goods.contents[record.digest] = content
        if self.conduct == "honest":
            whole = world.decide.weights(trainer.shard, epoch, before, box.box.device, ((0, self.steps_per_epoch),))
            world.invariants.trained(box, record, weights, whole)
        return record


def _following(shelf: SimulatedDisk, epoch: int, parent: str | None) -> str | None:
    """The digest of the own checkpoint that stands on (`epoch`, `parent`)."""
    for record, digest in zip(shelf.kept, shelf.digests, strict=True):
        if record.epoch == epoch + 1 and record.parent == parent:
            return digest
    return None


def _tampered(conduct: Conduct, honest: Content, parent: Content | None, owner: str) -> Content:
    match conduct:
        case "untrained":
            return replace(parent, faked="all") if parent else replace(honest, faked="all", loss=3 * honest.loss)
        case "not-a-number" | "wrong-shapes":
            return replace(honest, weights=f"{conduct} {owner[:8]} {honest.weights}", sound=False)
        case "spoilt":
            return replace(honest, weights=f"spoilt {owner[:8]} {honest.weights}", intact=False)
        case "poisoned":
            return replace(honest, weights=f"poisoned {owner[:8]} {honest.weights}", faked="end")
        case _:
            return honest
