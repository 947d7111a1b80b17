"""Data in parts arrive in the order in which they are trained, within the disk limit. A network in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lutetia.models.data.parts.index import MAX_INDEX_BYTES, ShardIndex
from lutetia.models.data.parts.order import next_uses
from lutetia.node.machine import messages as m
from lutetia.node.machine.state import ShardWork
from lutetia.node.runtime.data_fetcher import AT_ONCE, DataFetcher
from lutetia.node.runtime.devices.device_shell import DeviceShell
from lutetia.node.runtime.devices.trainer_process import TrainerReport
from lutetia.node.runtime.status_fields import device_status
from lutetia.node.trainer.messages import ProgressReport, WaitingForPart
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.system.errors import DiskError
from tests.node.runtime.test_tasks import NodeSetup
from tests.node.services.test_auditor import make_shell
from tests.node.tiny_run import TinyRun, make_run

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A shard of ten parts, of which a batch needs one or two."""
    return make_run(tmp_path_factory.mktemp("run"), clips=30, batch=2, steps=6)


def at_work(shell: DeviceShell, shard: int = 0) -> None:
    """The state of a node whose trainer has begun."""
    work = ShardWork(shard=shard, epoch=0, checkpoint=None)
    shell.state = replace(shell.state, phase="training", work=work)


def index_of(node: NodeSetup) -> ShardIndex:
    found = node.workspace.data.index(node.workspace.store, node.run.manifest.shards[0])
    assert found
    return found


def here(node: NodeSetup, index: ShardIndex) -> set[int]:
    return {number for number, part in enumerate(index.parts) if node.workspace.store.has(part.blob.digest)}


async def test_sync_fetches_what_the_first_batch_needs_and_the_fetcher_the_rest_in_order(run: TinyRun, tmp_path: Path):
    node = await NodeSetup.create(run, tmp_path / "node")
    assert isinstance(await node.tasks.sync(m.Sync(0, 0, None)), m.SyncDone)
    index = index_of(node)
    uses = next_uses(run.manifest, 0, index, 0)
    first = {number for number, use in enumerate(uses) if use < 2}
    assert here(node, index) == first
    assert len(first) < 0.3 * len(index.parts)
    assert node.workspace.unannounced() == set(), "no work folder yet"
    shell = make_shell(node, tmp_path)
    at_work(shell)
    node.workspace.work(0).path.mkdir(parents=True)
    assert run.manifest.shards[0].train.digest in node.workspace.unannounced(), "others would ask for parts that are not here"
    order = [number for number in uses.argsort(kind="stable").tolist() if number not in first]
    fetcher = DataFetcher(shell)
    for begin in range(0, len(order), AT_ONCE):
        assert await fetcher.fetch_some()
        assert here(node, index) == first | set(order[: begin + AT_ONCE])
    assert not await fetcher.fetch_some()
    assert node.workspace.unannounced() == {part.blob.digest for part in index.parts}
    assert node.workspace.held().keys() >= {part.blob.digest for part in index.parts}


async def test_under_a_disk_limit_parts_that_are_used_later_make_room(run: TinyRun, tmp_path: Path):
    node = await NodeSetup.create(run, tmp_path / "node")
    store, shard = node.workspace.store, run.manifest.shards[0]
    assert isinstance(await node.tasks.sync(m.Sync(0, 0, None)), m.SyncDone)
    index, shell = index_of(node), make_shell(node, tmp_path)
    at_work(shell)
    largest = max(part.blob.size for part in index.parts)
    store.limit_bytes = shard.train.size + 5 * largest
    fetcher = DataFetcher(shell)
    for step in range(run.manifest.steps_per_epoch):
        shell.trainer.report = TrainerReport(epoch=1, step=step, steps=6)
        while await fetcher.fetch_some():
            pass
        uses = next_uses(run.manifest, 0, index, 2 * (6 + step))
        soonest = set(uses.argsort(kind="stable")[:4].tolist())
        assert here(node, index) >= soonest
        assert store.used_bytes() <= store.limit_bytes
        assert store.has(shard.train.digest)
    store.limit_bytes = shard.train.size + largest // 2
    for number in here(node, index):
        store.remove(index.parts[number].blob.digest)
    with pytest.raises(DiskError, match="raise the limit"):
        await fetcher.fetch_some()


async def test_index_that_cannot_be_used_is_one_sentence(run: TinyRun, tmp_path: Path):
    node = await NodeSetup.create(run, tmp_path / "node")
    spec = run.manifest.shards[0]

    async def sync_with(train: BlobRef) -> str:
        shards = (spec.model_copy(update={"train": train}), *run.manifest.shards[1:])
        node.tasks.manifest = node.workspace.manifest = run.manifest.model_copy(update={"shards": shards})
        answer = await node.tasks.sync(m.Sync(0, 0, None))
        assert isinstance(answer, m.SyncFailed)
        return answer.reason

    huge = spec.train.model_copy(update={"size": MAX_INDEX_BYTES + 1})
    assert "more than" in await sync_with(huge)
    assert "refused" in await sync_with(huge)
    assert "safetensors file" in await sync_with(node.workspace.store.add_bytes(b"no index"))


async def test_data_in_one_file_are_fetched_as_before(tmp_path: Path):
    """Runs of release 0.1 go on: their shards are one blob."""
    node = await NodeSetup.create(make_run(tmp_path / "run", old=True), tmp_path / "node")
    assert isinstance(await node.tasks.sync(m.Sync(0, 0, None)), m.SyncDone)
    assert node.workspace.store.has(node.run.manifest.shards[0].train.digest)
    shell = make_shell(node, tmp_path)
    at_work(shell)
    assert not await DataFetcher(shell).fetch_some()


async def test_status_names_the_part_that_training_waits_for_and_since_when(run: TinyRun, tmp_path: Path):
    node = await NodeSetup.create(run, tmp_path / "node")
    shell, clock = make_shell(node, tmp_path), [1000.0]
    at_work(shell)
    trainer = shell.trainer
    trainer._now, trainer.report = lambda: clock[0], TrainerReport(0, 2, 6, 4, 1.0, 1.0)

    def told() -> tuple[int | None, float | None]:
        status = device_status(shell)
        return status.waits_for_part, status.waits_since

    assert told() == (None, None)
    for _ in range(3):
        trainer._handle(1, WaitingForPart(part=7))
        clock[0] += 1
    assert told() == (7, 1000.0), "it says so every second, and waits since the first time"
    trainer._handle(1, ProgressReport(epoch=0, step=3, steps=6, samples=6, loss=1.0, rate=1.0, waiting=False))
    assert told() == (None, None)
    trainer._handle(1, WaitingForPart(part=8))
    assert told() == (8, 1003.0)
    clock[0] += 10
    assert told() == (None, None), "the part has come, and a long step has begun"
