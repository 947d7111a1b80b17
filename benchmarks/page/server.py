"""The coordinator's HTTP side over a recorded ledger, in a process of its own.

`python -m benchmarks.page.server FOLDER SHARDS PEERS EVENTS NOW`: it prints how long its start took and its port, then serves. A
number on its stdin appends so many accepted results to the ledger, which it confirms by a line. It ends with its stdin.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import time
from pathlib import Path

from benchmarks.page.recorded_run import Lineage, MadeUpRun
from lutetia.coordinator.ledger.status_builder import LiveView, Sighting, status
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.snapshot.document import open_with_snapshot
from lutetia.coordinator.web.api.source import RunSource
from lutetia.coordinator.web.app import build_app, serve_http
from lutetia.coordinator.web.listener import bind
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.blobs.upload_limit import RateLimit
from lutetia.protocol.schema.records import ClaimRecord, Hardware, NodeRecord
from lutetia.protocol.schema.status import SwarmStatus
from tests.coordinator.acceptance.judge_driver import COORDINATOR

FRESH_SECONDS = 0.5
"""As in `coordinator.service`."""


class RecordedCoordinator:
    """What the page's server needs of a coordinator; all peers are online, and each shard has a holder."""

    def __init__(self, folder: Path, run: MadeUpRun) -> None:
        self.run = run
        root = RunFolder(folder)
        self.ledger, snapshot = open_with_snapshot(root, run.manifest.run_id, COORDINATOR.public_key)
        self.source = RunSource(
            root, self.ledger, lambda: run.manifest, self.status, snapshot.history if snapshot else lambda: None
        )
        self._status: tuple[float, SwarmStatus] | None = None
        self._generator = random.Random(11)
        holders = run.people[: run.shards]
        now = time.time()
        nodes = [
            NodeRecord(
                run=run.manifest.run_id, owner=peer.public_key, issued=now, peer_id=peer.peer_id, samples_per_second=3.0,
                software="0.1.0", state="training", hardware=Hardware(device="cuda", memory_bytes=24 << 30, cores=8),
            )
            for peer in run.people
        ]  # fmt: skip
        claims = [
            ClaimRecord(
                run=run.manifest.run_id, owner=peer.public_key, issued=now, shard=shard, epoch=1, samples=4, state="training"
            )
            for shard, peer in enumerate(holders)
        ]  # fmt: skip
        far = now + 1e6
        self.view = LiveView([Sighting(node, far, now) for node in nodes], [Sighting(claim, far, now) for claim in claims])

    def status(self) -> SwarmStatus:
        now = time.time()
        if self._status is None or now - self._status[0] >= FRESH_SECONDS:
            self._status = now, status(self.ledger.state, self.run.manifest, self.view, now, software="0.1.0")
        return self._status[1]

    def accept(self) -> None:
        """Append one accepted result, as a judge does."""
        shard = self._generator.randrange(self.run.shards)
        lineage = Lineage.after(self.run.manifest, self.ledger.state.shards[shard], shard)
        author, other = self._generator.sample(self.run.people, 2)
        self.ledger.append(list(lineage.epoch_done(author, other, time.time(), self._generator)))
        self._status = None
        self.source.notify()


async def serve(coordinator: RecordedCoordinator) -> None:
    """Serve, and append what stdin asks for, until it ends."""
    listener = bind("127.0.0.1:0")
    blobs = BlobStore(coordinator.source.folder.blobs)
    app = build_app(coordinator.status, blobs, RateLimit(None), coordinator.source)
    serving = asyncio.create_task(serve_http(listener, app))
    print(listener.getsockname()[1], flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        for _ in range(int(line)):
            coordinator.accept()
        print("accepted", flush=True)
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


def main() -> None:
    folder, shards, peers, events, now = sys.argv[1:]
    run = MadeUpRun(int(shards), int(peers), int(events), float(now))
    began, spent = time.perf_counter(), time.process_time()
    coordinator = RecordedCoordinator(Path(folder), run)
    print(f"{time.perf_counter() - began:.3f} {time.process_time() - spent:.3f} {coordinator.ledger.trusted}", flush=True)
    with contextlib.closing(coordinator.ledger):
        import uvloop

        uvloop.run(serve(coordinator))


if __name__ == "__main__":
    main()
