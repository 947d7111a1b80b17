"""The coordinator's side of a worker process: one job at a time; the process is started when needed and ended when idle."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

from lutetia.coordinator.worker.messages import (
    FromWorker,
    Job,
    JobDone,
    JobProgress,
    JobRefused,
    JobRequest,
    LibraryLoaded,
    SignatureReply,
    SignatureRequest,
    encode,
    read_from_worker,
)
from lutetia.coordinator.worker.time_limits import silence_limit
from lutetia.protocol.schema.verdicts import CheckName
from lutetia.system.errors import LutetiaError
from lutetia.system.process import Child

_log = logging.getLogger(__name__)

_STOP_GRACE = 2.0
IDLE_SECONDS = 900.0
"""A process ends after so long without a job: it holds some hundred MiB, and a new one starts in seconds."""
A = TypeVar("A")


class WorkerRefused(LutetiaError):
    """The job was carried out, and what it was given is wrong; `check` is the check that a checkpoint's file failed."""

    code, name = 50, "integrity"

    def __init__(self, text: str, check: CheckName | None) -> None:
        super().__init__(text)
        self.check: CheckName | None = check


class WorkerFailed(LutetiaError):
    """The worker process crashed, hung or sent a malformed line. `progress` is the last that it said of the job."""

    code, name = 70, "internal"

    def __init__(self, text: str, progress: JobProgress | None = None) -> None:
        super().__init__(text)
        self.progress = progress


class _Pauses:
    """Remembers the longest pause of jobs of one name, and moves a deadline on with each sign of progress."""

    def __init__(self, longest: dict[str, float], name: str, deadline: asyncio.Timeout, patience: float) -> None:
        self._longest, self._name, self._deadline, self._patience = longest, name, deadline, patience
        self._last = asyncio.get_running_loop().time()

    def ended(self) -> None:
        now = asyncio.get_running_loop().time()
        self._longest[self._name] = max(self._longest.get(self._name, 0.0), now - self._last)
        self.went_on()

    def went_on(self) -> None:
        """The process starts: what the job itself takes begins later."""
        self._last = asyncio.get_running_loop().time()
        if not self._deadline.expired():
            self._deadline.reschedule(self._last + self._patience)


class WorkerClient:
    """`ask` starts `python -m lutetia.coordinator.worker` when none runs.

    Args:
        manifest: the run's manifest file, which the process reads when it starts.
        name: which of the coordinator's worker processes this is, for its log lines.
        threads: threads of torch.
        nice: how much lower its priority is than the coordinator's, as `os.nice` counts.
        idle: seconds without a job after which the process ends.
        device: where it computes: auto, cpu, mps, cuda, cuda:N, xpu or xpu:N.
    """

    def __init__(
        self, manifest: Path, *, name: str, threads: int, nice: int, idle: float = IDLE_SECONDS, device: str = "cpu"
    ) -> None:
        self._manifest, self._name, self._idle, self._device = manifest, name, idle, device
        self._environment = {
            variable: str(threads) for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        }
        self._environment["LUTETIA_WORKER_NICE"] = str(nice)
        self._child: Child | None = None
        self._lock = asyncio.Lock()
        self._jobs = 0
        self._pauses: dict[str, float] = {}
        self._progress: JobProgress | None = None
        self._outdated = False
        self._idle_watch: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The process id; None when no process runs."""
        return self._child.process.pid if self._child else None

    async def ask(self, job: Job[A], *, limit: float, sign: Callable[[bytes], str] | None = None) -> A:
        """Have `job` done. `sign` signs what the job asks to have signed.

        The process is ended when it has shown no progress for `limit` seconds, or for many times the longest pause that a job of
        this kind had before (`silence_limit`). A job that goes on is never cut off.

        Raises WorkerRefused, or WorkerFailed when the process crashed, or was ended because it hung or sent a malformed line.
        """
        name = job.name()
        async with self._lock:
            self._jobs += 1
            self._progress = None
            request = JobRequest.model_validate({"id": self._jobs, "job": job})
            patience = silence_limit(limit, self._pauses.get(name, 0.0))
            try:
                async with asyncio.timeout(patience) as deadline:
                    reply = await self._ask(request, sign, _Pauses(self._pauses, name, deadline, patience))
            except TimeoutError as error:
                await self._end()
                raise WorkerFailed(
                    f"the worker process showed no progress for {patience:.0f} s in the job {name} and was ended", self._progress
                ) from error
            except ConnectionError as error:
                status = await self._end(_STOP_GRACE)
                _log.warning(
                    "worker process %s ended with status %s during the job %s; the next job starts it again",
                    self._name, status, name,
                )  # fmt: skip
                text = f"the worker process crashed (status {status}) during the job {name}"
                raise WorkerFailed(text, self._progress) from error
            except ValueError as error:
                await self._end()  # otherwise the rest of the line is read as the next answer
                raise WorkerFailed(
                    f"the answer to the job {name} cannot be read ({error}); the worker process was ended"
                ) from error
            except asyncio.CancelledError:
                await self._end()  # otherwise its answer is read as that of the next job
                raise
        if isinstance(reply, JobRefused):
            raise WorkerRefused(reply.text, reply.check)
        return cast(A, reply.answer)

    async def _ask(self, request: JobRequest, sign: Callable[[bytes], str] | None, pauses: _Pauses) -> JobDone | JobRefused:
        """Raises ConnectionError when the process ends before it answers, ValueError when a line is malformed."""
        if self._outdated:
            self._outdated = False
            await self._end(_STOP_GRACE)
        if self._child is None or self._child.process.returncode is not None:
            arguments = (str(self._manifest), self._name, self._device)
            self._child = await Child.start("lutetia.coordinator.worker", *arguments, environment=self._environment)
            _log.info("started worker process %s, process id %d", self._name, self._child.process.pid)
        if self._idle_watch is None or self._idle_watch.done():
            self._idle_watch = asyncio.create_task(self._end_when_idle())
        child = self._child
        await child.send(encode(request))
        async for line in child.messages():
            message: FromWorker = read_from_worker(line)
            match message:
                case LibraryLoaded():
                    pauses.went_on()
                case JobProgress() if message.id == request.id:
                    pauses.ended()
                    self._progress = message
                case SignatureRequest() if sign:
                    await child.send(encode(SignatureReply(signature=sign(message.message.encode()))))
                case JobDone() if message.id == request.id:
                    if message.answer.job != request.job.job:
                        raise ValueError(f"it answers the job {message.answer.job}")
                    return message
                case JobRefused() if message.id == request.id:
                    return message
                case _:
                    pass
        raise ConnectionError("the worker process ended")

    async def _end_when_idle(self) -> None:
        """Once per `idle` seconds, end the process if it had no job since the last look."""
        while self._child:
            before = self._jobs
            await asyncio.sleep(self._idle)
            async with self._lock:
                if self._jobs == before and self._child:
                    await self._end(_STOP_GRACE)
                    _log.info("ended worker process %s: no job for %.0f s", self._name, self._idle)

    async def _end(self, grace: float = 0.0) -> int | None:
        if (child := self._child) is None:
            return None
        status = await child.stop(grace)
        self._child = None  # only now: if this task is cancelled while it waits, `close` still ends the process
        return status

    def renew(self) -> None:
        """Start a new process for the next job, which reads the newest manifest."""
        self._outdated = True

    async def close(self) -> None:
        """End the process; a job in progress is lost."""
        if self._idle_watch:
            self._idle_watch.cancel()
        await self._end(_STOP_GRACE)
