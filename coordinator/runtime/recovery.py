"""Recovers what this coordinator's key has signed and its ledger has lost, so that no lineage is forked.

The DHT holds the newest acceptance or reset of each shard, signed by this coordinator. A record that is ahead of the ledger
proves that the ledger is not the newest, and stops the coordinator (`split_brain`). After a restore, or with --recover, it
appends what is missing to its ledger instead, and fetches the checkpoint's blobs from the peers that hold them. The same is
done for its record of quarantined peers.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lutetia.coordinator.acceptance.rollback import re_audits
from lutetia.coordinator.ledger.describe import sentence
from lutetia.coordinator.ledger.events import AcceptanceRecovered, QuarantineRecovered, ResetRecovered
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.ledger.run_state import RunState, ShardLedger
from lutetia.protocol.async_helpers import gather_bounded
from lutetia.protocol.blobs.download import Provider, fetch_blob
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.dht_records import read_records
from lutetia.protocol.rpc.manifest_sync import LiveManifest
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import (
    AcceptanceRecord,
    ProviderRecord,
    QuarantineRecord,
    Record,
    ResetRecord,
    acceptance_key,
    provider_key,
    quarantine_key,
)
from lutetia.protocol.transport.base import Transport
from lutetia.system.errors import LutetiaError

_log = logging.getLogger(__name__)

_READS_AT_ONCE = 16
_PARDON_SPREADS = 60.0
"""Seconds after a pardon in which a quarantine record from before it may still arrive."""

Standing = AcceptanceRecord | ResetRecord
Recovered = AcceptanceRecovered | ResetRecovered | QuarantineRecovered


def ahead(state: RunState, seen: Iterable[Standing]) -> list[Standing]:
    """The acceptances and resets among `seen`, all by this coordinator, that are newer than the ledger; one for each shard."""
    newest: dict[int, Standing] = {}
    for record in seen:
        shard = state.shards.get(record.shard)
        if shard is not None and _place(record) > _place(shard):
            best = newest.get(record.shard)
            if best is None or _place(record) > _place(best):
                newest[record.shard] = record
    return [newest[index] for index in sorted(newest)]


def _place(standing: Standing | ShardLedger) -> tuple[int, int]:
    """(term, epoch): grows with every acceptance and every rollback."""
    return standing.term, 0 if isinstance(standing, ResetRecord) else standing.epoch


def forgotten(state: RunState, seen: Iterable[QuarantineRecord]) -> list[str]:
    """The owners that this coordinator's records quarantine and its ledger does not, unless pardoned since; sorted."""
    return sorted(
        {
            owner
            for record in seen
            for owner in record.peers
            if owner not in state.quarantined and state.pardoned.get(owner, -math.inf) + _PARDON_SPREADS < record.issued
        }
    )


def recovered(standing: Iterable[Standing], quarantined: Iterable[str], now: float) -> list[Recovered]:
    """The events to append to the ledger for what it lacks."""
    events: list[Recovered] = [
        ResetRecovered(time=now, shard=record.shard, term=record.term)
        if isinstance(record, ResetRecord)
        else AcceptanceRecovered(time=now, acceptance=record)
        for record in standing
    ]
    return [*events, *(QuarantineRecovered(time=now, owner=owner) for owner in quarantined)]


@dataclass
class SignedLineages:
    """The lineages and quarantines of one run, as this coordinator's key has signed them in the DHT."""

    transport: Transport
    live: LiveManifest
    coordinator: str
    """This coordinator's public key; records of other owners are no proof."""

    async def lost(self, state: Callable[[], RunState]) -> list[Recovered]:
        """What the DHT holds and the ledger lacks; `state` is read after the DHT. Raises ConnectionError when offline."""
        run = self.live().run_id

        async def signed(key: str) -> list[Record]:
            return [record for record, _ in await read_records(self.transport, key) if record.owner == self.coordinator]

        keys = [quarantine_key(run), *(acceptance_key(run, shard) for shard in range(len(self.live().shards)))]
        records = [record for found in await gather_bounded(signed, keys, _READS_AT_ONCE) for record in found]
        now = self.transport.now()
        standing = ahead(state(), (record for record in records if isinstance(record, AcceptanceRecord | ResetRecord)))
        quarantined = forgotten(state(), (record for record in records if isinstance(record, QuarantineRecord)))
        lost = recovered(standing, quarantined, now)
        for event in lost:
            _log.warning("the ledger had lost this and gets it back: %s", sentence(event))
        return lost

    async def recover(self, ledger: Ledger, seconds: float) -> None:
        """For `seconds`, while peers reconnect, append every lost acceptance, reset and quarantine to `ledger`."""
        until = self.transport.now() + seconds
        _log.info("reading the DHT for %.0f s, to find what the ledger lacks", seconds)
        while True:
            if lost := await self.lost(lambda: ledger.state):
                ledger.append(lost, durable=True)
                convicted = [event.owner for event in lost if isinstance(event, QuarantineRecovered)]
                if audits := [due for owner in convicted for due in re_audits(ledger.state, owner, self.transport.now())]:
                    ledger.append(audits, durable=True)
            if self.transport.now() >= until:
                return
            await asyncio.sleep(min(1.0, seconds / 4))


async def fetch_missing(transport: Transport, state: RunState, blobs: BlobStore) -> int:
    """Fetch the missing blobs of the newest accepted checkpoints from the peers that announce them.

    Returns how many are still missing; try those again later.
    """
    missing = 0
    for shard in list(state.shards.values()):
        for ref in (shard.acceptance.weights, shard.acceptance.state) if shard.acceptance else ():
            if not await asyncio.to_thread(blobs.has, ref.digest) and not await _fetch(transport, state.run, blobs, ref):
                missing += 1
    return missing


async def _fetch(transport: Transport, run: str, blobs: BlobStore, ref: BlobRef) -> bool:
    try:
        records = await read_records(transport, provider_key(run, ref.digest))
        providers = [Provider(record.peer_id, record.addresses) for record, _ in records if isinstance(record, ProviderRecord)]
        await fetch_blob(transport, blobs, ref, providers)
    except (LutetiaError, ConnectionError) as error:
        _log.warning("cannot fetch blob %s of an accepted checkpoint, which is missing here: %s", ref.digest[:12], error)
        return False
    _log.info("fetched blob %s of an accepted checkpoint from a peer", ref.digest[:12])
    return True
