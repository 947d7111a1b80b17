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
    JobRefused,
    JobRequest,
    SignatureReply,
    SignatureRequest,
    encode,
    read_from_worker,
)
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
    """The worker process crashed, took too long or sent a malformed line: nothing is known about the job."""

    code, name = 70, "internal"


class WorkerClient:
    """`ask` starts `python -m lutetia.coordinator.worker` when none runs.

    Args:
        manifest: the run's manifest file, which the process reads when it starts.
        name: which of the coordinator's worker processes this is, for its log lines.
        threads: threads of torch.
        nice: how much lower its priority is than the coordinator's, as `os.nice` counts.
        idle: seconds without a job after which the process ends.
    """

    def __init__(self, manifest: Path, *, name: str, threads: int, nice: int, idle: float = IDLE_SECONDS) -> None:
        self._manifest, self._name, self._idle = manifest, name, idle
        self._environment = {
            variable: str(threads) for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        }
        self._environment["LUTETIA_WORKER_NICE"] = str(nice)
        self._child: Child | None = None
        self._lock = asyncio.Lock()
        self._jobs = 0
        self._outdated = False
        self._idle_watch: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The process id; None when no process runs."""
        return self._child.process.pid if self._child else None

    async def ask(self, job: Job[A], *, limit: float, sign: Callable[[bytes], str] | None = None) -> A:
        """Have `job` done within `limit` seconds. `sign` signs what the job asks to have signed.

        Raises WorkerRefused, or WorkerFailed when the process crashed, or was ended because it was too slow or sent a malformed
        line.
        """
        name = job.name()
        async with self._lock:
            self._jobs += 1
            request = JobRequest.model_validate({"id": self._jobs, "job": job})
            try:
                async with asyncio.timeout(limit):
                    reply = await self._ask(request, sign)
            except TimeoutError as error:
                await self._end()
                raise WorkerFailed(
                    f"the worker process took longer than {limit:.0f} s for the job {name} and was ended"
                ) from error
            except ConnectionError as error:
                status = await self._end(_STOP_GRACE)
                _log.warning(
                    "worker process %s ended with status %s during the job %s; the next job starts it again",
                    self._name, status, name,
                )  # fmt: skip
                raise WorkerFailed(f"the worker process crashed (status {status}) during the job {name}") from error
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

    async def _ask(self, request: JobRequest, sign: Callable[[bytes], str] | None) -> JobDone | JobRefused:
        """Raises ConnectionError when the process ends before it answers, ValueError when a line is malformed."""
        if self._outdated:
            self._outdated = False
            await self._end(_STOP_GRACE)
        if self._child is None or self._child.process.returncode is not None:
            arguments = (str(self._manifest), self._name)
            self._child = await Child.start("lutetia.coordinator.worker", *arguments, environment=self._environment)
            _log.info("started worker process %s, process id %d", self._name, self._child.process.pid)
        if self._idle_watch is None or self._idle_watch.done():
            self._idle_watch = asyncio.create_task(self._end_when_idle())
        child = self._child
        await child.send(encode(request))
        async for line in child.messages():
            message: FromWorker = read_from_worker(line)
            match message:
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
