"""The network loop's side of a workshop: one child, one job at a time, started when needed and ended when long idle."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lutetia.system.errors import LutetiaError
from lutetia.system.process import Child, Message

_log = logging.getLogger(__name__)

_STOP_GRACE = 2.0
IDLE_SECONDS = 900.0
"""After so long without a job a child ends: it holds some hundred MiB, and a new one starts in seconds."""


class WorkerRefused(LutetiaError):
    """The job was carried out, and what it was given is wrong; `rung` is set when a checkpoint's file is."""

    code, name = 50, "integrity"

    def __init__(self, text: str, rung: str | None) -> None:
        super().__init__(text)
        self.rung = rung


class WorkerFailed(LutetiaError):
    """The child crashed, took too long or cannot be understood: nothing is known about the job."""

    code, name = 70, "internal"


class WorkerClient:
    """`ask` starts `python -m lutetia.coordinator.workshop` where none lives. `threads` and `nice` bound what it takes."""

    def __init__(self, manifest: Path, *, name: str, threads: int, nice: int, idle: float = IDLE_SECONDS) -> None:
        self._manifest, self._name, self._idle = manifest, name, idle
        self._environment = {
            variable: str(threads) for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        }
        self._environment["LUTETIA_WORKSHOP_NICE"] = str(nice)
        self._child: Child | None = None
        self._turn = asyncio.Lock()
        self._jobs = 0
        self._stale = False
        self._watch: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The living child's process id."""
        return self._child.process.pid if self._child else None

    async def ask(self, verb: str, *, limit: float, sign: Callable[[bytes], str] | None = None, **fields: Any) -> dict[str, Any]:
        """Have one job done within `limit` seconds. `sign` answers what the job asks to have signed.

        Raises WorkshopRefused, or WorkshopFailed when the child crashed, or was ended for being too slow or not understood.
        """
        async with self._turn:
            self._jobs += 1
            message = {"id": self._jobs, "verb": verb, **fields}
            try:
                async with asyncio.timeout(limit):
                    answer = await self._ask(message, sign)
            except TimeoutError as error:
                await self._end()
                raise WorkerFailed(f"the workshop took longer than {limit:.0f} s to {verb} and was ended") from error
            except ConnectionError as error:
                status = await self._end(_STOP_GRACE)
                _log.warning("%s workshop ended with status %s during %s; it will be started again", self._name, status, verb)
                raise WorkerFailed(f"the workshop crashed (status {status}) during {verb}") from error
            except ValueError as error:
                await self._end()  # the rest of it would be taken for the next answer
                raise WorkerFailed(f"the workshop's answer to {verb} cannot be read ({error}); it was ended") from error
            except asyncio.CancelledError:
                await self._end()  # its answer would be taken for the next job's
                raise
        if "refused" in answer:
            raise WorkerRefused(answer["refused"]["text"], answer["refused"].get("rung"))
        return answer["done"]

    async def _ask(self, message: Message, sign: Callable[[bytes], str] | None) -> Message:
        if self._stale:
            self._stale = False
            await self._end(_STOP_GRACE)
        if self._child is None or self._child.process.returncode is not None:
            words = (str(self._manifest), self._name)
            self._child = await Child.start("lutetia.coordinator.worker", *words, environment=self._environment)
            _log.info("started the %s workshop, process %d", self._name, self._child.process.pid)
        if self._watch is None or self._watch.done():
            self._watch = asyncio.create_task(self._end_when_idle())
        child = self._child
        await child.send(message)
        async for answer in child.messages():
            if "sign" in answer and sign:
                await child.send({"signature": sign(answer["sign"].encode())})
            elif answer.get("id") == message["id"]:
                return answer
        raise ConnectionError("the child ended")

    async def _end_when_idle(self) -> None:
        """Looks once per `idle` seconds whether there was a job since the last look."""
        while self._child:
            before = self._jobs
            await asyncio.sleep(self._idle)
            async with self._turn:
                if self._jobs == before and self._child:
                    await self._end(_STOP_GRACE)
                    _log.info("ended the %s workshop: no job for %.0f s", self._name, self._idle)

    async def _end(self, grace: float = 0.0) -> int | None:
        if (child := self._child) is None:
            return None
        status = await child.stop(grace)
        self._child = None  # not before: whoever is cancelled here leaves the child to `close`
        return status

    def renew(self) -> None:
        """The next job is for a new child, which reads the manifest anew."""
        self._stale = True

    async def close(self) -> None:
        """End the child; a job in progress is lost."""
        if self._watch:
            self._watch.cancel()
        await self._end(_STOP_GRACE)
