"""The supervisor's side of the trainer process: orders are carried out one after another, reports become events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

from lutetia.node.machine.messages import CheckpointReady, DiskFree, DiskFull, Event, Exit, TrainerExited, TrainerProgress
from lutetia.node.trainer.assignment import EXIT_CODES, Assignment
from lutetia.node.trainer.messages import (
    AllowTraining,
    CheckpointWritten,
    DataArrived,
    DiskReport,
    ExitReport,
    FromTrainer,
    ProgressReport,
    SetDutyCycle,
    StartTraining,
    StopTraining,
    ToTrainer,
    TrainerReady,
    WaitingForPart,
    parse_report,
)
from lutetia.system.process import Child

log = logging.getLogger(__name__)

STOP_GRACE = 60.0
KILL_GRACE = 5.0
SPARE_SECONDS = 60.0
_WAIT_OVER = 5.0
"""Seconds after which a trainer that said that it waits, and does not say so again, waits no more."""
TRAINER_MODULE = "lutetia.node.trainer"


@dataclass
class TrainerReport:
    """The newest progress of the trainer, for the local status. `rate` in samples per second."""

    epoch: int = 0
    step: int = 0
    steps: int = 0
    samples: int = 0
    loss: float | None = None
    rate: float = 0.0


@dataclass(frozen=True)
class DataWait:
    """The trainer stands still for `part` of its data since `since`. `place`: epoch and step at which it stands."""

    part: int
    since: float
    heard: float
    """When it said so last; it does every second."""
    place: tuple[int, int]


class TrainerProcess:
    """At most one trainer process that trains, and at most one spare one.

    Args:
        feed: takes the events.
        now: the node's clock, in Unix seconds.
        threads: CPU threads of the process; None: the default of its libraries.
        memory: bytes that it may take of its device; None: all that is free.
    """

    def __init__(
        self, feed: Callable[[Event], None], now: Callable[[], float], threads: int | None, memory: int | None = None
    ) -> None:
        self._feed, self._now = feed, now
        self._arguments = ("--memory", str(memory)) if memory else ()
        self._environment = {"OMP_NUM_THREADS": str(threads)} if threads else {}
        self._child: Child | None = None
        self._reader: asyncio.Task[None] | None = None
        self._spare: Child | None = None
        self._spawning = asyncio.Lock()
        self._spare_timer: asyncio.TimerHandle | None = None
        self._stopping = False
        self._kept: Child | None = None
        """A process that is to stay when its trainer has ended."""
        self._duty_cycle: float | None = None
        self.disk_full = False
        """Whether the trainer waits for disk space; it retries and reports."""
        self.slot: int | None = None
        """The slot whose files the trainer uses, until it is gone."""
        self.report: TrainerReport | None = None
        self._waits: DataWait | None = None
        self.starved = asyncio.Event()
        """Set when the trainer waits for a part of its data."""

    # --- the spare process: importing its libraries takes seconds, which pass while a claim settles ------------------------

    async def start_spare(self) -> None:
        """Have a process ready for the next start; it ends if that does not come within SPARE_SECONDS."""
        async with self._spawning:
            await self.give_back(await self._spare_or_new())

    def adopt(self, child: Child) -> None:
        """Take over a process that is ready to work, as the spare one."""
        if self._arguments or self._spare is not None:  # it was started without this device's limit
            asyncio.get_running_loop().create_task(child.kill())
        else:
            self._keep(child)

    async def give_back(self, child: Child) -> None:
        """Keep `child` as the spare process, or end it if there is one already."""
        if self._spare is not None:
            await child.kill()
            return
        self._keep(child)

    def _keep(self, child: Child) -> None:
        self._spare = child
        loop = asyncio.get_running_loop()
        self._spare_timer = loop.call_later(SPARE_SECONDS, lambda: loop.create_task(self.end_spare()))

    async def end_spare(self) -> None:
        if self._spare_timer:
            self._spare_timer.cancel()
        if self._spare:
            child, self._spare = self._spare, None
            await child.kill()

    async def take(self) -> Child:
        """The spare process, or a new one. The caller gives it back or ends it."""
        async with self._spawning:
            return await self._spare_or_new()

    async def _spare_or_new(self) -> Child:
        if self._spare_timer:
            self._spare_timer.cancel()
        child, self._spare = self._spare, None
        if child is None or child.process.returncode is not None:
            child = await Child.start(TRAINER_MODULE, *self._arguments, environment=self._environment)
        return child

    @property
    def waits(self) -> DataWait | None:
        """The part of its data that the trainer waits for now."""
        heard = self._waits is not None and self._now() - self._waits.heard < _WAIT_OVER
        return self._waits if heard else None

    # --- orders -------------------------------------------------------------------------------------------------------------

    async def start(self, run: int, assignment: Assignment) -> None:
        """Start trainer number `run`; its reports come as events."""
        await self.stop(save=False)
        self._child, self._stopping, self.disk_full = await self.take(), False, False
        self.report, self.slot = TrainerReport(epoch=assignment.epoch), assignment.slot
        self._reader = asyncio.create_task(self._read(run, self._child))
        await self._send(StartTraining(assignment=assignment))
        if self._duty_cycle is not None:
            await self._send(SetDutyCycle(share=self._duty_cycle))

    async def set_duty_cycle(self, share: float) -> None:
        """Limit this trainer and all later ones to this share of the time."""
        if share != self._duty_cycle:
            self._duty_cycle = share
            await self._send(SetDutyCycle(share=share))

    async def allow(self, until: int) -> None:
        """Epochs whose parent is below `until` may be trained."""
        await self._send(AllowTraining(until=until))

    async def data_arrived(self) -> None:
        """A part of the data was stored."""
        await self._send(DataArrived())

    async def stop(self, *, save: bool, keep: bool = False) -> None:
        """End the trainer if there is one, and return when it is gone.

        Args:
            save: give it STOP_GRACE to write a local state.
            keep: keep its process as the spare one, so that the next start need not import its libraries again.
        """
        child, reader = self._child, self._reader
        self._child = self._reader = self.report = self._waits = None
        self.disk_full = False
        if child is None:
            return
        self._stopping, self._kept = True, child if keep else None
        with contextlib.suppress(ConnectionError):
            await child.send(StopTraining(save=save, stay=keep).to_wire())
        if keep and reader:
            await asyncio.wait([reader], timeout=STOP_GRACE)
        if self._kept is child and reader and reader.done():
            await self.give_back(child)
        else:
            self._kept = None
            await child.stop(STOP_GRACE if save else KILL_GRACE)
        if reader:
            await reader
        self.slot = None

    async def close(self) -> None:
        """Kill all processes."""
        await self.end_spare()
        if self._child:
            await self._child.kill()
        if self._reader:
            await self._reader

    async def _send(self, order: ToTrainer) -> None:
        if self._child:
            with contextlib.suppress(ConnectionError):  # it has ended, and its reader reports that
                await self._child.send(order.to_wire())

    # --- reports ------------------------------------------------------------------------------------------------------------

    async def _read(self, run: int, child: Child) -> None:
        reason: tuple[Exit, str] | None = None
        try:
            async for message in child.messages():
                reason = self._handle(run, parse_report(message)) or reason
                if child is self._kept and reason and reason[0] == "stopped":
                    break
        except ValueError as error:
            reason = "crash", f"the trainer sent a malformed message: {error}"
            await child.kill()
        if child is not self._kept or reason is None or reason[0] != "stopped":
            self._kept = None
        code = 0 if self._kept else await child.process.wait()
        if self._child is child:
            self._child = self._reader = self.report = self.slot = self._waits = None
            self.disk_full = False
        if reason is None:
            reason = _meaning_of(code)
        self._feed(TrainerExited(self._now(), run, reason[0], reason[1]))

    def _handle(self, run: int, report: FromTrainer | None) -> tuple[Exit, str] | None:
        """Turn a report into an event; returns the reason of an ExitReport."""
        now = self._now()
        match report:
            case ProgressReport(epoch=epoch, samples=samples, waiting=waiting):
                if not self._stopping:
                    if self._waits and (epoch, report.step) != self._waits.place:
                        self._waits = None
                    self.report = TrainerReport(epoch, report.step, report.steps, samples, report.loss, report.rate)
                self._feed(TrainerProgress(now, run, epoch, samples, waiting))
            case WaitingForPart(part=part):
                self.starved.set()
                place = (self.report.epoch, self.report.step) if self.report else (0, 0)
                began = self._waits.since if self._waits and (self._waits.part, self._waits.place) == (part, place) else now
                self._waits = DataWait(part, began, now, place)
                if self.report and self.report.steps:  # it does not hang
                    self._feed(TrainerProgress(now, run, self.report.epoch, self.report.samples, False))
            case CheckpointWritten(kept=kept):
                self._feed(CheckpointReady(now, run, kept.candidate))
            case DiskReport(full=True, text=text):
                self.disk_full = not self._stopping
                self._feed(DiskFull(now, text))
            case DiskReport():
                self.disk_full = False
                self._feed(DiskFree(now))
            case ExitReport(reason=reason, text=text):
                return reason, text
            case TrainerReady(epoch=epoch, step=step, device=device):
                log.info("trainer %d is at work on %s: epoch %d, step %d", run, device, epoch, step)
        return None


def _meaning_of(code: int) -> tuple[Exit, str]:
    """The reason by exit code, for a process that ended without an ExitReport."""
    if code < 0:
        return "crash", f"it was killed by signal {-code}"
    known: dict[int, Exit] = {number: name for name, number in EXIT_CODES.items()}
    return known.get(code, "crash"), f"it ended with exit code {code}"
