"""The step loop of the trainer child, and what it does between steps."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import torch
from pydantic import ValidationError

from lutetia.models.data.shards import load_shard
from lutetia.models.training.replay import under_budget
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.node.machine.messages import Exit
from lutetia.node.trainer.assignment import PROGRESS_SECONDS, Assignment
from lutetia.node.trainer.checkpoint_folder import CheckpointFolder, LocalState
from lutetia.node.trainer.checkpoint_writer import CheckpointWriter
from lutetia.node.trainer.exit_reasons import TrainerEnded, reason_of
from lutetia.node.trainer.probe import ProbeQuestion, find
from lutetia.node.trainer.replay import replayed
from lutetia.protocol.schema.manifest import Manifest, SignedManifest
from lutetia.system.errors import ConfigError, DataError, IntegrityError, LutetiaError
from lutetia.system.process import ParentChannel

log = logging.getLogger(__name__)

_RATE_SECONDS = 10.0


class DaemonOrders:
    """What the daemon wants, heard by a thread of its own."""

    def __init__(self, channel: ParentChannel) -> None:
        self.until, self.duty = 0, 1.0
        self.stopping, self.save = False, True
        self._changed = threading.Condition()
        self._channel, self._messages = channel, channel.messages()

    def assignment(self) -> Assignment | None:
        """What to train, after any probes; None when the daemon wants nothing."""
        for message in self._messages:
            match message.get("do"):
                case "probe":
                    self._channel.send(answer(message["question"]))
                case "replay":
                    self._channel.send(replayed(message["question"]))
                case "start":
                    assignment = Assignment.model_validate(message["assignment"])
                    self.until, self.duty = assignment.until, assignment.duty
                    return assignment
                case "stop":
                    return None
        return None

    def listen(self) -> None:
        threading.Thread(target=self._listen, name="orders", daemon=True).start()

    def _listen(self) -> None:
        for message in self._messages:
            with self._changed:
                match message.get("do"):
                    case "allow":
                        self.until = int(message["until"])
                    case "duty":
                        self.duty = float(message["share"])
                    case "stop":
                        self.stopping, self.save = True, bool(message["save"])
                self._changed.notify_all()
        with self._changed:
            self.stopping = True
            self._changed.notify_all()

    def rest(self, seconds: float) -> None:
        """Wait, unless the daemon wants something."""
        with self._changed:
            self._changed.wait_for(lambda: self.stopping, seconds)

    def wait_for_epoch(self, epoch: int) -> None:
        """Until training on top of `epoch` is allowed, or we are to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self.stopping or epoch < self.until)


class TrainerLoop:
    """Steps, snapshots, progress."""

    def __init__(self, trainer: ExpertTrainer, assignment: Assignment, orders: DaemonOrders, channel: ParentChannel) -> None:
        self.trainer, self.orders, self.channel = trainer, orders, channel
        self.manifest = trainer.manifest
        trainer.manifest = begun_under(trainer, assignment.local)
        self.save_every = assignment.save_every
        self.folder = CheckpointFolder(assignment.folder.parent, trainer.manifest.run_id, trainer.shard)
        self.writer = CheckpointWriter(self.folder, assignment.parent, channel.send)
        self._loss: float | None = None
        self._told = self._saved = time.monotonic()
        self._rate = _Rate()

    def run(self) -> None:
        """Until we are to stop."""
        self._tell(now=True)
        while not self.orders.stopping:
            if self.place[0] >= self.orders.until and self.place[1] == 0:
                self._tell(waiting=True, now=True)
                self.orders.wait_for_epoch(self.place[0])
                self._rate.pause()
                continue
            busy = self._step()
            share = self.orders.duty
            if share < 1:
                self.orders.rest(busy * (1 - share) / share)

    @property
    def place(self) -> tuple[int, int]:
        """Epoch and step of the next step; the end of epoch e is the start of e + 1."""
        trainer = self.trainer
        return (trainer.epoch + 1, 0) if trainer.at_epoch_end else (trainer.epoch, trainer.step_in_epoch)

    def _step(self) -> float:
        """One step and what it brings; returns its seconds of work."""
        start = time.monotonic()
        if self.place[1] == 0:  # an epoch that was begun under another budget has ended
            self.trainer.manifest = self.manifest
        self._loss = self.trainer.step()
        self._rate.add(self.trainer.manifest.optimisation.batch)
        if self.trainer.at_epoch_end:
            self._saved = time.monotonic()
            if not self.writer.submit(self.trainer.snapshot(), whole=True, may_wait=lambda: not self.orders.stopping):
                raise TrainerEnded("disk-full", "the last checkpoint could not be written before the trainer was stopped")
            self._tell(now=True)
        elif time.monotonic() - self._saved >= self.save_every and self.writer.idle:
            self._saved = time.monotonic()
            self._save()
        self._tell()
        return time.monotonic() - start

    def _save(self) -> None:
        self.writer.submit(self.trainer.snapshot(), whole=False, budget=self.trainer.manifest.epochs)

    def _tell(self, *, waiting: bool = False, now: bool = False) -> None:
        if not now and time.monotonic() - self._told < PROGRESS_SECONDS:
            return
        self._told = time.monotonic()
        epoch, step = self.place
        self.channel.send({
            "say": "progress", "epoch": epoch, "step": step, "steps": self.trainer.manifest.steps_per_epoch,
            "samples": self.trainer.samples, "loss": self._loss, "rate": self._rate.value, "waiting": waiting,
        })  # fmt: skip

    def finish(self) -> None:
        """Write what is to be kept."""
        if self.orders.save and self.place[1]:
            self._save()
        if not self.writer.close():
            raise TrainerEnded("disk-full", "the disk is full: the newest state was not written")


