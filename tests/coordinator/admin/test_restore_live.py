"""A coordinator that lost its disk and restores an old backup: no acceptance is lost, and no lineage is forked."""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
from pathlib import Path

import pytest

from lutetia.coordinator.admin.create import CreatedRun
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.run_folder import RunFolder
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.dht_records import publish
from lutetia.protocol.peerstore import Peerstore
from lutetia.protocol.schema.records import CheckpointRecord, ProviderRecord
from lutetia.protocol.schema.ticket import Ticket
from tests.child_environment import child_environment
from tests.coordinator.admin.test_upgrade_live import unaudited_run
from tests.coordinator.scripted_node import Coordinator, ScriptedNode, joined, until
from tests.coordinator.test_serve import published, up


async def lutetia(*words: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "lutetia.cli",
        *words,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=child_environment(),
    )
    output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


async def provide(peer: ScriptedNode, record: CheckpointRecord) -> None:
    """Announce in the DHT that `peer` holds the blobs of its checkpoint, as a node does."""
    for ref in (record.weights, record.state):
        provider = ProviderRecord(
            run=record.run, owner=peer.identity.public_key, issued=peer.transport.now(), blob=ref.digest,
            peer_id=peer.transport.peer_id, addresses=tuple(peer.transport.addresses()),
        )  # fmt: skip
        assert await publish(peer.transport, peer.identity, provider, 600)


async def accept(peer: ScriptedNode) -> CheckpointRecord:
    """Train one more epoch of shard 0; it is accepted and published."""
    record = peer.train(0)
    assert (await peer.verdict(record)).verdict == "accepted"
    await published(peer, 0, record.epoch)
    await provide(peer, record)
    return record


@pytest.mark.timeout(900)
async def test_a_restored_coordinator_takes_back_what_was_accepted_after_its_backup(tmp_path: Path):
    run = unaudited_run(tmp_path, 32)  # one epoch more than is trained, so nothing is stitched
    coordinator = await Coordinator.start(run.folder, '{"stitch": "end"}')
    await up(coordinator)
    async with joined("ann", Ticket.decode(run.ticket), tmp_path) as ann:
        first = await accept(ann)
        Peerstore(RunFolder(run.folder).peers).remember(ann.transport.addresses())
        code, output = await lutetia("coordinator", "backup", str(run.folder), str(tmp_path / "backup"))
        assert (code, "holds run" in output) == (0, True), output
        second = await accept(ann)
        head = coordinator.status().ledger
        assert head
        assert head.holds(run.run, run.manifest.coordinators), "everybody can see how far the ledger reached"
        await coordinator.end(signal.SIGKILL)
        shutil.rmtree(run.folder)
        code, output = await lutetia("coordinator", "restore", str(tmp_path / "backup"), str(run.folder))
        assert code == 0, output

        await refuse_to_go_on_behind(run)
        coordinator = await Coordinator.start(run.folder, '{"stitch": "end"}')
        await up(coordinator)
        assert coordinator.status().accepted == 2
        await blobs_are_back(run, second)
        assert not RunFolder(run.folder).restored.exists()

        fork = second.model_copy(update={"loss": 0.1, "trace": first.trace})
        assert fork.digest != second.digest
        assert (await ann.offer(fork)).verdict == "superseded", "epoch 2 was accepted once, and stays what it was"
        third = await accept(ann)
        assert third.parent == second.digest
        assert await coordinator.end(signal.SIGTERM) == 0
    ledger = Ledger.open(RunFolder(run.folder).ledger, run.run)
    kinds = [row.event().kind for row in ledger.rows()]
    ledger.close()
    assert (ledger.state.shards[0].epoch, ledger.state.shards[0].accepted) == (3, third.digest)
    assert kinds.count("acceptance-recovered") == 1


async def refuse_to_go_on_behind(run: CreatedRun) -> None:
    """The same folder, as if an old copy was put there by hand."""
    folder = RunFolder(run.folder)
    folder.restored.unlink()
    code, output = await lutetia("coordinator", "serve", str(run.folder))
    assert code == 11, output
    assert "an acceptance under this coordinator's key (shard 0, epoch 2)" in output
    assert "--recover" in output
    folder.restored.touch()


async def blobs_are_back(run: CreatedRun, record: CheckpointRecord) -> None:
    store = BlobStore(RunFolder(run.folder).blobs)

    async def here() -> bool:
        return all(store.has(ref.digest) for ref in (record.weights, record.state))

    await until(here, "the blobs of the accepted checkpoint to come back from peers")
    for ref in (record.weights, record.state):
        store.verify(ref.digest)
