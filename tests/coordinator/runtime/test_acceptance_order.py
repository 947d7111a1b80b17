"""Invariant: when an acceptance is published, its author and the coordinator both hold its blobs, whatever happens next.

The blobs are durable in the coordinator's store before the ledger has the acceptance, and the ledger is written before it is
published. Here a real judge loop accepts on real files, and the power fails after each of its system calls.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lutetia.coordinator.ledger.log import Ledger
from lutetia.protocol.blobs.store import BlobStore
from tests.coordinator.acceptance.judge_driver import make_manifest
from tests.protocol.power_loss import every_power_loss, needs_strace, record

JUDGE = """
import asyncio, os, sys, time
from pathlib import Path
root = Path(sys.argv[1])
from tests.coordinator.acceptance.judge_driver import COORDINATOR, PEERS, first_event, limits_of, make_manifest, make_record
from lutetia.coordinator.runtime.judge_loop import JudgeLoop
from lutetia.coordinator.acceptance.transition import JudgeRules
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.acceptance.messages import Offered
from lutetia.coordinator.runtime.check_runner import NetworkCheckRunner
from lutetia.protocol.blobs.store import BlobStore

class Runner(NetworkCheckRunner):
    async def limits(self):
        return limits_of(2)
    async def fetch(self, record, patience=1.0):
        for name in ("weights", "state", "trace"):
            self.incoming.add_bytes(f"{name} of epoch {record.epoch}".encode() * 3)
    async def inspect(self, record, lanes=()):
        pass
    async def parent_losses(self, record, parent):
        return [0.5]
    async def losses(self, record):
        return [0.4]
    async def raw_losses(self, record):
        return [0.4]
    async def replay(self, audit):
        await asyncio.Event().wait()

async def main():
    manifest = make_manifest()
    ledger = Ledger.create(root / "ledger.sqlite", first_event(manifest))
    runner = Runner(None, manifest, BlobStore(root / "blobs"), BlobStore(root / "incoming"), None, None, 1.0, None)
    published = asyncio.Queue()
    async def publish(record):
        print("@published", record.epoch, flush=True)
        published.put_nowait(record)
    judge_loop = JudgeLoop(JudgeRules(manifest, COORDINATOR.public_key, b"secret"), ledger, runner, publish, time.time)
    running = asyncio.create_task(judge_loop.run())
    print("@ready", flush=True)
    parent = None
    for epoch in (1, 2):
        names = ("weights", "state", "trace")
        refs = {name: runner.incoming.add_bytes(f"{name} of epoch {epoch}".encode() * 3) for name in names}
        result = make_record(manifest, PEERS[0], 0, epoch, parent, **refs)
        reply = await judge_loop.submit(Offered(result, time.time()))
        assert reply.verdict == "queued", reply
        waiting = asyncio.create_task(published.get())
        await asyncio.wait([waiting, running], return_when=asyncio.FIRST_COMPLETED)
        parent = (waiting if waiting.done() else running).result().checkpoint
    sys.stdout.flush()
    os._exit(0)

asyncio.run(main())
"""


@needs_strace
@pytest.mark.timeout(900)
def test_power_loss_never_loses_blobs_of_an_acceptance(tmp_path: Path):
    run = make_manifest().run_id

    def check(folder: Path, marks: list[str]) -> None:
        if "ready" not in marks:
            return
        ledger = Ledger.open(folder / "ledger.sqlite", run)
        ledger.close()
        shard, blobs = ledger.state.shards[0], BlobStore(folder / "blobs")
        assert shard.epoch >= max((int(mark.split()[1]) for mark in marks if mark != "ready"), default=0), (
            "published, but not in the ledger"
        )
        if shard.acceptance:
            for ref in (shard.acceptance.weights, shard.acceptance.state):
                assert blobs.has(ref.digest), "accepted, but its blob is lost"
                blobs.verify(ref.digest)

    calls = record(JUDGE, tmp_path / "root")
    assert every_power_loss(calls, tmp_path / "root", tmp_path / "disks", check) > 60
