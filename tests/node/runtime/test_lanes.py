"""One node with two devices trains two lanes of a shard: real trainer processes, a network in memory, a scripted coordinator."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from lutetia.models.training.replay import read_trace
from lutetia.node.contributions import Contributions
from lutetia.node.machine.messages import Claim, UserVerb
from lutetia.node.runtime.shell import NodeShell
from lutetia.node.runtime.status_fields import status_fields
from lutetia.node.runtime.workspace import AcceptedBase, RunPaths, Workspace
from lutetia.node.settings import NodeSettings
from lutetia.node.trainer.checkpoint_folder import remembered_slots
from lutetia.node.trainer.messages import ReplayFinished, ReplayQuestion
from lutetia.node.trainer.replay import answer_replay
from lutetia.protocol.blobs.download import serve_blobs
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.claims import slot_of
from lutetia.protocol.rpc.checkpoint_offer import serve_offers
from lutetia.protocol.schema.capabilities import LANES
from lutetia.protocol.schema.model.team_spec import TeamSpec
from lutetia.protocol.schema.records import CheckpointRecord
from lutetia.protocol.transport.base import Transport
from tests.memory_transport.network import MemoryNetwork
from tests.node.checkpoint_files import kept, write_checkpoint
from tests.node.runtime.test_tasks import COORDINATOR, NodeSetup
from tests.node.scripted_coordinator import ScriptedCoordinator, eventually
from tests.node.tiny_run import make_run

pytestmark = pytest.mark.timeout(600)
TEAM = TeamSpec(lanes=2, shares=(1.0, 0.5))
COMPLETE = "the run is complete; serving its checkpoints"


async def test_two_devices_train_two_lanes_and_go_on_from_every_merge(tmp_path: Path):
    run = make_run(tmp_path / "run", epochs=2, steps=8, heartbeat=1.0, experts=1, team=TEAM, needs=(LANES,))
    network = MemoryNetwork(latency=0.001)
    setup = await NodeSetup.create(run, tmp_path / "node", network)
    transport = network.find(COORDINATOR.peer_id)
    assert transport
    coordinator = ScriptedCoordinator(run, transport, setup.origin)
    await serve_offers(transport, coordinator.answer)
    await serve_blobs(setup.tasks.network.transport, setup.workspace.store)

    async def rejoin() -> Transport:
        raise ConnectionError("not used in this test")

    settings = NodeSettings(
        ticket="", state_folder=tmp_path / "node", device="cpu:0,cpu:1", threads={"cpu:0": 1, "cpu:1": 1}, hang_after=600
    )
    counts = Contributions(tmp_path / "node" / "contributions.json")
    node = NodeShell(settings, setup.tasks.network, setup.workspace, counts, rejoin)
    seen = set[tuple[int | None, int | None]]()
    processes = set[int]()

    async def done() -> bool:
        assert not at_work.done(), at_work.result()
        children = [device.trainer._child for device in node.devices.values()]
        processes.update(child.process.pid for child in children if child)
        seen.update((each.shard, each.lane) for each in status_fields(node, 0.0)["devices"] if each.state == "training")
        return coordinator.epoch == 2 and all(device.state.why == COMPLETE for device in node.devices.values())

    at_work = asyncio.create_task(node.run())
    try:
        await eventually(done, 120)
    finally:
        node.feed(UserVerb(time.time(), "leave"))
        await at_work
    assert seen == {(0, 0), (0, 1)}
    assert len(processes) == 2, "each process goes on with the merged epoch"
    assert sorted((each.epoch, each.lane) for each in coordinator.results) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert {each.samples for each in coordinator.results if each.epoch == 2} == {run.manifest.samples_per_shard}
    merged = coordinator.accepted[0]
    assert [each.parent for each in coordinator.results if each.epoch == 2] == [merged[0].digest] * 2
    assert counts.accepted == 4
    assert {(each.lane, each.outcome) for each in counts.verdicts.verdicts} == {(0, "accepted"), (1, "accepted")}
    assert counts.refused == 0
    for lane, steps in ((0, 8), (1, 4)):
        assert len(replayed(coordinator, merged[0], lane)) == steps
    work = setup.workspace
    assert not work.work(0).kept()
    assert not work.work(slot_of(0, 1)).kept()
    left = set(work.store.digests()) - {ref.digest for ref in run.data_refs(0)}
    assert left == {merged[0].weights.digest, merged[0].state.digest}, "nothing but what the last epoch began with"


def replayed(coordinator: ScriptedCoordinator, parent: CheckpointRecord, lane: int) -> tuple[float | None, ...]:
    """The losses of the epoch after `parent` in a lane, as an auditor's process replays them: those that the author published."""
    [result] = [each for each in coordinator.results if each.parent == parent.digest and each.lane == lane]
    path = lambda ref: coordinator.store.path(ref.digest)  # noqa: E731
    question = ReplayQuestion(
        manifest=coordinator.run.manifest_file, shard=0, lane=lane, epoch=parent.epoch, epochs=2, steps=8,
        data=path(coordinator.run.manifest.shards[0].train), weights=path(parent.weights), state=path(parent.state),
        end_weights=path(result.weights), end_state=path(result.state), precision="float32", device="cpu", threads=1,
    )  # fmt: skip
    answer = answer_replay(question)
    assert isinstance(answer, ReplayFinished)
    assert answer.losses == read_trace(path(result.trace))
    assert answer.drift == 0
    return answer.losses


