"""The coordinator's side of the process that serves HTTP: `python -m lutetia.coordinator.web ORDER`, where ORDER is an HttpOrder.

Pages are read by anybody, and each request costs processor time. In a process of its own, with a lower priority, a flood of them
delays no offer, no check and no record. The process starts when somebody first connects, and again if it ends. It reads the run's
folder and follows the ledger by itself; what is on no disk comes from the coordinator, one JSON object a line in both directions.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from lutetia.coordinator.alerts.fault import BootstrapFault
from lutetia.coordinator.web.listener import page_address
from lutetia.protocol.blobs.upload_limit import RateLimit
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.fields import PublicKey
from lutetia.protocol.schema.status import SwarmStatus
from lutetia.system.process import Child
from lutetia.system.retry import backoff

_log = logging.getLogger(__name__)

LASTED_SECONDS = 60.0
"""A process that ended after so long is started again at once."""
_STOP_GRACE = 3.0


class HttpOrder(Frozen):
    """What the process is to serve."""

    root: str = Field(description="The run's folder")
    listener: int = Field(description="Descriptor of the socket at which it listens")
    coordinator: PublicKey = Field(description="Public key of the coordinator, which signs the ledger's snapshot")
    about: str = Field(description="One sentence of the owner about the run")
    bytes_per_second: float | None = Field(description="Most bytes of blobs sent in a second; each is asked for. Null: no limit")


class _NewsBesideStatus(Frozen):
    say: Literal["news"] = "news"
    bootstrap: tuple[BootstrapFault, ...] = Field(description="The addresses of the ticket that do not answer")
    sent: int = Field(description="Bytes of blobs that the coordinator has sent itself")


class HttpNews(_NewsBesideStatus):
    """What is on no disk. Sent when the status changes, and every two seconds. The coordinator has the status as JSON already."""

    status: SwarmStatus = Field(description="The status document")


class BytesGranted(Frozen):
    """The bytes that were asked for under this number may be sent."""

    say: Literal["granted"] = "granted"
    number: int


class BytesWanted(Frozen):
    """The process asks whether it may send so many bytes."""

    number: int
    count: int = Field(ge=0)


ToHttp: TypeAdapter[HttpNews | BytesGranted] = TypeAdapter(Annotated[HttpNews | BytesGranted, Field(discriminator="say")])


@dataclass
class HttpServer:
    """The process, kept alive while somebody connects.

    Args:
        order: what it serves.
        listener: the socket of the order's descriptor. Whoever connects while no process runs waits for it.
        upload: the limit that all uploads share.
        bootstrap: the addresses of the ticket that do not answer.
    """

    order: HttpOrder
    listener: socket.socket
    upload: RateLimit
    bootstrap: Callable[[], Sequence[BootstrapFault]] = lambda: ()
    _status: bytes = b""
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _child: Child | None = None
    _granted: int = 0

    @property
    def pid(self) -> int | None:
        """The process id; None while none runs."""
        return self._child.process.pid if self._child else None

    def tell(self, status: bytes) -> None:
        """Show this status document (JSON) from now on."""
        self._status = status
        self._news.set()

    async def renew(self) -> None:
        """End the process. The next one reads the ledger from its beginning, or from the newest snapshot."""
        if self._child:
            await self._child.kill()

    async def run(self) -> None:
        """Serve until cancelled. A process that ends is started again when somebody connects, after a pause that grows."""
        loop, failures = asyncio.get_running_loop(), 0
        _log.info("HTTP on %s", page_address(self.listener))
        try:
            while True:
                await _readable(self.listener)
                began = loop.time()
                status = await self._serve()
                failures = 1 if loop.time() - began >= LASTED_SECONDS else failures + 1
                pause = backoff(failures)
                _log.warning("the HTTP process ended with status %s; the next one starts in %.0f s", status, pause)
                await asyncio.sleep(pause)
        finally:
            self.listener.close()

    async def _serve(self) -> int | None:
        """Start a process and talk to it until it ends; its exit status."""
        child = await Child.start("lutetia.coordinator.web", self.order.model_dump_json(), pass_fds=(self.order.listener,))
        self._child = child
        _log.info("started the HTTP process, process id %d", child.process.pid)
        telling = asyncio.create_task(self._tell(child))
        granting = set[asyncio.Task[None]]()
        try:
            async for line in child.messages():
                granting.add(task := asyncio.create_task(self._grant(child, BytesWanted.model_validate(line))))
                task.add_done_callback(granting.discard)
        except (ValueError, ValidationError) as error:
            _log.warning("the HTTP process said what cannot be read (%s) and is ended", error)
        finally:
            for task in (telling, *granting):
                task.cancel()
            await asyncio.gather(telling, *granting, return_exceptions=True)
            status = await child.stop(_STOP_GRACE)
            self._child = None
        return status

    async def _tell(self, child: Child) -> None:
        """Send each status document, the newest one where it reads slowly."""
        self._news.set()
        with contextlib.suppress(ConnectionError):
            while True:
                await self._news.wait()
                self._news.clear()
                if self._status:
                    rest = _NewsBesideStatus(bootstrap=tuple(self.bootstrap()), sent=self.upload.taken - self._granted)
                    await child.send_line(b'{"status":' + self._status + b"," + rest.model_dump_json().encode()[1:])

    async def _grant(self, child: Child, wanted: BytesWanted) -> None:
        await self.upload.take(wanted.count)
        self._granted += wanted.count
        with contextlib.suppress(ConnectionError):
            await child.send_line(BytesGranted(number=wanted.number).model_dump_json().encode())


async def _readable(listener: socket.socket) -> None:
    """Wait until somebody connects."""
    loop, connected = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(listener.fileno(), connected.set)
    try:
        await connected.wait()
    finally:
        loop.remove_reader(listener.fileno())
