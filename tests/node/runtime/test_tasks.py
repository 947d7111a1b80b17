"""The node's tasks on real files with a coordinator in memory: failures are results, not exceptions."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lutetia.models.training.kernels.choice import Kernels
from lutetia.node.device_settings import DeviceChoice
from lutetia.node.machine import messages as m
from lutetia.node.runtime.devices.hardware_prober import HardwareProber
from lutetia.node.runtime.devices.trainer_process import TrainerProcess
from lutetia.node.runtime.network import NodeNetwork
from lutetia.node.runtime.tasks import NodeTasks
from lutetia.node.runtime.workspace import RunPaths, Workspace
from lutetia.node.settings import NodeSettings
from lutetia.node.trainer.assignment import Assignment
from lutetia.node.trainer.checkpoint_folder import KeptCheckpoint
from lutetia.node.trainer.probe import ProbeResult, ShardFit
from lutetia.protocol.blobs.download import serve_blobs
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.rpc.checkpoint_offer import Offer, OfferReply, serve_offers
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import Hardware
from lutetia.protocol.schema.ticket import Ticket
from tests.memory_transport.network import MemoryNetwork
from tests.node.checkpoint_files import SlowBlobStore, write_checkpoint
from tests.node.small_disk import make_read_only, small_disk
from tests.node.tiny_run import COORDINATOR, OWNER, TinyRun, make_run

NODE = Identity.derived("a node with tasks")


@dataclass
class NodeSetup:
    """A node's files and network, with a coordinator that accepts every offer."""

    run: TinyRun
    workspace: Workspace
    tasks: NodeTasks
    origin: BlobStore
    """The coordinator's blobs."""

    @classmethod
    async def create(cls, run: TinyRun, state: Path, network: MemoryNetwork | None = None) -> NodeSetup:
        network = network or MemoryNetwork(latency=0.001)
        check = record_check(run.manifest, time.time)
        coordinator, transport = network.peer(COORDINATOR, check), network.peer(NODE, check)
        origin = BlobStore(run.folder / "origin")
        for shard in run.manifest.shards:
            run.add_data(shard.index, origin)

        async def accepted(peer_id: str, offer: Offer) -> OfferReply:
            return OfferReply(verdict="accepted")

        await serve_offers(coordinator, accepted)
        await serve_blobs(coordinator, origin)
        ticket = Ticket(run=run.manifest.run_id, owner=OWNER.public_key, addresses=tuple(coordinator.addresses()))
        paths = RunPaths(state, run.manifest.run_id)
        paths.folder.mkdir(parents=True)
        paths.manifest.write_bytes(run.manifest_file.read_bytes())
        store = BlobStore(paths.blobs)
        settings = NodeSettings(ticket=ticket.encode(), state_folder=state, device="cpu", threads=1)
        workspace = Workspace(paths, run.manifest, store)
        prober = HardwareProber(settings, DeviceChoice("cpu", 1), paths, TrainerProcess(lambda event: None, time.time, 1))
        return cls(
            run,
            workspace,
            NodeTasks(settings, NodeNetwork(NODE, transport, run.manifest, ticket, store), workspace, prober),
            origin,
        )

    def checkpoint(self) -> KeptCheckpoint:
        return write_checkpoint(self.workspace, 1, None)