async def test_lanes_have_claims_of_their_own_and_one_lineage(tmp_path: Path):
    run, network = make_run(tmp_path / "run", team=TEAM, needs=(LANES,)), MemoryNetwork(latency=0.001)
    node = (await NodeSetup.create(run, tmp_path / "node", network)).tasks.network
    transport = network.find(COORDINATOR.peer_id)
    assert transport
    coordinator, second = ScriptedCoordinator(run, transport, node.store), slot_of(0, 1)
    await node.publish_claim(Claim(second, 1, 40, "training"))
    first = kept(1, None, run.manifest.run_id).record(COORDINATOR.public_key, COORDINATOR.peer_id, (), time.time())
    coordinator.accepted[0] = []
    await coordinator.accept(first, (0, 1))
    views = await node.look((0, second, 1))
    assert [(view.shard, view.epoch) for view in views] == [(0, 1), (second, 1), (1, 0)]
    assert [[(claim.record.shard, claim.record.lane) for claim in view.claims] for view in views] == [[], [(0, 1)], []]
    assert node.acceptances.keys() == {0}


def test_lanes_share_the_files_that_they_start_from_and_keep_their_own_apart(tmp_path: Path):
    run = make_run(tmp_path / "run", team=TEAM, needs=(LANES,))
    paths = RunPaths(tmp_path / "state", run.manifest.run_id)
    workspace, second = Workspace(paths, run.manifest, BlobStore(paths.blobs)), slot_of(0, 1)
    results = {slot: write_checkpoint(workspace, 1, None, slot) for slot in (0, second)}
    assert [path.name for path in sorted(paths.work.iterdir())] == ["0000", "0000-1"]
    assert remembered_slots(paths.work, run.manifest.run_id) == {0, second}
    assert [item.candidate.shard for item in results.values()] == [0, second]
    assert len({item.digest for item in results.values()}) == 2
    for item in results.values():
        workspace.store_checkpoint(item, ())
    old, new = (base(epoch, workspace.store) for epoch in (1, 2))
    for slot in (0, second):
        workspace.set_base(slot, old)
        assert not workspace.work(slot).kept(), "the merged epoch holds it"
    assert set(workspace.store.digests()) == blobs(old, new)
    workspace.set_base(0, new)
    assert set(workspace.store.digests()) == blobs(old, new), "the other lane still trains from it"
    workspace.set_base(second, new)
    assert set(workspace.store.digests()) == blobs(new)
    workspace.at_work = {second: (2, new.checkpoint)}
    workspace.set_base(0, None)
    assert workspace.needed_at_work() >= blobs(new)
    assert set(workspace.store.digests()) == blobs(new)


def base(epoch: int, store: BlobStore) -> AcceptedBase:
    weights, state = (store.add_bytes(f"{name} of merged epoch {epoch}".encode()) for name in ("weights", "state"))
    return AcceptedBase(epoch=epoch, checkpoint=f"{epoch:064x}", weights=weights, state=state)


def blobs(*bases: AcceptedBase) -> set[str]:
    return {ref.digest for each in bases for ref in (each.weights, each.state)}
