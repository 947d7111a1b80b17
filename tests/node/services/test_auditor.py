"""Which blobs stay after a replay. A real trainer process, a network in memory."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lutetia.node.contributions import Contributions
from lutetia.node.runtime.replication_policy import Replica
from lutetia.node.runtime.shell import NodeShell
from lutetia.node.services.auditor import NodeAuditor
from lutetia.protocol.rpc.audit_request import AuditJob
from lutetia.protocol.transport.base import Transport
from tests.node.runtime.test_tasks import NodeSetup, probe_result
from tests.node.tiny_run import make_run

pytestmark = pytest.mark.timeout(600)


async def test_replay_keeps_the_copy_of_the_same_checkpoint(tmp_path: Path):
    run = make_run(tmp_path / "run")
    node = await NodeSetup.create(run, tmp_path / "node")
    store = node.workspace.store

    async def rejoin() -> Transport:
        raise ConnectionError("not used in this test")

    contributions = Contributions(tmp_path / "contributions.json")
    shell = NodeShell(node.tasks.settings, node.tasks.network, node.workspace, contributions, rejoin)
    shell.prober.result = probe_result()
    weights, state = store.add_bytes(b"accepted weights"), store.add_bytes(b"accepted state")
    shell.replicator.replicas[0] = Replica(shard=0, epoch=1, checkpoint="c" * 64, weights=weights, state=state)
    job = AuditJob(
        checkpoint="c" * 64, shard=0, epoch=1, epochs=2, steps=1, precision="float32", end_weights=weights, end_state=state,
        until=time.time() + 600,
    )  # fmt: skip
    store.limit_bytes = store.used_bytes() + run.manifest.shards[0].train.size
    spare = store.add_bytes(b"not needed")
    assert await NodeAuditor(shell)._replay(job) is None, "the blobs are not weights, so the replay fails"
    assert set(store.digests()) == {weights.digest, state.digest}
    assert not store.has(spare.digest)
    await shell.trainer.close()
