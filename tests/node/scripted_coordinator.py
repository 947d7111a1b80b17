"""A coordinator for tests of nodes: bootstrap peer, blob provider, and a judge that accepts epochs or merges lanes."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from lutetia.node.control import ask
from lutetia.protocol.blobs.download import Provider, fetch_blob, serve_blobs
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.dht_records import publish, read_records
from lutetia.protocol.record_rules import record_check
from lutetia.protocol.rpc.checkpoint_offer import Offer, OfferReply, serve_offers
from lutetia.protocol.rpc.introduction import serve_introduction
from lutetia.protocol.schema.manifest import SignedManifest
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord, read_envelope
from lutetia.protocol.schema.ticket import Ticket
from lutetia.protocol.transport.base import Transport
from lutetia.protocol.transport.hivemind.transport import connect_hivemind
from lutetia.system.errors import LutetiaError
from tests.child_environment import child_environment, forked_for
from tests.node.tiny_run import COORDINATOR, OWNER, TinyRun


@dataclass
class ScriptedCoordinator:
    run: TinyRun
    transport: Transport
    store: BlobStore
    accepted: dict[int, list[CheckpointRecord]] = field(default_factory=dict)
    judging: bool = True
    quorum: int = 0
    """Lanes whose results are merged; 0: all."""
    gathered: dict[int, dict[int, CheckpointRecord]] = field(default_factory=dict)
    """Results of the epoch under way, by shard and lane."""
    results: list[CheckpointRecord] = field(default_factory=list)
    """All gathered results."""

    @property
    def ticket(self) -> Ticket:
        return Ticket(run=self.run.manifest.run_id, owner=OWNER.public_key, addresses=tuple(self.transport.addresses()))

    @property
    def epoch(self) -> int:
        return max((len(lineage) for lineage in self.accepted.values()), default=0)

    async def answer(self, peer_id: str, offer: Offer) -> OfferReply:
        record = read_envelope(offer.sealed.encode())
        assert isinstance(record, CheckpointRecord)
        lineage = self.accepted.setdefault(record.shard, [])
        if record.digest in [item.digest for item in lineage]:
            return OfferReply(verdict="accepted")
        if record.digest in [item.digest for item in self.results]:
            return OfferReply(verdict="gathered")
        if not self.judging:
            return OfferReply(verdict="busy", retry_after=0.5)
        head = lineage[-1].digest if lineage else None
        if (record.epoch, record.parent) != (len(lineage) + 1, head):
            return OfferReply(verdict="superseded", check="lineage", text="not on the accepted parent")
        for ref in (record.weights, record.state, record.trace):
            await fetch_blob(self.transport, self.store, ref, [Provider(peer_id, record.addresses)])
        if self.run.manifest.team:
            return await self._gather(record)
        await self.accept(record)
        return OfferReply(verdict="accepted")

    async def _gather(self, record: CheckpointRecord) -> OfferReply:
        lanes = self.gathered.setdefault(record.shard, {})
        lanes[record.lane] = record
        self.results.append(record)
        if len(lanes) >= (self.quorum or self.run.manifest.lanes):
            del self.gathered[record.shard]
            merged = await asyncio.to_thread(self._merged, sorted(lanes.values(), key=lambda each: each.lane))
            await self.accept(merged, tuple(sorted(lanes)))
        return OfferReply(verdict="gathered")

    def _merged(self, records: Sequence[CheckpointRecord]) -> CheckpointRecord:
        from lutetia.models.training.lanes.merge import FILES, LaneFiles, merge_lanes

        first, manifest = records[0], self.run.manifest
        steps = [manifest.lane_steps(record.lane) for record in records]
        files = [[self.store.path(getattr(record, name).digest) for name in FILES] for record in records]
        parts = [LaneFiles(record.lane, count, *paths) for record, count, paths in zip(records, steps, files, strict=True)]
        with tempfile.TemporaryDirectory(dir=self.store.root) as folder:
            made = merge_lanes(manifest, first.shard, first.epoch, parts, Path(folder))
            refs = {name: self.store.add_file(Path(folder) / name) for name in FILES}
        merged = {"owner": COORDINATOR.public_key, "peer_id": COORDINATOR.peer_id, "lane": 0, "loss": made.loss, **refs}
        return first.model_copy(update=merged)

    async def accept(self, record: CheckpointRecord, lanes: tuple[int, ...] = ()) -> None:
        self.accepted[record.shard].append(record)
        now = time.time()
        acceptance = AcceptanceRecord(
            run=record.run, owner=COORDINATOR.public_key, issued=now, shard=record.shard, epoch=record.epoch,
            checkpoint=record.digest, parent=record.parent, weights=record.weights, state=record.state, samples=record.samples,
            author=record.owner, tenure_until=now + 60, holdout_loss=1.0, lanes=lanes,
        )  # fmt: skip
        await publish(self.transport, COORDINATOR, acceptance, 3600)

    async def records(self, key: str) -> list[Any]:
        return [record for record, _ in await read_records(self.transport, key)]


@contextlib.asynccontextmanager
async def scripted_coordinator(
    run: TinyRun, folder: Path, listen: str = "/ip4/127.0.0.1/tcp/0"
) -> AsyncIterator[ScriptedCoordinator]:
    check = record_check(run.manifest, time.time)
    transport = await connect_hivemind(COORDINATOR, listen=listen, check=check, state_folder=folder)
    try:
        store = BlobStore(folder / "blobs")
        for shard in run.manifest.shards:
            run.add_data(shard.index, store)
        coordinator = ScriptedCoordinator(run, transport, store)
        signed = SignedManifest.model_validate_json(run.manifest_file.read_bytes())
        await serve_introduction(transport, lambda: signed)
        await serve_blobs(transport, store)
        await serve_offers(transport, coordinator.answer)
        yield coordinator
    finally:
        await transport.close()


@dataclass
class DaemonProcess:
    """`lutetia join` as a real process on `state`."""

    process: asyncio.subprocess.Process
    state: Path
    log: Path

    @classmethod
    @contextlib.asynccontextmanager
    async def running(
        cls, coordinator: ScriptedCoordinator, state: Path, *flags: str, prefix: Sequence[str] = ()
    ) -> AsyncIterator[DaemonProcess]:
        """A daemon that is killed at the end of the block."""
        daemon = await cls.start(coordinator, state, *flags, prefix=prefix)
        try:
            yield daemon
        finally:
            with contextlib.suppress(ProcessLookupError):
                daemon.process.kill()
            await daemon.process.wait()

    @classmethod
    async def start(cls, coordinator: ScriptedCoordinator, state: Path, *flags: str, prefix: Sequence[str] = ()) -> DaemonProcess:
        """`prefix`: a command that executes it."""
        log = state.parent / f"{state.name}.log"
        arguments = ["join", coordinator.ticket.encode(), "--state-folder", str(state), "--listen", "/ip4/127.0.0.1/tcp/0"]
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *prefix, sys.executable, "-m", "lutetia.cli", *arguments, "--device", "cpu", "--threads", "1", *flags,
                stdout=output, stderr=output, start_new_session=True,
                env=child_environment(NO_COLOR="1", LUTETIA_SAVE_EVERY="0.2"),
            )  # fmt: skip
        return cls(process, state, log)

    async def until(self, seconds: float = 400.0, **wanted: Any) -> dict[str, Any]:
        """The first status in which every field equals the wanted value, or the wanted callable is true of it."""
        status: dict[str, Any] = {}
        try:
            async with asyncio.timeout(seconds):
                while True:
                    with contextlib.suppress(LutetiaError):
                        status = await ask(self.state, "status")
                        if all(want(status[key]) if callable(want) else status[key] == want for key, want in wanted.items()):
                            return status
                    assert self.process.returncode is None, f"the daemon ended\n{self.log_text()}"
                    await asyncio.sleep(0.05)
        except TimeoutError as error:
            raise AssertionError(f"the status never became {wanted}; last {status}\n{self.log_text()}") from error

    def log_text(self) -> str:
        return self.log.read_text()[-4000:]

    async def ended(self, seconds: float = 300.0) -> int:
        async with asyncio.timeout(seconds):
            return await self.process.wait()


def children_of(pid: int) -> set[int]:
    """All descendants of a process, and what was forked for it."""
    try:
        descendants = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        descendants = []
    return {process.pid for process in (*descendants, *forked_for(pid))}


def running(pids: set[int]) -> set[int]:
    """Those of `pids` that are alive and no zombies."""
    alive = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                alive.add(pid)
    return alive


async def eventually(condition: Callable[[], Awaitable[bool]], seconds: float = 300.0) -> None:
    """Wait until `condition` holds. Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while True:
            if await condition():
                return
            await asyncio.sleep(0.05)


async def all_gone(pids: set[int], seconds: float = 300.0) -> None:
    async def gone() -> bool:
        return not running(pids)

    await eventually(gone, seconds)
