"""The step loop of the trainer process, and what it does between steps."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from pydantic import ValidationError

from lutetia.models.data.parts.reader import Wait, open_shard
from lutetia.models.training.kernels.use import compiled_code_in
from lutetia.models.training.replay import under_budget
from lutetia.models.training.states.live_snapshot import LiveSnapshot
from lutetia.models.training.trainer import ExpertTrainer, UpdateInterrupted
from lutetia.models.training.units.split import Split
from lutetia.models.training.units.split_trainer import SplitTrainer
from lutetia.node.device_settings import torch_cards
from lutetia.node.machine.messages import Exit
from lutetia.node.pacing import SaveInterval, save_interval
from lutetia.node.trainer.assignment import PROGRESS_SECONDS, Assignment
from lutetia.node.trainer.checking.answers import answer_check, answer_gallery, answer_mixture, answer_router
from lutetia.node.trainer.checkpoint_folder import CheckpointFolder, LocalState
from lutetia.node.trainer.checkpoint_writer import RETRY_SECONDS, CheckpointWriter
from lutetia.node.trainer.devices import Accelerators, DeviceMissing, all_devices, use_device
from lutetia.node.trainer.exit_reasons import TrainerEnded, reason_of
from lutetia.node.trainer.export import TrainingExport
from lutetia.node.trainer.messages import (
    AllowTraining,
    DevicesListed,
    ExitReport,
    FromTrainer,
    ListDevices,
    ProbeFinished,
    ProgressReport,
    RequestFailed,
    RunCheck,
    RunProbe,
    RunReplay,
    RunRouter,
    SampleMixture,
    ScoreMixture,
    SetDutyCycle,
    StartTraining,
    StopTraining,
    TrainerReady,
    WaitingForPart,
    parse_order,
)
from lutetia.node.trainer.probe import ProbeQuestion, probe
from lutetia.node.trainer.replay import answer_replay
from lutetia.node.trainer.units.ranks import unit_of
from lutetia.protocol.schema.manifest import Manifest, SignedManifest
from lutetia.system.errors import ConfigError, DataError, IntegrityError, LutetiaError
from lutetia.system.process import ParentChannel

log = logging.getLogger(__name__)

_RATE_SECONDS = 10.0
WAITING_SECONDS = 1.0
"""Seconds between reports that training waits for a part of the data."""
DATA_SECONDS = 600.0
"""Seconds after which a trainer that waits for a part ends, so that the node fetches again or gives the shard up."""


class StoppedWaiting(Exception):
    """The process is to stop while it waits for a part of the data."""


class DaemonOrders:
    """The supervisor's orders, read by a thread of their own once training starts; also sends it reports."""

    def __init__(self, channel: ParentChannel, memory: int | None = None) -> None:
        """`memory`: bytes that this process may take of its device; None: all that is free."""
        self.memory = memory
        self.until, self.duty_cycle = 0, 1.0
        self.stopping, self.save, self.staying = False, True, False
        self._changed = threading.Condition()
        self._listener: threading.Thread | None = None
        self._channel, self._messages = channel, channel.messages()

    def send(self, report: FromTrainer) -> None:
        self._channel.send(report.to_wire())

    def assignment(self) -> Assignment | None:
        """Answer probes, replays and checks until there is something to train; None when there is nothing."""
        for message in self._messages:
            match parse_order(message):
                case ListDevices():
                    self.send(answer_devices())
                case RunProbe(question=question):
                    use_device(torch_cards(question.device)[0], self.memory)
                    self.send(answer_probe(question))
                case RunReplay(question=question):
                    use_device(question.device, self.memory)
                    self.send(answer_replay(question))
                case RunCheck(question=question):
                    use_device(question.device, self.memory)
                    self.send(answer_check(question))
                case RunRouter(question=question):
                    use_device(question.device, self.memory)
                    self.send(answer_router(question))
                case ScoreMixture(question=question):
                    use_device(question.device, self.memory)
                    self.send(answer_mixture(question))
                case SampleMixture(question=question):
                    use_device(question.device, self.memory)
                    self.send(answer_gallery(question))
                case StartTraining(assignment=assignment):
                    use_device(torch_cards(assignment.device)[0], self.memory)
                    self.until, self.duty_cycle = assignment.until, assignment.duty
                    return assignment
                case StopTraining():
                    return None
        return None

    def listen(self) -> None:
        self._listener = threading.Thread(target=self._listen, name="orders", daemon=True)
        self._listener.start()

    def begin_again(self) -> None:
        """Be ready for an assignment, as at the start."""
        if self._listener:
            self._listener.join()
        self.stopping, self.save, self.staying, self.until = False, True, False, 0

    def _listen(self) -> None:
        for message in self._messages:
            with self._changed:
                match parse_order(message):
                    case AllowTraining(until=until):
                        self.until = until
                    case SetDutyCycle(share=share):
                        self.duty_cycle = share
                    case StopTraining(save=save, stay=stay):
                        self.stopping, self.save, self.staying = True, save, stay
                self._changed.notify_all()
            if self.staying:
                return  # what follows is for the next assignment
        with self._changed:
            self.stopping = True
            self._changed.notify_all()

    def rest(self, seconds: float) -> None:
        """Wait for `seconds`, or until the process is to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self.stopping, seconds)

    def wait_for_part(self, number: int, path: Path) -> None:
        """Wait until part `number` of the data is at `path`. Raises StoppedWaiting if the process is to stop, or TrainerEnded."""
        log.info("waiting for part %d of the data", number)
        with self._changed:
            until = time.monotonic() + DATA_SECONDS
            while not path.is_file():
                if self.stopping:
                    raise StoppedWaiting
                if time.monotonic() > until:
                    raise TrainerEnded("crash", f"part {number} of the data did not arrive for {DATA_SECONDS:.0f} s")
                self.send(WaitingForPart(part=number))
                self._changed.wait(WAITING_SECONDS)

    def wait_for_epoch(self, epoch: int) -> None:
        """Wait until the epoch after `epoch` may be trained, or the process is to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self.stopping or epoch < self.until)


