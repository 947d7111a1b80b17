"""Serves HTTP in a process of its own, for the coordinator that started it (`coordinator.web.server_process`)."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.owner.names import PeerNames
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.snapshot.document import read_snapshot
from lutetia.coordinator.web.api.source import RunSource
from lutetia.coordinator.web.app import build_app, serve_http
from lutetia.coordinator.web.server_process import BytesGranted, BytesWanted, HttpNews, HttpOrder, ToHttp
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.blobs.upload_limit import RateLimit
from lutetia.protocol.schema.status import SwarmStatus
from lutetia.system.log_format import stderr_handler, wanted_level
from lutetia.system.process import ParentChannel, give_way, raise_file_limit

NICENESS = 10
"""Below the coordinator, its network process and its worker processes: pages get what judging leaves over."""


class SharedRate(RateLimit):
    """The coordinator's limit of uploads, which is asked for each piece. `taken` counts what the coordinator sends, too."""

    def __init__(self, bytes_per_second: float | None, ask: Callable[[BytesWanted], None]) -> None:
        super().__init__(bytes_per_second)
        self._ask, self._numbers, self._elsewhere = ask, itertools.count(), 0
        self._waiting: dict[int, asyncio.Future[None]] = {}

    async def take(self, count: int) -> None:
        if self.bytes_per_second:
            number = next(self._numbers)
            granted = self._waiting[number] = asyncio.get_running_loop().create_future()
            self._ask(BytesWanted(number=number, count=count))
            try:
                await granted
            finally:
                del self._waiting[number]
        self.taken += count

    def granted(self, number: int) -> None:
        """The coordinator has answered. It does so also where nobody waits any more."""
        waiting = self._waiting.get(number)
        if waiting and not waiting.done():
            waiting.set_result(None)

    def count_elsewhere(self, sent: int) -> None:
        """The coordinator itself has sent so many bytes by now."""
        self.taken, self._elsewhere = self.taken + sent - self._elsewhere, sent


class ShownRun:
    """The run as this process knows it: the folder, the ledger that it follows, and the coordinator's last news."""

    def __init__(self, order: HttpOrder, news: HttpNews) -> None:
        self.folder = RunFolder(Path(order.root))
        self._manifest = self.folder.read_manifest(now=0.0).manifest  # an expired run is shown, too
        run = self._manifest.run_id
        snapshot = read_snapshot(self.folder.snapshot, run, order.coordinator)
        ledger = Ledger.open(self.folder.ledger, run, to_read=True, start=snapshot and snapshot.start)
        earlier = snapshot.history if snapshot and ledger.trusted else lambda: None
        self.source = RunSource(
            self.folder, ledger, lambda: self._manifest, self.status, earlier, order.about,
            bootstrap=lambda: self._news.bootstrap, process=os.getppid(),
        )  # fmt: skip
        self._news = news
        self._names_of = 0.0
        self.hear(news)

    def status(self) -> SwarmStatus:
        return self._news.status

    def hear(self, news: HttpNews) -> None:
        """Show these news, and the events that were added."""
        self._news = news
        if news.status.manifest_version != self._manifest.version:
            self._manifest = self.folder.read_manifest(now=0.0).manifest
        changed = self.folder.names.stat().st_mtime if self.folder.names.exists() else 0.0
        if changed != self._names_of:
            self._names_of, self.source.names = changed, PeerNames(self.folder.names).names
        if self.source.ledger.catch_up():
            self.source.notify()


async def serve(order: HttpOrder, channel: ParentChannel) -> None:
    """Serve until the coordinator closes the channel."""
    lines: asyncio.Queue[bytes | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def read() -> None:
        for line in channel.lines():
            loop.call_soon_threadsafe(lines.put_nowait, line)
        loop.call_soon_threadsafe(lines.put_nowait, None)

    threading.Thread(target=read, daemon=True).start()
    first = await lines.get()
    if first is None:
        return
    news = HttpNews.model_validate_json(first)
    rate = SharedRate(order.bytes_per_second, lambda wanted: channel.send(wanted.model_dump()))
    rate.count_elsewhere(news.sent)
    shown = ShownRun(order, news)
    app = build_app(shown.status, BlobStore(shown.folder.blobs), rate, shown.source)
    serving = asyncio.create_task(serve_http(socket.socket(fileno=order.listener), app))
    try:
        while (line := await lines.get()) is not None:
            match ToHttp.validate_json(line):
                case HttpNews() as news:
                    rate.count_elsewhere(news.sent)
                    shown.hear(news)
                case BytesGranted(number=number):
                    rate.granted(number)
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


def main() -> None:
    """Serve what the order in the first argument says."""
    channel = ParentChannel()
    give_way(NICENESS)
    logging.basicConfig(handlers=[stderr_handler()], level=logging.WARNING)
    logging.getLogger("lutetia").setLevel(wanted_level())
    raise_file_limit()
    import uvloop

    uvloop.run(serve(HttpOrder.model_validate_json(sys.argv[1]), channel))
    sys.stdout.flush()
    os._exit(0)  # the thread that reads stdin may still wait for it
