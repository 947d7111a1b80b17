"""A small run on disk for the tests of the web API: a real ledger that a real judge filled, with hostile texts in it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from lutetia.coordinator.ledger.events import Event, RouterTrained, RunCreated
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.ledger.status_builder import LiveView, Sighting, status
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.web.api.answers import RequestLimit
from lutetia.coordinator.web.api.source import RunSource
from lutetia.coordinator.web.app import bind, build_app, serve_http
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.blobs.upload_limit import RateLimit
from lutetia.protocol.schema.records import CheckpointRecord, Hardware, NodeRecord
from lutetia.protocol.schema.status import SwarmStatus
from tests.coordinator.acceptance.judge_driver import PEERS, JudgeDriver, blob, drive_judge, make_record

HOSTILE = "tensor <script>alert(1)</script> is not finite"
STEP = 600.0
"""Seconds between two results."""


@dataclass
class RecordedRun:
    """The run, what is shown of it, and a judge that can add to it."""

    source: RunSource
    driver: JudgeDriver
    written: int = 0

    def write(self, *more: Event) -> None:
        """Append what the judge decided since the last call, and `more`."""
        events = self.driver.events[self.written :]
        self.written = len(self.driver.events)
        self.source.ledger.append([*events, *more])
        self.source.notify()

    def accept(self, peer: int, shard: int = 0) -> CheckpointRecord:
        """That peer's result for the next epoch is accepted, some minutes later."""
        self.driver.now += STEP
        return self.driver.accept(PEERS[peer], shard)


def record_run(folder: Path) -> RecordedRun:
    """Three accepted results of two peers in two shards, one of a third peer refused with a hostile text, a router, a gallery."""
    driver = drive_judge(epochs=9, name="recorded run")
    root = RunFolder(folder)
    root.gallery.mkdir(parents=True)
    root.ticket.write_text("lutetia1example\n")
    (root.gallery / "000.gif").write_bytes(b"GIF89a")
    (root.gallery / "gallery.json").write_text(json.dumps({"clips": [{"prompt": "a <b>cat</b>", "file": "000.gif", "seed": 0}]}))
    created = driver.events[0]
    assert isinstance(created, RunCreated)
    ledger = Ledger.create(root.ledger, created)

    def show() -> SwarmStatus:
        node = NodeRecord(
            run=driver.manifest.run_id, owner=PEERS[0].public_key, issued=driver.now, peer_id=PEERS[0].peer_id,
            samples_per_second=3.0, software="0.1", state="training", hardware=Hardware(device="cpu", memory_bytes=1, cores=2),
        )  # fmt: skip
        view = LiveView([Sighting(node, driver.now + 9, driver.now)], [])
        return status(ledger.state, driver.manifest, view, driver.now + 1, software="0.1")

    run = RecordedRun(RunSource(root, ledger, lambda: driver.manifest, show), driver, written=1)
    first = run.accept(0)
    run.accept(1, shard=1)
    driver.refuse(make_record(driver.manifest, PEERS[2], epoch=2, parent=first.digest), HOSTILE)
    run.accept(1)
    by_time = (1.0, 0.8)
    run.write(
        RouterTrained(time=driver.now, epochs=(2, 1), router=blob("router"), accuracy=0.9, accuracy_by_time=by_time)
    )  # fmt: skip
    return run


@asynccontextmanager
async def serving(run: RecordedRun, limit: RequestLimit | None = None) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the real server that shows `run`; `limit`: of requests, None: the usual one."""
    listener = bind("127.0.0.1:0")
    app = build_app(run.source.status, BlobStore(run.source.folder.blobs), RateLimit(None), run.source, limit)
    task = asyncio.create_task(serve_http(listener, app))
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        yield client
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