class TrainerLoop:
    """Trains, saves and reports until the supervisor says stop."""

    def __init__(self, trainer: ExpertTrainer, assignment: Assignment, orders: DaemonOrders) -> None:
        self.trainer, self.orders = trainer, orders
        self.manifest = trainer.manifest
        trainer.manifest = manifest_of_epoch(trainer, assignment.local)
        self._wanted, self._daily = assignment.save_every, assignment.local_bytes_per_day
        self._local: LiveSnapshot | None = None
        self._every = SaveInterval(assignment.save_every, "as set")
        self.folder = CheckpointFolder(assignment.folder.parent, trainer.manifest.run_id, assignment.slot)
        self.writer = CheckpointWriter(self.folder, assignment.parent, orders.send)
        self._loss: float | None = None
        self._export = TrainingExport.of(trainer, assignment)
        self._reported = self._saved = time.monotonic()
        self._rate = _Rate()

    def run(self) -> None:
        """Train until the supervisor says stop."""
        self._report(now=True)
        while not self.orders.stopping:
            if self.place[0] >= self.orders.until and self.place[1] == 0:
                self._report(waiting=True, now=True)
                self.orders.wait_for_epoch(self.place[0])
                self._rate.pause()
                continue
            try:
                busy = self._step()
            except (StoppedWaiting, UpdateInterrupted):
                return  # stopped, or the writer has ended; `finish` says what is lost
            share = self.orders.duty_cycle
            if share < 1:
                self.orders.rest(busy * (1 - share) / share)

    @property
    def place(self) -> tuple[int, int]:
        """(parent epoch, step) of the next step; the end of one epoch is the start of the next."""
        trainer = self.trainer
        return (trainer.epoch + 1, 0) if trainer.at_epoch_end else (trainer.epoch, trainer.step_in_epoch)

    def _step(self) -> float:
        """Take one step and save or report if due. Returns how many seconds it used its device."""
        clock = busy_clock(self.trainer.device.type)
        start = clock()
        if self.place[1] == 0:  # an epoch under an earlier budget has ended
            self.trainer.manifest = self.manifest
        self._loss = self.trainer.step(lambda: not self.orders.stopping and self.writer.alive)
        self._rate.add(self.trainer.manifest.optimisation.batch)
        self._export.step(self._loss, self._rate.value)
        if self.trainer.at_epoch_end:
            self._saved = time.monotonic()
            if not self.writer.submit(self.trainer.live_snapshot(), whole=True, may_wait=lambda: not self.orders.stopping):
                raise TrainerEnded("disk-full", "the last checkpoint could not be written before the trainer was stopped")
            self._report(now=True)
        elif self.writer.idle and time.monotonic() - self._saved >= self._save_interval():
            self._saved = time.monotonic()
            self._save()
        self._report()
        return clock() - start

    def _save_interval(self) -> float:
        """Seconds from the last save to the next one, by the cost of the last local state."""
        if self.writer.disk_full:
            return RETRY_SECONDS
        if self._local is not None:
            cost = self._local.waited + self.writer.processor_seconds
            every = save_interval(self._wanted, self._local.nbytes, cost, self._daily)
            if every.seconds > 1.5 * self._every.seconds or every.seconds < self._every.seconds / 1.5:
                log.info("local states are written every %.0f s: %s", every.seconds, every.reason)
                self._every = every
        return self._every.seconds

    def _save(self) -> None:
        self._local = self.trainer.live_snapshot()
        self.writer.submit(self._local, whole=False, budget=self.trainer.manifest.epochs)

    def _report(self, *, waiting: bool = False, now: bool = False) -> None:
        if not now and time.monotonic() - self._reported < PROGRESS_SECONDS:
            return
        self._reported = time.monotonic()
        epoch, step = self.place
        report = ProgressReport(
            epoch=epoch, step=step, steps=self.trainer.manifest.lane_steps(self.trainer.lane), samples=self.trainer.samples,
            loss=self._loss, rate=self._rate.value, waiting=waiting,
        )  # fmt: skip
        self.orders.send(report)

    def finish(self) -> None:
        """Write the local state if it is to be kept, and wait for the writer."""
        if self.orders.save and self.place[1]:
            self._save()
        self._export.close()
        if not self.writer.close():
            raise TrainerEnded("disk-full", "the disk is full: the newest state was not written")


