"""The daemon's hands on the trainer child: orders are carried out one after another, what the child says becomes events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lutetia.node.machine.messages import CheckpointReady, DiskFree, DiskFull, Event, Exit, TrainerExited, TrainerProgress
from lutetia.node.trainer.assignment import EXIT_CODES, Assignment
from lutetia.node.trainer.checkpoint_folder import KeptCheckpoint
from lutetia.system.process import Child, Message

log = logging.getLogger(__name__)

STOP_GRACE = 60.0
KILL_GRACE = 5.0
WARM_SECONDS = 60.0
_MODULE = "lutetia.node.trainer"


@dataclass
class TrainerReport:
    """The newest progress of the trainer, for the local status."""

    epoch: int = 0
    step: int = 0
    steps: int = 0
    samples: int = 0
    loss: float | None = None
    rate: float = 0.0


class TrainerProcess:
    """At most one trainer child at work, and at most one warm one waiting. `tell` takes events; `now` is the daemon's clock."""

    def __init__(self, tell: Callable[[Event], None], now: Callable[[], float], threads: int | None) -> None:
        self._tell, self._now = tell, now
        self._environment = {"OMP_NUM_THREADS": str(threads)} if threads else {}
        self._child: Child | None = None
        self._listener: asyncio.Task[None] | None = None
        self._warm: Child | None = None
        self._spawning = asyncio.Lock()
        self._cooling: asyncio.TimerHandle | None = None
        self._stopping = False
        self._pace: float | None = None
        self.disk_full = False
        """What the trainer at work says of its disk; it tries again and again, and tells."""
        self.report: TrainerReport | None = None

    # --- the warm child: its imports take seconds, which pass while a claim settles ----------------------------------------

    async def warm(self) -> None:
        """Have a child ready for the next start; it goes away if that does not come soon."""
        async with self._spawning:
            await self.give_back(await self._warm_or_new())

    async def give_back(self, child: Child) -> None:
        """`child` has nothing to do: it may wait a while for the next start, unless another does."""
        if self._warm is not None:
            await child.kill()
            return
        self._warm = child
        loop = asyncio.get_running_loop()
        self._cooling = loop.call_later(WARM_SECONDS, lambda: loop.create_task(self.cool()))

    async def cool(self) -> None:
        """No child waits."""
        if self._cooling:
            self._cooling.cancel()
        if self._warm:
            child, self._warm = self._warm, None
            await child.kill()

    async def take(self) -> Child:
        """The warm child, or a new one; whoever takes it answers for it."""
        async with self._spawning:
            return await self._warm_or_new()

    async def _warm_or_new(self) -> Child:
        if self._cooling:
            self._cooling.cancel()
        child, self._warm = self._warm, None
        if child is None or child.process.returncode is not None:
            child = await Child.start(_MODULE, environment=self._environment)
        return child

    # --- orders -------------------------------------------------------------------------------------------------------------

    async def start(self, run: int, assignment: Assignment) -> None:
        """Start trainer number `run`; what becomes of it comes as events."""
        await self.stop(save=False)
        self._child, self._stopping, self.disk_full = await self.take(), False, False
        self.report = TrainerReport(epoch=assignment.epoch)
        self._listener = asyncio.create_task(self._listen(run, self._child))
        await self._send({"do": "start", "assignment": assignment.model_dump(mode="json")})

        if self._pace is not None:
            await self._send({"do": "duty", "share": self._pace})

    async def pace(self, share: float) -> None:
        """Training may use this share of the time from now on, by this trainer and by those after it."""
        if share != self._pace:
            self._pace = share
            await self._send({"do": "duty", "share": share})

    async def allow(self, until: int) -> None:
        await self._send({"do": "allow", "until": until})

    async def stop(self, *, save: bool) -> None:
        """End the trainer if there is one: politely with `save` or while it writes, else soon. Returns when it is gone."""
        child, listener = self._child, self._listener
        self._child = self._listener = self.report = None
        self.disk_full = False
        if child is None:
            return
        self._stopping = True
        with contextlib.suppress(ConnectionError):
            await child.send({"do": "stop", "save": save})
        await child.stop(STOP_GRACE if save else KILL_GRACE)
        if listener:
            await listener

    async def close(self) -> None:
        """No child is left."""
        await self.cool()
        if self._child:
            await self._child.kill()
        if self._listener:
            await self._listener

    async def _send(self, message: Message) -> None:
        if self._child:
            with contextlib.suppress(ConnectionError):  # it has ended: its listener says so
                await self._child.send(message)

    # --- what the child says ------------------------------------------------------------------------------------------------

    async def _listen(self, run: int, child: Child) -> None:
        reason: tuple[Exit, str] | None = None
        try:
            async for message in child.messages():
                reason = self._hear(run, message) or reason
        except ValueError as error:
            reason = "crash", f"the trainer spoke nonsense: {error}"
            await child.kill()
        code = await child.process.wait()
        if self._child is child:
            self._child = self._listener = self.report = None
            self.disk_full = False
        if reason is None:
            reason = _meaning_of(code)
        self._tell(TrainerExited(self._now(), run, reason[0], reason[1]))

    def _hear(self, run: int, message: dict[str, Any]) -> tuple[Exit, str] | None:
        now = self._now()
        match message:
            case {"say": "progress", "epoch": epoch, "step": step, "steps": steps, "samples": samples}:
                if not self._stopping:
                    self.report = TrainerReport(epoch, step, steps, samples, message.get("loss"), message.get("rate") or 0.0)
                self._tell(TrainerProgress(now, run, epoch, samples, bool(message.get("waiting"))))
            case {"say": "checkpoint", "kept": kept}:
                self._tell(CheckpointReady(now, run, KeptCheckpoint.model_validate(kept).candidate))
            case {"say": "disk", "full": True, "text": text}:
                self.disk_full = not self._stopping
                self._tell(DiskFull(now, text))
            case {"say": "disk", "full": False}:
                self.disk_full = False
                self._tell(DiskFree(now))
            case {"say": "exit", "reason": reason, "text": text} if reason in EXIT_CODES:
                return reason, text
            case {"say": "ready", "epoch": epoch, "step": step, "device": device}:
                log.info("trainer %d is at work on %s: epoch %d, step %d", run, device, epoch, step)
        return None


def _meaning_of(code: int) -> tuple[Exit, str]:
    """What an exit code says when the child could not say it itself."""
    if code < 0:
        return "crash", f"it was killed by signal {-code}"
    known: dict[int, Exit] = {number: name for name, number in EXIT_CODES.items()}
    return known.get(code, "crash"), f"it ended with exit code {code}"
