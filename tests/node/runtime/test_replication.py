"""Copies of accepted checkpoints on a simulated network with real files: no partial or outdated copy stays."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lutetia.node.runtime.network import NodeNetwork
from lutetia.node.runtime.replication import Replicator
from lutetia.node.runtime.workspace import RunPaths, Workspace
from lutetia.protocol.blobs.chunk_table import CHUNK
from lutetia.protocol.blobs.download import serve_blobs
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.dht_records import publish
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import AcceptanceRecord, Hardware, NodeRecord, ProviderRecord
from lutetia.protocol.schema.ticket import Ticket
from tests.memory_transport.network import MemoryNetwork
from tests.memory_transport.transport import MemoryTransport
from tests.memory_transport.virtual_time import run_virtual
from tests.node.tiny_run import COORDINATOR, OWNER, TinyRun, make_run

KEEPER = Identity.derived("a node that keeps copies")


def node_record(run: TinyRun, transport: MemoryTransport) -> NodeRecord:
    return NodeRecord(
        run=run.manifest.run_id, owner=KEEPER.public_key, issued=transport.now(), peer_id=KEEPER.peer_id,
        hardware=Hardware(device="cpu", memory_bytes=1, cores=1), samples_per_second=1.0, software="0", state="idle",
    )  # fmt: skip


@dataclass
class ReplicationSetup:
    """The only online node, and a coordinator that serves the blobs of `origin`."""

    run: TinyRun
    folder: Path
    network: MemoryNetwork = field(default_factory=MemoryNetwork)

    def __post_init__(self) -> None:
        check = record_check(self.run.manifest, self.network.now)
        self.coordinator, self.transport = (self.network.peer(who, check) for who in (COORDINATOR, KEEPER))
        self.origin = BlobStore(self.folder / "origin")
        self.restart()

    def restart(self) -> None:
        paths = RunPaths(self.folder / "state", self.run.manifest.run_id)
        self.store = BlobStore(paths.blobs)
        ticket = Ticket(run=self.run.manifest.run_id, owner=OWNER.public_key, addresses=tuple(self.coordinator.addresses()))
        self.workspace = Workspace(paths, self.run.manifest, self.store)
        network = NodeNetwork(KEEPER, self.transport, self.run.manifest, ticket, self.store)
        self.replicator = Replicator(network, self.workspace, paths.folder / "seeds.json")

    async def accept(self, epoch: int) -> tuple[BlobRef, BlobRef]:
        """Accept an epoch of shard 0 that only the coordinator holds; returns (weights, state)."""
        await serve_blobs(self.coordinator, self.origin)
        weights, state = (self.origin.add_bytes(os.urandom(3 * CHUNK)) for _ in range(2))
        now = self.transport.now()
        accepted = AcceptanceRecord(
            run=self.run.manifest.run_id, owner=COORDINATOR.public_key, issued=now, shard=0, epoch=epoch,
            checkpoint=f"{epoch:064x}", parent=None, weights=weights, state=state, samples=8, author=COORDINATOR.public_key,
            tenure_until=now + 60, holdout_loss=1.0,
        )  # fmt: skip
        assert await publish(self.coordinator, COORDINATOR, accepted, 3600)
        return weights, state

    def damage(self, ref: BlobRef) -> None:
        """Damage this blob at the origin after its first chunk."""
        with self.origin.path(ref.digest).open("r+b") as file:
            file.seek(CHUNK)
            file.write(b"rot")

    async def run_rounds(self) -> None:
        """Run two rounds, a lease apart: a copy is due after one heartbeat."""
        for _ in range(2):
            await self.replicator.run_round([node_record(self.run, self.transport)])
            self.transport.skew += 3 * self.run.manifest.timing.heartbeat
            self.coordinator.skew = self.transport.skew

    def on_disk(self) -> set[str]:
        return {*self.store.digests(), *self.store.arriving()}


def run_scenario(tmp_path: Path, scenario: Callable[[ReplicationSetup], Awaitable[None]]) -> None:
    run = make_run(tmp_path / "run")

    async def main() -> None:
        await scenario(ReplicationSetup(run, tmp_path))

    run_virtual(main, run.manifest.created + 60)


def test_holders_that_answer_no_chunk_do_not_count(tmp_path: Path):
    """Two keys announce everything and hold nothing: the copy is kept none the less."""

    async def scenario(setup: ReplicationSetup) -> None:
        weights, state = await setup.accept(1)
        liars = [Identity.derived(f"liar {number}") for number in range(2)]
        records = [await publish_liar(setup, who, [weights, state]) for who in liars]
        for _ in range(3):
            await setup.replicator.run_round([node_record(setup.run, setup.transport), *records])
            setup.transport.skew += 3 * setup.run.manifest.timing.heartbeat
            setup.coordinator.skew = setup.transport.skew
        assert setup.replicator.replicas[0].epoch == 1

    run_scenario(tmp_path, scenario)


async def publish_liar(setup: ReplicationSetup, who: Identity, refs: list[BlobRef]) -> NodeRecord:
    peer = setup.network.peer(who, record_check(setup.run.manifest, setup.network.now))
    record = node_record(setup.run, peer).model_copy(
        update={"owner": who.public_key, "peer_id": who.peer_id, "state": "training"}
    )
    for ref in refs:
        place = {"run": record.run, "owner": who.public_key, "issued": peer.now(), "peer_id": who.peer_id}
        assert await publish(peer, who, ProviderRecord(**place, blob=ref.digest), 600)  # type: ignore[arg-type]
    return record


@pytest.mark.parametrize("restart", [False, True])
def test_unfinished_copies_are_removed_at_the_next_epoch(tmp_path: Path, restart: bool):
    async def scenario(setup: ReplicationSetup) -> None:
        for epoch in (1, 2, 3):
            weights, state = await setup.accept(epoch)
            setup.damage(state)
            await setup.run_rounds()
            assert setup.on_disk() == {weights.digest, state.digest}
            assert setup.replicator.replicas == {}
            assert setup.replicator.held() == {}
            if restart:
                setup.restart()
        weights, state = await setup.accept(4)
        await setup.run_rounds()
        assert setup.replicator.replicas[0].epoch == 4
        assert setup.on_disk() == {weights.digest, state.digest}

    run_scenario(tmp_path, scenario)


def test_partial_copy_is_not_fetched_again_after_a_restart(tmp_path: Path):
    async def scenario(setup: ReplicationSetup) -> None:
        weights, state = await setup.accept(1)
        good = setup.origin.path(state.digest).read_bytes()
        setup.damage(state)
        await setup.run_rounds()
        setup.restart()
        partial = setup.store.partial(state)
        assert partial.missing() == [1, 2]
        partial.close()
        setup.origin.path(state.digest).write_bytes(good)
        setup.damage(weights)  # it must not be fetched again
        await setup.run_rounds()
        assert set(setup.replicator.held()) == {weights.digest, state.digest}
        setup.restart()
        assert set(setup.replicator.held()) == {weights.digest, state.digest}

    run_scenario(tmp_path, scenario)


def test_outdated_copy_is_removed_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The list of copies cannot be written there, but space is needed."""
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if target == unwritable:
            raise OSError(errno.ENOSPC, "no space")
        replace(source, target)

    async def scenario(setup: ReplicationSetup) -> None:
        nonlocal unwritable
        await setup.accept(1)
        await setup.run_rounds()
        assert setup.replicator.replicas[0].epoch == 1
        unwritable = setup.replicator.path
        await setup.accept(2)
        for _ in range(2):
            await setup.run_rounds()
        assert setup.on_disk() == set(), "nothing is fetched that cannot be listed"
        unwritable = None
        await setup.run_rounds()
        assert setup.replicator.replicas[0].epoch == 2

    unwritable: Path | None = None
    monkeypatch.setattr(os, "replace", full)
    run_scenario(tmp_path, scenario)


def test_read_only_disk_ends_the_round_not_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def read_only(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    async def scenario(setup: ReplicationSetup) -> None:
        await setup.accept(1)
        await setup.run_rounds()
        await setup.accept(2)
        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", read_only)
            await setup.run_rounds()
        await setup.run_rounds()
        assert setup.replicator.replicas[0].epoch == 2

    run_scenario(tmp_path, scenario)
