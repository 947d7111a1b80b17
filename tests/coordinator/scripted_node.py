"""A node that tests drive by hand over the real network, and a coordinator in a process of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file, save_file

from lutetia.models.tensor_files import write_tensors
from lutetia.models.training.checkpoint_io import write_state, write_weights
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.protocol.blobs.download import serve_blobs
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.dht_records import read_records
from lutetia.protocol.joining import join_swarm
from lutetia.protocol.rpc.checkpoint_offer import OfferReply, offer_checkpoint
from lutetia.protocol.rpc.introduction import STATUS, ask_document
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import SignedManifest
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord, acceptance_key, seal
from lutetia.protocol.schema.status import SwarmStatus
from lutetia.protocol.schema.ticket import Ticket
from lutetia.protocol.transport.base import Transport
from lutetia.system import tether
from tests.coordinator.tiny_data import clips

PATIENCE = 300.0
_SERVE = """
import asyncio, json, logging, sys
from pathlib import Path
from lutetia.coordinator.serve import serve_run
from lutetia.coordinator.settings import ServeSettings
logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
asyncio.run(serve_run(Path(sys.argv[1]), ServeSettings(**json.loads(sys.argv[2]))))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


async def until(condition: Callable[[], Awaitable[bool]], what: str, every: float = 0.1, patience: float = PATIENCE) -> None:
    """Check `condition` every `every` seconds until it holds; after `patience` seconds fail and name `what`."""
    deadline = time.monotonic() + patience
    while not await condition():
        assert time.monotonic() < deadline, f"waited {patience:.0f} s for {what}"
        await asyncio.sleep(every)


@dataclass
class Coordinator:
    """`serve_run` in a process of its own."""

    folder: Path
    process: asyncio.subprocess.Process

    @classmethod
    async def start(cls, folder: Path, settings: str = "{}") -> Coordinator:
        process = await asyncio.create_subprocess_exec(
            *tether.command(sys.executable),
            "-c",
            _SERVE,
            str(folder),
            settings,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        return cls(folder, process)

    def family(self) -> list[psutil.Process]:
        """The process and all its descendants."""
        try:
            process = psutil.Process(self.process.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    async def end(self, number: signal.Signals) -> int:
        """Send it a signal and wait until it and its descendants have ended."""
        family = self.family()
        self.process.send_signal(number)
        code = await asyncio.wait_for(self.process.wait(), 300)

        async def gone() -> bool:
            return not any(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in family)

        await until(gone, "every process of the coordinator to end")
        return code

    def status(self) -> SwarmStatus:
        return SwarmStatus.model_validate_json((self.folder / "status.json").read_bytes())


@dataclass
class ScriptedNode:
    """A peer that trains when the test says so."""

    identity: Identity
    folder: Path
    ticket: Ticket
    transport: Transport
    signed: SignedManifest
    store: BlobStore
    trainers: dict[int, ExpertTrainer] = field(default_factory=dict)
    parents: dict[int, str | None] = field(default_factory=dict)

    @property
    def coordinator(self) -> str:
        return self.ticket.addresses[0].rpartition("/p2p/")[2]

    async def status(self) -> SwarmStatus:
        document = await ask_document(self.transport, self.coordinator, STATUS, self.ticket.addresses)
        return SwarmStatus.model_validate_json(document)

    def train(
        self, shard: int, spoil: Callable[[dict[str, torch.Tensor]], None] | None = None, *, lane: int = 0, said: int = 0
    ) -> CheckpointRecord:
        """Train one more epoch of a lane and serve its blobs; returns the checkpoint's record. `said`: the lane that it names."""
        manifest = self.signed.manifest
        trainer = self.trainers.setdefault(shard, ExpertTrainer(manifest, shard, clips(shard, 6, 5), lane=lane))
        trainer.step()
        while not trainer.at_epoch_end:
            trainer.step()
        snapshot = trainer.snapshot()
        files = [self.folder / f"{name}.safetensors" for name in ("weights", "state", "trace")]
        write_weights(snapshot, files[0])
        write_state(snapshot, files[1], ema=False)
        write_tensors(files[2], {"trace": torch.tensor(snapshot.trace)})
        if spoil:
            tensors = load_file(files[0])
            spoil(tensors)
            save_file(tensors, files[0], metadata={"format": "pt"})
        weights, state, trace = (self.store.add_file(path, move=True) for path in files)
        return CheckpointRecord(
            run=manifest.run_id, owner=self.identity.public_key, issued=self.transport.now(), shard=shard, epoch=snapshot.epoch,
            parent=self.parents.get(shard), weights=weights, state=state, trace=trace, samples=snapshot.samples, loss=0.5,
            peer_id=self.transport.peer_id, addresses=tuple(self.transport.addresses()), lane=said,
        )  # fmt: skip

    async def file(self, record: CheckpointRecord) -> None:
        """Store the record in the DHT, where the coordinator finds it."""
        expires = self.transport.now() + 600
        assert await self.transport.store(record.key(), record.owner, seal(record, self.identity, expires), expires)

    async def offer(self, record: CheckpointRecord, sealed: bytes | None = None) -> OfferReply:
        expires = self.transport.now() + 600
        data = sealed or seal(record, self.identity, expires)
        return await offer_checkpoint(self.transport, self.coordinator, data, expires, self.ticket.addresses)

    async def verdict(self, record: CheckpointRecord) -> OfferReply:
        """Offer until it is decided, slowly enough to stay within the rate limit."""
        reply: OfferReply | None = None

        async def decided() -> bool:
            nonlocal reply
            reply = await self.offer(record)
            return reply.verdict not in ("queued", "busy")

        await until(decided, f"a verdict on epoch {record.epoch} of shard {record.shard}", every=1.0)
        assert reply is not None
        if reply.verdict == "accepted":
            self.parents[record.shard] = record.digest
        return reply

    async def accepted(self, shard: int) -> list[AcceptanceRecord]:
        records = await read_records(self.transport, acceptance_key(self.signed.manifest.run_id, shard))
        return [record for record, _ in records if isinstance(record, AcceptanceRecord)]


@asynccontextmanager
async def joined(name: str, ticket: Ticket, root: Path) -> AsyncIterator[ScriptedNode]:
    """A node on the network of `ticket`."""
    torch.set_num_threads(1)
    identity, folder = Identity.derived(name), root / name
    folder.mkdir()
    transport, signed = await join_swarm(identity, ticket, listen="/ip4/127.0.0.1/tcp/0", state_folder=folder / "network")
    try:
        store = BlobStore(folder / "blobs")
        await serve_blobs(transport, store)
        yield ScriptedNode(identity, folder, ticket, transport, signed, store)
    finally:
        await transport.close()