class _Rate:
    """Samples per second over the last seconds, rests included, waiting for permission excluded."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, int]] = [(time.monotonic(), 0)]

    def add(self, samples: int) -> None:
        now = time.monotonic()
        self._marks.append((now, self._marks[-1][1] + samples))
        while len(self._marks) > 2 and now - self._marks[1][0] > _RATE_SECONDS:
            self._marks.pop(0)

    def pause(self) -> None:
        self._marks = [(time.monotonic(), 0)]

    @property
    def value(self) -> float:
        (start, before), (end, after) = self._marks[0], self._marks[-1]
        return (after - before) / (end - start) if end > start else 0.0


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """The answer to a `probe`."""
    try:
        return {"say": "finding", "finding": find(ProbeQuestion.model_validate(question)).model_dump(mode="json")}
    except LutetiaError as error:
        return {"say": "failed", "text": str(error)}


def build(assignment: Assignment) -> ExpertTrainer:
    """The trainer in its place. Raises Ended."""
    manifest = read_manifest(assignment)
    try:
        data = load_shard(assignment.data, manifest.latent)
        trainer = ExpertTrainer(
            manifest, assignment.shard, data,
            device=assignment.device, micro_batch=assignment.micro_batch, precision=assignment.precision,
        )  # fmt: skip
    except (DataError, IntegrityError, ConfigError) as error:
        raise TrainerEnded("bad-shard", str(error)) from error
    local = assignment.folder / assignment.local.file if assignment.local else None
    if assignment.local and not can_be_ended(assignment.local, manifest):
        log.warning("the local state %s does not say under which budget it was trained; its epoch begins anew", local)
        local = None
    try:
        log.info("%s", trainer.restore(assignment.epoch, assignment.weights, assignment.state, local))
    except (IntegrityError, ConfigError) as error:
        raise TrainerEnded("bad-state", str(error)) from error
    return trainer


def can_be_ended(local: LocalState, manifest: Manifest) -> bool:
    """Whether the epoch of a local state can end as it began: a cosine knows the budget's end, which an upgrade moves."""
    return local.budget is not None or manifest.version == 1 or manifest.optimisation.schedule == "constant"


def begun_under(trainer: ExpertTrainer, local: LocalState | None) -> Manifest:
    """The manifest by which the trainer ends the epoch it stands in: where it goes on from `local`, with that one's budget."""
    if trainer.step_in_epoch == 0 or local is None or local.budget in (None, trainer.manifest.epochs):
        return trainer.manifest
    log.info("the epoch under way ends under the budget of %d epochs with which it was begun", local.budget)
    return under_budget(trainer.manifest, local.budget)


def read_manifest(assignment: Assignment) -> Manifest:
    """The manifest that the daemon has verified."""
    return SignedManifest.model_validate_json(assignment.manifest.read_bytes()).manifest


def work(channel: ParentChannel) -> Exit:
    """One assignment from start to end; returns why it ended."""
    orders = DaemonOrders(channel)
    try:
        assignment = orders.assignment()
        if assignment is None:
            return "stopped"
        if assignment.threads:
            torch.set_num_threads(assignment.threads)
        CheckpointFolder(assignment.folder.parent, "", assignment.shard).sweep()
        trainer = build(assignment)
        orders.listen()
        loop = TrainerLoop(trainer, assignment, orders, channel)
        channel.send({"say": "ready", "epoch": loop.place[0], "step": loop.place[1], "device": str(trainer.device)})
        loop.run()
        loop.finish()
    except (LutetiaError, MemoryError, RuntimeError, ValidationError) as error:
        known = reason_of(error)
        if known is None:
            raise
        channel.send({"say": "exit", "reason": known[0], "text": known[1]})
        return known[0]
    channel.send({"say": "exit", "reason": "stopped", "text": ""})
    return "stopped"
