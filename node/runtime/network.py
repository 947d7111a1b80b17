"""The node's network operations: look at shards, publish records, offer checkpoints, fetch and announce blobs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from lutetia.node.machine.messages import Claim
from lutetia.node.pacing import CHECKPOINT_RECORD_SECONDS, LOOKUPS_AT_ONCE, provider_record_due
from lutetia.node.traffic.meter import Traffic
from lutetia.node.trainer.checkpoint_folder import KeptCheckpoint
from lutetia.protocol.async_helpers import gather_bounded
from lutetia.protocol.blobs.download import Provider, fetch_blob
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.claims import LiveClaim, ShardView, latest_acceptance, shard_and_lane, slot_name
from lutetia.protocol.dht_records import publish, read_records
from lutetia.protocol.joining import coordinator_addresses
from lutetia.protocol.rpc.checkpoint_offer import OfferReply, offer_checkpoint
from lutetia.protocol.rpc.introduction import software_version
from lutetia.protocol.schema.identity import Identity, public_key_of
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import (
    AcceptanceRecord,
    ClaimRecord,
    DeviceEntry,
    Hardware,
    NodeRecord,
    NodeState,
    ProviderRecord,
    QuarantineRecord,
    Record,
    RecordLimits,
    ResetRecord,
    acceptance_key,
    claim_key,
    provider_key,
    quarantine_key,
    seal,
)
from lutetia.protocol.schema.ticket import Address, Ticket
from lutetia.protocol.transport.base import Transport

log = logging.getLogger(__name__)
Found = TypeVar("Found")

_PROVIDERS_AT_ONCE = 4
_MAX_ADDRESSES = 8
PROVIDERS_SECONDS = 60.0
_ADDRESS = TypeAdapter(Address)


def _fits_records(address: str) -> bool:
    with contextlib.suppress(ValidationError):
        _ADDRESS.validate_python(address)
        return True
    return False


@dataclass
class NodeNetwork:
    """One peer's network operations on `transport`, which is replaced when p2pd has died."""

    identity: Identity
    transport: Transport
    manifest: Manifest
    ticket: Ticket
    store: BlobStore
    operator: str | None = None
    name: str = ""
    traffic: Traffic | None = None
    """The bytes of this node; None where nobody counts them."""
    acceptances: dict[int, AcceptanceRecord] = field(default_factory=dict)
    """The newest acceptance seen, by shard."""
    quarantined: frozenset[str] = frozenset()
    _quarantine_seen: float = float("-inf")
    _claiming: asyncio.Lock = field(default_factory=asyncio.Lock)
    _announced: dict[str, float] = field(default_factory=dict)
    _recorded: dict[str, float] = field(default_factory=dict)
    _part_providers: dict[str, tuple[float, list[Provider]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.upgrade(self.manifest)

    def upgrade(self, manifest: Manifest) -> None:
        """Use this version of the manifest from now on."""
        self.manifest = manifest
        self.limits = RecordLimits(manifest.timing.heartbeat, manifest.timing.maximum_clock_skew)
        self.coordinators = list(coordinator_addresses(manifest, self.ticket).items())

    @property
    def addresses(self) -> tuple[str, ...]:
        """Addresses of p2pd that a record may name; p2pd itself accepts almost any text as an address."""
        return tuple(address for address in self.transport.addresses() if _fits_records(address))[:_MAX_ADDRESSES]

    async def look(self, slots: Sequence[int]) -> tuple[ShardView, ...]:
        """Claims and acceptances of these slots; one that cannot be looked up is left out. A shard's lanes share its lineage."""
        await self._update_quarantine()
        claims = await gather_bounded(lambda slot: self._found(slot, self._claims), slots, LOOKUPS_AT_ONCE)
        shards = tuple({shard_and_lane(slot)[0]: None for slot in slots})
        found = await gather_bounded(lambda shard: self._found(shard, self._lineage), shards, LOOKUPS_AT_ONCE)
        lineages = dict(zip(shards, found, strict=True))
        views = []
        for slot, live in zip(slots, claims, strict=True):
            lineage = lineages[shard_and_lane(slot)[0]]
            if live is not None and lineage is not None:
                views.append(ShardView(slot, live, *lineage))
        return tuple(views)

    async def _found(self, slot: int, read: Callable[[int], Awaitable[Found]]) -> Found | None:
        try:
            return await read(slot)
        except ConnectionError as error:
            log.info("cannot look up %s: %s", slot_name(slot), error)
            return None

    async def _claims(self, slot: int) -> tuple[LiveClaim, ...]:
        claims = await read_records(self.transport, claim_key(self.manifest.run_id, *shard_and_lane(slot)))
        return tuple(
            LiveClaim(record, expires)
            for record, expires in claims
            if isinstance(record, ClaimRecord) and record.owner not in self.quarantined
        )

    async def _lineage(self, shard: int) -> tuple[AcceptanceRecord | None, int]:
        """The shard's newest acceptance; without one, the term of its last reset."""
        accepted = await read_records(self.transport, acceptance_key(self.manifest.run_id, shard))
        newest = latest_acceptance(record for record, _ in accepted if isinstance(record, AcceptanceRecord | ResetRecord))
        if isinstance(newest, ResetRecord):
            self.acceptances.pop(shard, None)
            return None, newest.term
        if newest:
            self.acceptances[shard] = newest
        return newest, 0

    async def _update_quarantine(self) -> None:
        """Read which peers' claims do not count, at most once per heartbeat."""
        now = time.monotonic()
        if now - self._quarantine_seen < self.manifest.timing.heartbeat:
            return
        try:
            stored = await read_records(self.transport, quarantine_key(self.manifest.run_id))
        except ConnectionError as error:
            log.debug("cannot look up the quarantine: %s", error)
            return
        self._quarantine_seen = now
        records = [record for record, _ in stored if isinstance(record, QuarantineRecord)]
        self.quarantined = frozenset(peer for record in records for peer in record.peers)

    async def publish_claim(self, claim: Claim) -> None:
        shard, lane = shard_and_lane(claim.shard)
        record = ClaimRecord(
            run=self.manifest.run_id, owner=self.identity.public_key, issued=self.transport.now(),
            shard=shard, lane=lane, epoch=claim.epoch, samples=claim.samples, state=claim.state,
        )  # fmt: skip
        async with self._claiming:  # one at a time: the DHT refuses a claim that is older than the stored one
            if not await self._publish(record, self.limits.longest("claim")):
                log.warning("claim on %s not stored: no DHT peer took it", slot_name(claim.shard))

    async def publish_node(
        self, state: NodeState, hardware: Hardware, rate: float, shard: int | None, devices: tuple[DeviceEntry, ...] = ()
    ) -> None:
        record = NodeRecord(
            run=self.manifest.run_id, owner=self.identity.public_key, issued=self.transport.now(),
            peer_id=self.identity.peer_id, addresses=self.addresses, hardware=hardware, samples_per_second=rate,
            software=software_version(), state=state, shard=shard, operator=self.operator, name=self.name, devices=devices,
        )  # fmt: skip
        await self._publish(record, self.limits.longest("node"))

    async def _publish(self, record: Record, ttl: float) -> bool:
        return await publish(self.transport, self.identity, record, ttl, skew=self.limits.maximum_clock_skew)

    async def announce(self, blobs: Iterable[str]) -> None:
        """Publish provider records for these blobs, except where ours was published within a third of its lifetime."""
        ttl, now = self.limits.longest("provider"), time.monotonic()
        due = [digest for digest in blobs if provider_record_due(now - self._announced.get(digest, -ttl), ttl)]
        for digest in due:
            record = ProviderRecord(
                run=self.manifest.run_id, owner=self.identity.public_key, issued=self.transport.now(),
                blob=digest, peer_id=self.identity.peer_id, addresses=self.addresses,
            )  # fmt: skip
            if await self._publish(record, ttl):
                self._announced[digest] = now

    async def offer(self, kept: KeptCheckpoint) -> OfferReply:
        """Publish the checkpoint's record and offer it to the coordinators in turn. Raises ConnectionError if none answers."""
        record = kept.record(self.identity.public_key, self.identity.peer_id, self.addresses, self.transport.now())
        ttl, now = self.limits.longest("checkpoint"), time.monotonic()
        if now - self._recorded.get(record.digest, float("-inf")) >= CHECKPOINT_RECORD_SECONDS:
            await self._publish(record, ttl)
            self._recorded = {record.digest: now}
        expires = record.issued + ttl
        sealed = seal(record, self.identity, expires)
        problem = ConnectionError("the manifest names no coordinator")
        for peer, addresses in self.coordinators:
            try:
                return await offer_checkpoint(self.transport, peer, sealed, expires, addresses=addresses)
            except ConnectionError as error:
                problem = error
        raise problem

    async def fetch_into(self, store: BlobStore, ref: BlobRef) -> Path:
        """The blob's file, from this node's stores or from peers into `store`, which is not served.

        Raises UnreachableError, IntegrityError or DiskError.
        """
        for known in (self.store, store):
            if await asyncio.to_thread(known.has, ref.digest):
                return known.path(ref.digest)
        with self._fetching(ref):
            return await fetch_blob(self.transport, store, ref, await self._providers(ref))

    async def fetch(
        self, ref: BlobRef, on_progress: Callable[[int, int], None] | None = None, listed_by: BlobRef | None = None
    ) -> Path:
        """The blob's file, from the store or from peers.

        Args:
            ref: the blob.
            on_progress: called with (bytes done, bytes in total).
            listed_by: the index of the shard whose part it is: who announces the index has all its parts.

        Raises UnreachableError, IntegrityError or DiskError.
        """
        if await asyncio.to_thread(self.store.has, ref.digest):
            return self.store.path(ref.digest)
        with self._fetching(ref):
            providers = await self._providers_of_parts(listed_by) if listed_by else await self._providers(ref)
            return await fetch_blob(self.transport, self.store, ref, providers, on_progress)

    def _fetching(self, ref: BlobRef) -> AbstractContextManager[None]:
        """Raises UnreachableError where the cap on bytes leaves less than the blob has."""
        return self.traffic.fetching(ref.size) if self.traffic else contextlib.nullcontext()

    @property
    def spare_bytes(self) -> float:
        """Bytes that may go to anything but this node's own training."""
        return self.traffic.spare if self.traffic else math.inf

    def room(self, peer_id: str, count: int) -> AbstractContextManager[bool]:
        """Whether the cap on bytes lets `count` bytes of a blob go to a peer. Coordinators fetch what this node made."""
        if self.traffic is None:
            return contextlib.nullcontext(True)
        return self.traffic.sending(count, own=public_key_of(peer_id) in self.manifest.coordinators)

    async def _providers_of_parts(self, index: BlobRef) -> list[Provider]:
        """The providers of an index, asked for at most once in PROVIDERS_SECONDS: a shard may have a thousand parts."""
        known, providers = self._part_providers.get(index.digest, (float("-inf"), []))
        if time.monotonic() - known > PROVIDERS_SECONDS:
            providers = await self._providers(index)
            self._part_providers = {index.digest: (time.monotonic(), providers)}
        return random.sample(providers, len(providers))

    async def _providers(self, ref: BlobRef) -> list[Provider]:
        """Nodes first, to spare the coordinators, which hold everything; in random order, since liars choose theirs."""
        providers = []
        try:
            for record, _ in await read_records(self.transport, provider_key(self.manifest.run_id, ref.digest)):
                if isinstance(record, ProviderRecord) and record.peer_id != self.identity.peer_id:
                    providers.append(Provider(record.peer_id, record.addresses))
        except ConnectionError as error:
            log.debug("cannot look up the providers of blob %s: %s", ref.digest[:12], error)
        random.shuffle(providers)
        coordinators = [Provider(peer, addresses, trusted=True) for peer, addresses in self.coordinators]
        known = {coordinator.peer_id for coordinator in coordinators}
        return [*(provider for provider in providers if provider.peer_id not in known), *coordinators]

    def has_accepted_work(self, peer_id: str) -> bool:
        """Whether a peer is a coordinator, or trained a shard's newest acceptance or a lane of it."""
        owner = public_key_of(peer_id)
        authors = tuple(author for given in self.acceptances.values() for author in (given.author, *given.author_marks))
        return owner is not None and (owner in self.manifest.coordinators or owner.startswith(authors))

    def replace_transport(self, transport: Transport) -> None:
        """Use a new transport; its addresses differ, so everything is announced again."""
        self.transport = transport
        self._announced.clear()
        self._recorded.clear()
        self._part_providers.clear()