def busy_clock(device: str) -> Callable[[], float]:
    """Seconds that training uses its device: of a card by the clock, of a CPU only those in which it has the processor."""
    return time.thread_time if device == "cpu" else time.monotonic


class _Rate:
    """Samples per second over the last _RATE_SECONDS, with rests but without waiting for AllowTraining."""

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


def answer_devices() -> DevicesListed:
    found = all_devices(Accelerators.seen())
    return DevicesListed(devices=tuple(name for name, _ in found), reasons=tuple(reason for _, reason in found))


def answer_probe(question: ProbeQuestion) -> ProbeFinished | RequestFailed:
    try:
        return ProbeFinished(finding=probe(question))
    except LutetiaError as error:
        return RequestFailed(text=str(error), device_missing=isinstance(error, DeviceMissing))


def build(assignment: Assignment, wait: Wait | None = None, split: Split | None = None) -> ExpertTrainer:
    """The trainer, restored to its starting point. Raises TrainerEnded when shard or state cannot be used.

    Args:
        assignment: what it is to train.
        wait: waits for a part of the data that is not there yet.
        split: this process's place in a unit of several cards; None: it trains on one device.
    """
    manifest = read_manifest(assignment)
    kind = ExpertTrainer if split is None else partial(SplitTrainer, split)
    try:
        data = open_shard(assignment.data, manifest.latent, wait=wait)
        trainer = kind(
            manifest, assignment.shard, data,
            device=torch_cards(assignment.device)[split.rank if split else 0],
            micro_batch=assignment.micro_batch, precision=assignment.precision,
            base=assignment.base, memory=assignment.memory, lane=assignment.lane,
            kernels=assignment.kernels,
        )  # fmt: skip
    except (DataError, IntegrityError, ConfigError) as error:
        raise TrainerEnded("bad-shard", str(error)) from error
    local = assignment.folder / assignment.local.file if assignment.local else None
    if assignment.local and not can_be_finished(assignment.local, manifest):
        log.warning("the local state %s does not name its epoch budget; its epoch is trained from the start", local)
        local = None
    try:
        log.info("%s", trainer.restore(assignment.epoch, assignment.weights, assignment.state, local))
    except (IntegrityError, ConfigError) as error:
        raise TrainerEnded("bad-state", str(error)) from error
    return trainer


def can_be_finished(local: LocalState, manifest: Manifest) -> bool:
    """Whether the epoch can end under the budget it started with. A cosine schedule depends on it, and an upgrade changes it."""
    return local.budget is not None or manifest.version == 1 or manifest.optimisation.schedule == "constant"


def manifest_of_epoch(trainer: ExpertTrainer, local: LocalState | None) -> Manifest:
    """The manifest for the rest of the current epoch: with the budget of `local` if the epoch continues from it."""
    if trainer.step_in_epoch == 0 or local is None or local.budget in (None, trainer.manifest.epochs):
        return trainer.manifest
    log.info("the current epoch is finished under the budget of %d epochs with which it started", local.budget)
    return under_budget(trainer.manifest, local.budget)


def read_manifest(assignment: Assignment) -> Manifest:
    """The manifest; the supervisor has verified it."""
    return SignedManifest.model_validate_json(assignment.manifest.read_bytes()).manifest


def work(channel: ParentChannel, memory: int | None = None) -> Exit:
    """Carry out assignments until one does not say that another may follow; returns why the last one ended.

    `memory`: bytes that it may take of its device; None: all that is free.
    """
    torch.set_flush_denormal(True)  # a parent full of such numbers would make every step several times as slow
    orders = DaemonOrders(channel, memory)
    while True:
        reason = _work_once(orders)
        if reason != "stopped" or not orders.staying:
            return reason
        orders.begin_again()
        gc.collect()  # the next one needs the memory


def _work_once(orders: DaemonOrders) -> Exit:
    """Carry out one assignment; returns why it ended."""
    try:
        assignment = orders.assignment()
        if assignment is None:
            return "stopped"
        if assignment.threads:
            torch.set_num_threads(assignment.threads)
        folder = CheckpointFolder(assignment.folder.parent, "", assignment.slot)
        folder.sweep()
        with compiled_code_in(folder.compiled), unit_of(assignment, orders.memory) as split:
            trainer = build(assignment, orders.wait_for_part, split)
            orders.listen()
            loop = TrainerLoop(trainer, assignment, orders)
            orders.send(TrainerReady(epoch=loop.place[0], step=loop.place[1], device=assignment.device))
            loop.run()
            loop.finish()
            if isinstance(trainer, SplitTrainer):
                trainer.end()
    except (LutetiaError, MemoryError, RuntimeError, ValidationError) as error:
        known = reason_of(error)
        if known is None:
            raise
        orders.send(ExitReport(reason=known[0], text=known[1]))
        return known[0]
    orders.send(ExitReport(reason="stopped", text=""))
    return "stopped"
