"""Which checkpoints a run has accepted, told by any peer that is online; the coordinator's signature makes it believable.

So accepted work outlives its coordinator: with one peer's address the newest checkpoints can be fetched from those who hold them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, ValidationError

from lutetia.protocol.claims import latest_acceptance
from lutetia.protocol.rpc.framing import write_message
from lutetia.protocol.rpc.introduction import ACK, SERVE_TIMEOUT
from lutetia.protocol.rpc.manifest_sync import LiveManifest
from lutetia.protocol.schema.canonical import Frozen, canonical
from lutetia.protocol.schema.manifest import Manifest, first_problem
from lutetia.protocol.schema.records import (
    NODE_BUCKETS,
    AcceptanceRecord,
    NodeRecord,
    ProviderRecord,
    RecordLimits,
    RecordRefused,
    ResetRecord,
    acceptance_key,
    node_keys,
    open_record,
    provider_key,
    read_envelope,
)
from lutetia.protocol.schema.ticket import Address
from lutetia.protocol.transport.base import Stream, Transport
from lutetia.system.errors import IntegrityError

ACCEPTED = "/lutetia/accepted/1"
_READS_AT_ONCE = 16
_MOST_HOLDERS = 4
_FRESH_SECONDS = 5.0


class AcceptedEntry(Frozen):
    """An acceptance as its coordinator sealed it until `expires`, and addresses of peers that say they hold its blobs."""

    sealed: Annotated[str, Field(max_length=4096)]
    expires: float
    holders: Annotated[tuple[Address, ...], Field(max_length=32)] = ()


class AcceptedDocument(Frozen):
    """The newest acceptance of each shard that has one."""

    format: int = Field(default=1, ge=1, le=1)
    entries: Annotated[tuple[AcceptedEntry, ...], Field(max_length=4096)] = ()


@dataclass(frozen=True)
class HeldCheckpoint:
    """The newest accepted checkpoint of a shard, and the live peers besides the coordinators that hold all of it."""

    acceptance: AcceptanceRecord
    sealed: bytes
    expires: float
    holders: tuple[str, ...]
    """Public keys."""


async def live_nodes(transport: Transport, run: str, buckets: Iterable[int] = range(NODE_BUCKETS)) -> list[NodeRecord]:
    """The peers that are online, or those in some `buckets` of node records. Raises ConnectionError when this one is not."""
    keys = node_keys(run)
    found = await asyncio.gather(*(transport.get(keys[bucket]) for bucket in buckets))
    records = [read_envelope(stored.value) for values in found for stored in values.values()]
    return [record for record in records if isinstance(record, NodeRecord) and record.state != "left"]


async def newest_of(transport: Transport, manifest: Manifest, shard: int, alive: set[str] | None = None) -> HeldCheckpoint | None:
    """What the DHT shows of one shard. `alive`: public keys of the peers that are online; without, whoever says so holds it."""
    run = manifest.run_id
    found = await transport.get(acceptance_key(run, shard))
    records = {owner: read_envelope(stored.value) for owner, stored in found.items()}
    newest = latest_acceptance(r for r in records.values() if isinstance(r, AcceptanceRecord | ResetRecord))
    if not isinstance(newest, AcceptanceRecord):
        return None
    holders = await holders_of(transport, manifest, newest, alive)
    stored = found[newest.owner]
    return HeldCheckpoint(newest, stored.value, stored.expires, tuple(sorted(holders)))


async def holders_of(
    transport: Transport, manifest: Manifest, acceptance: AcceptanceRecord, alive: set[str] | None = None
) -> set[str]:
    """Public keys of the peers besides the coordinators that say they hold weights and state; only those `alive` where given."""
    holders = alive
    for ref in (acceptance.weights, acceptance.state):
        found = await transport.get(provider_key(manifest.run_id, ref.digest))
        providers = (read_envelope(stored.value) for stored in found.values())
        owners = {record.owner for record in providers if isinstance(record, ProviderRecord)}
        holders = owners if holders is None else holders & owners
    return (holders or set()) - set(manifest.coordinators)


class AcceptedService:
    """Answers ACCEPTED with what the DHT shows at that moment, at most every few seconds anew."""

    def __init__(self, transport: Transport, live: LiveManifest) -> None:
        self._transport, self._live = transport, live
        self._made = (float("-inf"), b"")
        self._making = asyncio.Lock()

    async def serve(self) -> None:
        await self._transport.serve(ACCEPTED, self._answer)

    async def _answer(self, stream: Stream) -> None:
        async with asyncio.timeout(SERVE_TIMEOUT):
            async with self._making:
                now = self._transport.now()
                if now - self._made[0] > _FRESH_SECONDS:
                    self._made = now, canonical(await self._document())
            await write_message(stream, self._made[1])
            await stream.read_exactly(len(ACK))

    async def _document(self) -> AcceptedDocument:
        manifest, places = self._live(), asyncio.Semaphore(_READS_AT_ONCE)
        nodes = {record.owner: record for record in await live_nodes(self._transport, manifest.run_id)}

        async def one(shard: int) -> HeldCheckpoint | None:
            async with places:
                return await newest_of(self._transport, manifest, shard, set(nodes))

        held = [found for found in await asyncio.gather(*map(one, range(len(manifest.shards)))) if found]
        return AcceptedDocument(entries=tuple(_entry(found, nodes) for found in held))


def _entry(found: HeldCheckpoint, nodes: dict[str, NodeRecord]) -> AcceptedEntry:
    places = [address for owner in found.holders[:_MOST_HOLDERS] for address in nodes[owner].addresses]
    return AcceptedEntry(sealed=found.sealed.decode(), expires=found.expires, holders=tuple(places))


def read_accepted(data: bytes, manifest: Manifest, now: float) -> list[tuple[AcceptanceRecord, tuple[str, ...]]]:
    """The acceptances that a coordinator of the run signed and that are still alive, each with its holders' addresses, by shard.

    Whatever else the document says is left out. Raises IntegrityError when it is malformed.
    """
    try:
        document = AcceptedDocument.model_validate_json(data)
    except ValidationError as error:
        raise IntegrityError(f"that peer's list of checkpoints is malformed: {first_problem(error)}; ask another peer") from error
    limits = RecordLimits(manifest.timing.heartbeat, manifest.timing.maximum_clock_skew)
    found: dict[int, tuple[AcceptanceRecord, tuple[str, ...]]] = {}
    for entry in document.entries:
        record = _opened(entry, manifest, now, limits)
        if record and (record.shard not in found or _place(record) > _place(found[record.shard][0])):
            found[record.shard] = record, entry.holders
    return [found[shard] for shard in sorted(found)]


def _place(record: AcceptanceRecord) -> tuple[int, int]:
    return record.term, record.epoch


def _opened(entry: AcceptedEntry, manifest: Manifest, now: float, limits: RecordLimits) -> AcceptanceRecord | None:
    for coordinator in manifest.coordinators:
        try:
            record = open_record(
                entry.sealed.encode(), key=None, subkey=coordinator, expires=entry.expires, now=now, limits=limits,
                coordinators=manifest.coordinators,
            )  # fmt: skip
        except RecordRefused:
            continue
        if isinstance(record, AcceptanceRecord) and record.run == manifest.run_id and record.shard < len(manifest.shards):
            return record
    return None