def probe_result() -> ProbeResult:
    fit = ShardFit(fitness=1.0, micro_batch=4, reason="it fits")
    hardware = Hardware(device="cpu", memory_bytes=1, cores=1)
    return ProbeResult(
        question="0" * 64, hardware=hardware, device="cpu", precision="float32", precision_reason="", samples_per_second=1.0,
        shards={0: fit, 1: fit},
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> TinyRun:
    return make_run(tmp_path / "run")


async def test_checkpoint_is_stored_and_offered(run: TinyRun, tmp_path: Path):
    node = await NodeSetup.create(run, tmp_path / "node")
    kept = node.checkpoint()
    assert (await node.tasks.publish(kept.candidate)).verdict == "accepted"
    assert all(node.workspace.store.has(ref.digest) for ref in kept.refs)


async def test_work_discarded_while_published_is_not_judged(run: TinyRun, tmp_path: Path):
    node = await NodeSetup.create(run, tmp_path / "node")
    kept = node.checkpoint()
    store = SlowBlobStore(node.workspace.paths.blobs, lambda: node.workspace.discard(0, 0))
    node.workspace.store = store
    answer = await node.tasks.publish(kept.candidate)
    assert answer.verdict == "unreachable", "it was not refused"
    assert "\n" not in answer.text
    assert "epoch 1 of shard 0" in answer.text
    assert not store.digests()


async def test_read_only_disk_counts_as_full_at_trainer_start(run: TinyRun, tmp_path: Path):
    with small_disk(tmp_path / "small", "4m") as disk:
        node = await NodeSetup.create(run, disk / "node")
        assert isinstance(await node.tasks.sync(m.Sync(0, 0, None)), m.SyncDone)
        work = node.workspace.work(0)
        work.path.mkdir(parents=True)
        (work.path / "local-0-1.safetensors").touch()
        node.tasks.prober.result = probe_result()
        make_read_only(disk)
        answer = await node.tasks.assignment(m.StartTrainer(1, 0, 0, None, 2, halvings=1))
        assert isinstance(answer, m.TrainerExited)
        assert answer.reason == "disk-full"
        assert "read-only" in str(node.tasks.disk_problem)


async def test_trainer_takes_the_kernels_that_the_probe_chose(run: TinyRun, tmp_path: Path):
    node = await NodeSetup.create(run, tmp_path / "node")
    found = probe_result()
    fit = found.shards[0].model_copy(update={"kernels": Kernels(attention="math")})
    node.tasks.prober.result = found.model_copy(update={"shards": {0: fit, 1: fit}})
    await node.tasks.sync(m.Sync(0, 0, None))
    assignment = await node.tasks.assignment(m.StartTrainer(1, 0, 0, None, 2))
    assert isinstance(assignment, Assignment)
    assert assignment.kernels.word == "math"


def total(refs: Iterable[BlobRef]) -> int:
    return sum(ref.size for ref in refs)


async def test_disk_limit_removes_a_finished_shard(run: TinyRun, tmp_path: Path):
    node = await NodeSetup.create(run, tmp_path / "node")
    await node.tasks.sync(m.Sync(0, 0, None))
    kept = node.checkpoint()
    await node.tasks.publish(kept.candidate)
    node.workspace.superseded(0, 1)
    twin = await NodeSetup.create(run, tmp_path / "twin")
    await twin.tasks.sync(m.Sync(1, 0, None))
    needed = [ref for ref in run.data_refs(1) if twin.workspace.store.has(ref.digest)]  # index and parts of the first batch
    node.workspace.store.limit_bytes = total(needed) + total(kept.refs)
    assert isinstance(await node.tasks.sync(m.Sync(1, 0, None)), m.SyncDone)
    assert not any(node.workspace.store.has(ref.digest) for ref in run.data_refs(0))
    assert node.workspace.work(0).kept() == [kept], "own checkpoints are removed last"
    later = write_checkpoint(node.workspace, 1, None, slot=1)
    node.workspace.store.limit_bytes = total(needed) + total(later.refs)
    assert (await node.tasks.publish(later.candidate)).verdict == "accepted"
    assert set(node.workspace.store.digests()) == {ref.digest for ref in (*needed, *later.refs)}
    assert node.workspace.work(0).kept() == [], "a checkpoint that is not served takes no space in the work folder"


async def test_disk_limit_keeps_pending_work(run: TinyRun, tmp_path: Path):
    node = await NodeSetup.create(run, tmp_path / "node")
    await node.tasks.sync(m.Sync(0, 0, None))
    kept = node.checkpoint()
    await node.tasks.publish(kept.candidate)
    node.workspace.store.limit_bytes = run.manifest.shards[1].size
    assert isinstance(await node.tasks.sync(m.Sync(1, 0, None)), m.SyncDone)
    node.workspace.store.limit_bytes = run.manifest.shards[0].size + total(kept.refs)
    back = await node.tasks.sync(m.Sync(0, 0, None))
    assert isinstance(back, m.SyncDone)
    assert back.pending == (kept.candidate,)
    assert (await node.tasks.publish(kept.candidate)).verdict == "accepted"


async def test_disk_limit_below_one_shard_is_one_sentence(run: TinyRun, tmp_path: Path):
    """The shard's index is not removed to make room for a checkpoint, as its parts are."""
    node = await NodeSetup.create(run, tmp_path / "node")
    await node.tasks.sync(m.Sync(0, 0, None))
    kept = node.checkpoint()
    node.workspace.store.limit_bytes = total(kept.refs) - 1
    answer = await node.tasks.publish(kept.candidate)
    assert answer.verdict == "unreachable"
    assert "raise the limit" in answer.text
    assert node.workspace.store.has(run.manifest.shards[0].train.digest)


async def test_trainer_without_a_probe_result_does_not_start(run: TinyRun, tmp_path: Path):
    node = await NodeSetup.create(run, tmp_path / "node")
    answer = await node.tasks.assignment(m.StartTrainer(1, 0, 0, None, 2))
    assert isinstance(answer, m.TrainerExited)
    assert answer.reason == "hardware"


async def test_room_for_more_checkpoints_is_half_of_what_the_disk_limit_leaves(run: TinyRun, tmp_path: Path):
    """So many epochs a node may train ahead while no coordinator answers."""
    node = await NodeSetup.create(run, tmp_path / "node")
    kept = node.checkpoint()
    size = sum(ref.size for ref in kept.refs)
    node.workspace.store.limit_bytes = node.workspace.store.used_bytes() + 11 * size
    assert (await node.tasks.publish(kept.candidate)).room == 5
