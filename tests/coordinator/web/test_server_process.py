"""HTTP in a process of its own: a real one, for a run on disk whose ledger grows meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from lutetia.coordinator.web.listener import bind
from lutetia.coordinator.web.process import NICENESS
from lutetia.coordinator.web.server_process import HttpOrder, HttpServer
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.blobs.upload_limit import RateLimit
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.manifest import SignedManifest
from tests.coordinator.acceptance.judge_driver import COORDINATOR, OWNER
from tests.coordinator.web.api.recorded_run import RecordedRun, record_run

BYTES = 1 << 20


@contextlib.asynccontextmanager
async def serving(run: RecordedRun) -> AsyncIterator[tuple[HttpServer, httpx.AsyncClient]]:
    """The process that serves `run`, and a client of it."""
    folder = run.source.folder
    folder.manifest.write_bytes(SignedManifest.sign(run.driver.manifest, OWNER).to_bytes())
    listener = bind("127.0.0.1:0")
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    order = HttpOrder(
        root=str(folder.root), listener=listener.fileno(), coordinator=COORDINATOR.public_key, about="what it is about",
        bytes_per_second=16 * BYTES,
    )  # fmt: skip
    http = HttpServer(order, listener, RateLimit(order.bytes_per_second))
    http.tell(canonical(run.source.status()))
    task = asyncio.create_task(http.run())
    try:
        async with httpx.AsyncClient(base_url=address, timeout=120) as client:
            yield http, client
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_process_of_low_priority_serves_http_follows_the_run_and_is_replaced_when_it_ends(tmp_path: Path):
    run = record_run(tmp_path / "run")
    ref = BlobStore(run.source.folder.blobs).add_bytes(os.urandom(BYTES))
    async with serving(run) as (http, client):
        assert http.pid is None, "nobody has connected yet"
        about = (await client.get("/api/v1/run")).json()
        assert (about["events"], about["about"]) == (run.source.ledger.head[0], "what it is about")
        first = http.pid
        assert first is not None
        assert psutil.Process(first).nice() == min(19, os.nice(0) + NICENESS)

        async with client.stream("GET", f"/api/v1/events/stream?after={about['events']}") as stream:
            lines = stream.aiter_lines()
            assert (await anext(lines)).startswith("retry")
            run.accept(0, shard=1)
            run.write()
            http.tell(canonical(run.source.status()))
            assert [line async for line in _until_id(lines)] == [f"id: {about['events'] + 1}"]

        assert len((await client.get(f"/blobs/{ref.digest}")).content) == BYTES
        assert http.upload.taken == BYTES, "all uploads share one limit"
        families = {one.name: one for one in text_string_to_metric_families((await client.get("/metrics")).text)}
        assert families["lutetia_blob_sent_bytes"].samples[0].value == BYTES
        started = families["process_start_time_seconds"].samples[0].value
        assert abs(started - psutil.Process().create_time()) < 1.0, "of the coordinator's process, not of the one that answers"

        os.kill(first, signal.SIGKILL)
        async with httpx.AsyncClient(base_url=client.base_url, timeout=120) as another:
            assert (await another.get("/api/v1/run")).json()["events"] == run.source.ledger.head[0]
        second = http.pid
        assert second not in (None, first)
    assert not psutil.pid_exists(second or 0)


async def _until_id(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    """The first line that names an event."""
    async for line in lines:
        if line.startswith("id: "):
            yield line
            return
