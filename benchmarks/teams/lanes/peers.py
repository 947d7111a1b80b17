"""The peers of a measured coordinator: each claims a lane, offers prepared results, and fetches what was merged."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.teams.lanes.prepared import author
from lutetia.protocol.blobs.download import Provider, fetch_blob, serve_blobs
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.joining import join_swarm
from lutetia.protocol.rpc.checkpoint_offer import offer_checkpoint
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord, ClaimRecord, Hardware, NodeRecord, Record, seal
from lutetia.protocol.schema.ticket import Ticket
from lutetia.protocol.transport.backend import start_transport
from lutetia.protocol.transport.base import StartTransport, StoredValue, Transport
from lutetia.protocol.transport.metered import MeteredTransport

UNDECIDED = ("queued", "busy", "inconclusive")


class StreamBytes:
    """Bytes of streams. The peers open none to each other, so what they send is what the coordinator receives."""

    def __init__(self) -> None:
        self.to_coordinator = self.from_coordinator = 0

    def sent(self, count: int) -> None:
        self.to_coordinator += count

    def received(self, count: int) -> None:
        self.from_coordinator += count


class CountedTransport(MeteredTransport):
    """Counts streams alone: what records take is only estimated there."""

    async def store(self, key: str, subkey: str, value: bytes, expires: float) -> bool:
        return await self.inner.store(key, subkey, value, expires)

    async def get(self, key: str) -> dict[str, StoredValue]:
        return await self.inner.get(key)


def counted_by(meter: StreamBytes) -> StartTransport:
    """Starts transports whose streams are counted."""

    async def start(identity: Identity, *, listen: str, state_folder: Path, announce: Sequence[str] = ()) -> Transport:
        inner = await start_transport(identity, listen=listen, state_folder=state_folder, announce=announce)
        return CountedTransport(inner, meter)

    return start


@dataclass
class LanePeer:
    """One volunteer's node, without its trainer."""

    lane: int
    identity: Identity
    manifest: Manifest
    ticket: Ticket
    transport: Transport
    fetched: BlobStore

    @classmethod
    async def join(cls, lane: int, ticket: Ticket, results: BlobStore, folder: Path, counted: StreamBytes) -> LanePeer:
        """Join from an address of its own, as volunteers do: 127.0.0.0/8 is all this machine's."""
        transport, signed = await join_swarm(
            author(lane), ticket, listen=f"/ip4/127.{lane + 1}.0.1/tcp/0", state_folder=folder / "network",
            start=counted_by(counted),
        )  # fmt: skip
        await serve_blobs(transport, results)
        return cls(lane, author(lane), signed.manifest, ticket, transport, BlobStore(folder / "blobs"))

    @property
    def coordinator(self) -> str:
        return self.ticket.addresses[0].rpartition("/p2p/")[2]

    async def announce(self, epoch: int) -> None:
        """Store the records of a node that trains on top of `epoch`."""
        now, run, owner = self.transport.now(), self.manifest.run_id, self.identity.public_key
        samples = epoch * self.manifest.checkpoint_samples
        await self._store(
            ClaimRecord(run=run, owner=owner, issued=now, shard=0, lane=self.lane, epoch=epoch, samples=samples, state="training")
        )
        hardware = Hardware(device="cpu", memory_bytes=1 << 30, cores=1)
        await self._store(
            NodeRecord(
                run=run,
                owner=owner,
                issued=now,
                peer_id=self.transport.peer_id,
                addresses=tuple(self.transport.addresses()),
                hardware=hardware,
                samples_per_second=1.0,
                software="benchmark",
                state="training",
                shard=0,
            )  # fmt: skip
        )

    async def _store(self, record: Record) -> None:
        expires = self.transport.now() + self.manifest.timing.lease
        await self.transport.store(record.key(), record.owner, seal(record, self.identity, expires), expires)

    async def offer(self, result: CheckpointRecord) -> tuple[float, str]:
        """Offer until it is decided. Returns when it was first taken, in Unix seconds, and the last verdict."""
        now = self.transport.now()
        record = result.model_copy(update={"issued": now, "addresses": tuple(self.transport.addresses())})
        taken, wait = 0.0, 1.0
        while True:
            expires = self.transport.now() + 600
            sealed = seal(record, self.identity, expires)
            reply = await offer_checkpoint(self.transport, self.coordinator, sealed, expires, self.ticket.addresses)
            if reply.verdict != "busy":
                taken = taken or self.transport.now()
            if reply.verdict not in UNDECIDED:
                return taken, reply.verdict
            wait = min(1.5 * wait, self.manifest.timing.heartbeat)
            await asyncio.sleep(reply.retry_after or wait)

    async def fetch(self, given: AcceptanceRecord) -> None:
        """Fetch the epoch from which training goes on, from the coordinator, which nobody has spared yet."""
        source = [Provider(self.coordinator, self.ticket.addresses)]
        for ref in (given.weights, given.state):
            await fetch_blob(self.transport, self.fetched, ref, source)


async def renew(peers: list[LanePeer], epoch: list[int]) -> None:
    """Renew all records once per heartbeat until cancelled. `epoch[0]`: the accepted one."""
    while True:
        await asyncio.gather(*(peer.announce(epoch[0]) for peer in peers))
        await asyncio.sleep(peers[0].manifest.timing.heartbeat)
