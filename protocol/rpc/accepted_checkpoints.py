"""The list of accepted checkpoints, served by every peer that is online. The coordinator's signatures prove it.

Accepted work thus outlives its coordinator: through any one peer the newest checkpoints can be found and fetched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, ValidationError

from lutetia.protocol.async_helpers import gather_bounded
from lutetia.protocol.claims import latest_acceptance
from lutetia.protocol.rpc.framing import write_message
from lutetia.protocol.rpc.introduction import ACK, SERVE_TIMEOUT
from lutetia.protocol.rpc.manifest_sync import LiveManifest
from lutetia.protocol.schema.canonical import WireDocument, canonical
from lutetia.protocol.schema.fields import MOST_SHARDS, Moment
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


class AcceptedEntry(WireDocument):
    """One accepted checkpoint and where to fetch it."""

    sealed: Annotated[str, Field(max_length=4096)] = Field(description="The AcceptanceRecord as its coordinator sealed it (JSON)")
    expires: Moment = Field(description="Expiry with which it was sealed, in Unix seconds")
    holders: Annotated[tuple[Address, ...], Field(max_length=32)] = Field(
        default=(), description="Addresses of peers that say they hold its weights and state"
    )


class AcceptedDocument(WireDocument):
    """The newest acceptance of each shard that has one."""

    format: int = Field(default=1, ge=1, le=1, description="Version of this document's format")
    entries: Annotated[tuple[AcceptedEntry, ...], Field(max_length=MOST_SHARDS)] = Field(
        default=(), description="One entry per shard with an accepted checkpoint"
    )


@dataclass(frozen=True)
class HeldCheckpoint:
    """The newest accepted checkpoint of a shard. `holders` are the public keys of live peers that hold all of it.

    Coordinators are not among the holders. `expires` is the expiry of the `sealed` acceptance in Unix seconds.
    """

    acceptance: AcceptanceRecord
    sealed: bytes
    expires: Moment
    holders: tuple[str, ...]


async def live_nodes(transport: Transport, run: str, buckets: Iterable[int] = range(NODE_BUCKETS)) -> list[NodeRecord]:
    """The peers that are online, of all or some `buckets` of node records. Raises ConnectionError when this peer is offline."""
    keys = node_keys(run)
    values_by_bucket = await asyncio.gather(*(transport.get(keys[bucket]) for bucket in buckets))
    records = [read_envelope(stored.value) for values in values_by_bucket for stored in values.values()]
    return [record for record in records if isinstance(record, NodeRecord) and record.state != "left"]


async def newest_of(transport: Transport, manifest: Manifest, shard: int, alive: set[str] | None = None) -> HeldCheckpoint | None:
    """The newest accepted checkpoint of one shard, as the DHT shows it; None if there is none.

    With `alive`, the public keys of the peers that are online, only these count as holders.
    """
    run = manifest.run_id
    stored_by_owner = await transport.get(acceptance_key(run, shard))
    records = {owner: read_envelope(stored.value) for owner, stored in stored_by_owner.items()}
    newest = latest_acceptance(r for r in records.values() if isinstance(r, AcceptanceRecord | ResetRecord))
    if not isinstance(newest, AcceptanceRecord):
        return None
    holders = await holders_of(transport, manifest, newest, alive)
    stored = stored_by_owner[newest.owner]
    return HeldCheckpoint(newest, stored.value, stored.expires, tuple(sorted(holders)))


async def holders_of(
    transport: Transport, manifest: Manifest, acceptance: AcceptanceRecord, alive: set[str] | None = None
) -> set[str]:
    """Public keys of the peers that say they hold both weights and state, without the coordinators.

    With `alive`, only those among these public keys.
    """
    holders = alive
    for ref in (acceptance.weights, acceptance.state):
        stored_by_owner = await transport.get(provider_key(manifest.run_id, ref.digest))
        providers = (read_envelope(stored.value) for stored in stored_by_owner.values())
        owners = {record.owner for record in providers if isinstance(record, ProviderRecord)}
        holders = owners if holders is None else holders & owners
    return (holders or set()) - set(manifest.coordinators)


class AcceptedService:
    """Answers ACCEPTED from the DHT. An answer is used again for a few seconds."""

    def __init__(self, transport: Transport, live: LiveManifest) -> None:
        self._transport, self._live = transport, live
        self._made = (float("-inf"), b"")  # when, and the document
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
        manifest = self._live()
        nodes = {record.owner: record for record in await live_nodes(self._transport, manifest.run_id)}

        async def newest(shard: int) -> HeldCheckpoint | None:
            return await newest_of(self._transport, manifest, shard, set(nodes))

        held = await gather_bounded(newest, range(len(manifest.shards)), limit=_READS_AT_ONCE)
        return AcceptedDocument(entries=tuple(_entry(checkpoint, nodes) for checkpoint in held if checkpoint))


def _entry(held: HeldCheckpoint, nodes: dict[str, NodeRecord]) -> AcceptedEntry:
    addresses = [address for owner in held.holders[:_MOST_HOLDERS] for address in nodes[owner].addresses]
    return AcceptedEntry(sealed=held.sealed.decode(), expires=held.expires, holders=tuple(addresses))


def read_accepted(data: bytes, manifest: Manifest, now: float) -> list[tuple[AcceptanceRecord, tuple[str, ...]]]:
    """The live acceptances that a coordinator of the run signed, ordered by shard, each with its holders' addresses.

    Other entries of the document are ignored. `now` is in Unix seconds. Raises IntegrityError when the document is malformed.
    """
    try:
        document = AcceptedDocument.model_validate_json(data)
    except ValidationError as error:
        raise IntegrityError(f"that peer's list of checkpoints is malformed: {first_problem(error)}; ask another peer") from error
    limits = RecordLimits(manifest.timing.heartbeat, manifest.timing.maximum_clock_skew)
    newest: dict[int, tuple[AcceptanceRecord, tuple[str, ...]]] = {}
    for entry in document.entries:
        record = _opened(entry, manifest, now, limits)
        if record and (record.shard not in newest or _place(record) > _place(newest[record.shard][0])):
            newest[record.shard] = record, entry.holders
    return [newest[shard] for shard in sorted(newest)]


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
