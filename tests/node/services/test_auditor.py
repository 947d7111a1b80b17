"""Audits by a node: which blobs stay after a replay, and whether the audit is still lent. A network in memory."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from lutetia.models.data.parts.index import read_index
from lutetia.models.training.kernels.choice import Kernels
from lutetia.node.contributions import Contributions
from lutetia.node.runtime.devices.device_shell import DeviceShell
from lutetia.node.runtime.replication_policy import Replica
from lutetia.node.runtime.shell import NodeShell
from lutetia.node.services.auditor import NodeAuditor
from lutetia.protocol.rpc.audit_request import AuditAnswer, AuditJob, AuditRequest, serve_audits
from lutetia.protocol.transport.base import Transport
from tests.memory_transport.network import MemoryNetwork
from tests.node.runtime.test_tasks import COORDINATOR, NodeSetup, probe_result
from tests.node.tiny_run import make_run

pytestmark = pytest.mark.timeout(600)


JOB = AuditJob(checkpoint="c" * 64, shard=0, epoch=1, epochs=2, steps=1, precision="float32", until=4e9)


def make_shell(node: NodeSetup, folder: Path) -> DeviceShell:
    async def rejoin() -> Transport:
        raise ConnectionError("not used in this test")

    contributions = Contributions(folder / "contributions.json")
    node_shell = NodeShell(node.tasks.settings, node.tasks.network, node.workspace, contributions, rejoin)
    return node_shell.devices["cpu"]


async def test_replay_keeps_the_copy_of_the_same_checkpoint(tmp_path: Path):
    run = make_run(tmp_path / "run")
    node = await NodeSetup.create(run, tmp_path / "node")
    store = node.workspace.store

    shell = make_shell(node, tmp_path)
    shell.prober.result = probe_result()
    weights, state = store.add_bytes(b"accepted weights"), store.add_bytes(b"accepted state")
    shell.replicator.replicas[0] = Replica(shard=0, epoch=1, checkpoint="c" * 64, weights=weights, state=state)
    job = JOB.model_copy(update={"end_weights": weights, "end_state": state, "until": time.time() + 600})
    store.limit_bytes = store.used_bytes() + run.manifest.shards[0].size
    spare = store.add_bytes(b"not needed")
    assert await NodeAuditor(shell)._replay(job) is None, "the blobs are not weights, so the replay fails"
    assert set(store.digests()) == {weights.digest, state.digest}
    assert not store.has(spare.digest)
    await shell.trainer.close()


async def test_replay_of_few_steps_needs_few_parts_of_the_data(tmp_path: Path):
    run = make_run(tmp_path / "run", clips=30, batch=2, steps=15)
    node = await NodeSetup.create(run, tmp_path / "node")
    shell = make_shell(node, tmp_path)
    index = read_index(run.data(0))
    await node.tasks.network.fetch(run.manifest.shards[0].train)
    auditor = NodeAuditor(shell)
    few = auditor._parts(JOB)
    assert 1 <= len(few) <= 2, "two clips"
    assert auditor._parts(JOB.model_copy(update={"epoch": 2})) != few
    whole = JOB.model_copy(update={"end_weights": index.parts[0].blob, "end_state": index.parts[0].blob})
    assert len(auditor._parts(whole)) == len(index.parts) == 10


async def test_replay_takes_the_kernels_of_the_author_only_where_the_own_probe_chose_them(tmp_path: Path):
    run = make_run(tmp_path / "run")
    shell = make_shell(await NodeSetup.create(run, tmp_path / "node"), tmp_path)
    found = probe_result()
    fit = found.shards[0].model_copy(update={"kernels": Kernels(attention="math")})
    shell.prober.result = found.model_copy(update={"shards": {0: fit}})
    for word, taken in (("math", "math"), ("plain", "plain"), ("compiled", "plain"), ("made up", "plain")):
        question = NodeAuditor(shell)._question(JOB.model_copy(update={"kernels": word}), {"data": run.data(0)}, None)
        assert question.kernels.word == taken


@pytest.mark.parametrize(
    ("answer", "lent"),
    [
        (AuditAnswer(job=JOB), True),
        (AuditAnswer(job=JOB.model_copy(update={"checkpoint": "d" * 64})), False),
        (AuditAnswer(retry_after=15.0), False),
        (AuditAnswer(retry_after=15.0, text="too many requests for audits from this address"), True),
        (None, True),
    ],
    ids=["the same audit", "another audit", "none", "busy", "away"],
)
async def test_node_learns_whether_its_audit_is_still_lent(tmp_path: Path, answer: AuditAnswer | None, lent: bool):
    run, network = make_run(tmp_path / "run"), MemoryNetwork(latency=0.001)
    node = await NodeSetup.create(run, tmp_path / "node", network)
    shell = make_shell(node, tmp_path)
    coordinator = network.find(COORDINATOR.peer_id)
    assert coordinator
    if answer:
        await serve_audits(coordinator, _always(answer))
    assert await NodeAuditor(shell)._still_lent(JOB, COORDINATOR.peer_id, ()) == lent


def _always(answer: AuditAnswer) -> Callable[[AuditRequest], Awaitable[AuditAnswer]]:
    async def give(request: AuditRequest) -> AuditAnswer:
        assert request.report is None
        return answer

    return give
