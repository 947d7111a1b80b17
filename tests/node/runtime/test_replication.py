"""A keeper of copies on a simulated network with real files: what it cannot finish or need not keep does not stay."""

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
from lutetia.protocol.schema.manifest import BlobRef
from lutetia.protocol.schema.records import AcceptanceRecord, Hardware, NodeRecord
from lutetia.protocol.schema.ticket import Ticket
from lutetia.protocol.transport.memory import MemoryNetwork, MemoryTransport
from lutetia.protocol.transport.virtual_time import run_virtual
from tests.node.tiny_run import COORDINATOR, OWNER, TinyRun, make_run

KEEPER = Identity.derived("a keeper of copies")


def node_record(run: TinyRun, transport: MemoryTransport) -> NodeRecord:
    return NodeRecord(
        run=run.manifest.run_id, owner=KEEPER.public_key, issued=transport.now(), peer_id=KEEPER.peer_id,
        hardware=Hardware(device="cpu", memory_bytes=1, cores=1), samples_per_second=1.0, software="0", state="idle",
    )  # fmt: skip


@dataclass
class Site:
    """A keeper, who alone is online, and a coordinator who serves what `origin` holds."""

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
        """Epoch `epoch` of shard 0 is accepted, and nobody but the coordinator holds it; (weights, state)."""
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

    def rots(self, ref: BlobRef) -> None:
        """Of this blob the origin can give the first chunk only."""
        with self.origin.path(ref.digest).open("r+b") as file:
            file.seek(CHUNK)
            file.write(b"rot")

    async def tend(self) -> None:
        """Two rounds, a lease apart: copies are due once one heartbeat has passed."""
        for _ in range(2):
            await self.replicator.tend([node_record(self.run, self.transport)])
            self.transport.skew += 3 * self.run.manifest.timing.heartbeat
            self.coordinator.skew = self.transport.skew

    def on_disk(self) -> set[str]:
        return {*self.store.digests(), *self.store.arriving()}


def at_a_site(tmp_path: Path, story: Callable[[Site], Awaitable[None]]) -> None:
    run = make_run(tmp_path / "run")

    async def main() -> None:
        await story(Site(run, tmp_path))

    run_virtual(main, run.manifest.created + 60)


@pytest.mark.parametrize("restart", [False, True])
def test_unfinished_copies_are_removed_at_the_next_epoch(tmp_path: Path, restart: bool):
    async def story(site: Site) -> None:
        for epoch in (1, 2, 3):
            weights, state = await site.accept(epoch)
            site.rots(state)
            await site.tend()
            assert site.on_disk() == {weights.digest, state.digest}
            assert site.replicator.seeds == {}
            assert site.replicator.held() == {}
            if restart:
                site.restart()
        weights, state = await site.accept(4)
        await site.tend()
        assert site.replicator.seeds[0].epoch == 4
        assert site.on_disk() == {weights.digest, state.digest}

    at_a_site(tmp_path, story)


def test_partial_copy_is_not_fetched_again_after_a_restart(tmp_path: Path):
    async def story(site: Site) -> None:
        weights, state = await site.accept(1)
        good = site.origin.path(state.digest).read_bytes()
        site.rots(state)
        await site.tend()
        site.restart()
        partial = site.store.partial(state)
        assert partial.missing() == [1, 2]
        partial.close()
        site.origin.path(state.digest).write_bytes(good)
        site.rots(weights)  # and is not asked for
        await site.tend()
        assert set(site.replicator.held()) == {weights.digest, state.digest}
        site.restart()
        assert set(site.replicator.held()) == {weights.digest, state.digest}

    at_a_site(tmp_path, story)


def test_outdated_copy_is_removed_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On a full disk, where its room is wanted most."""
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if target == seeds:
            raise OSError(errno.ENOSPC, "no space")
        replace(source, target)

    async def story(site: Site) -> None:
        nonlocal seeds
        await site.accept(1)
        await site.tend()
        assert site.replicator.seeds[0].epoch == 1
        seeds = site.replicator.path
        await site.accept(2)
        for _ in range(2):
            await site.tend()
        assert site.on_disk() == set(), "and nothing is fetched that would be forgotten"
        seeds = None
        await site.tend()
        assert site.replicator.seeds[0].epoch == 2

    seeds: Path | None = None
    monkeypatch.setattr(os, "replace", full)
    at_a_site(tmp_path, story)


def test_read_only_disk_ends_the_round_not_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def read_only(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    async def story(site: Site) -> None:
        await site.accept(1)
        await site.tend()
        await site.accept(2)
        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", read_only)
            await site.tend()
        await site.tend()
        assert site.replicator.seeds[0].epoch == 2

    at_a_site(tmp_path, story)
