"""A ledger that lost its end must not fork its lineages: what this coordinator's key has signed, it stands by.

Where each shard stands is in the DHT, signed by this very coordinator: its newest acceptance, or a reset. One that is ahead of
the ledger proves that the ledger is not the newest, and stops the coordinator (`rival`). After a restore, or told to recover, it
takes its word back into its ledger instead, and fetches the checkpoint's blobs from the peers that hold them. The same goes for
its word about who is quarantined.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lutetia.coordinator.acceptance.rollback import re_audits
from lutetia.coordinator.ledger.describe import sentence
from lutetia.coordinator.ledger.events import AcceptanceRecovered, QuarantineRecovered, ResetRecovered
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.ledger.run_state import RunState, ShardLedger
from lutetia.protocol.blobs.download import Provider, fetch_blob
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.dht_records import read_records
from lutetia.protocol.rpc.manifest_sync import LiveManifest
from lutetia.protocol.schema.manifest import BlobRef
from lutetia.protocol.schema.records import (
    AcceptanceRecord,
    ProviderRecord,
    QuarantineRecord,
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
"""Seconds after a pardon in which our own word without it may still have been under way."""

Standing = AcceptanceRecord | ResetRecord
Recovered = AcceptanceRecovered | ResetRecovered | QuarantineRecovered


def ahead(state: RunState, seen: Iterable[Standing]) -> list[Standing]:
    """Those of our own acceptances and resets that are newer than what the ledger has of their shard, by shard."""
    newest: dict[int, Standing] = {}
    for record in seen:
        shard = state.shards.get(record.shard)
        if shard is not None and _place(record) > _place(shard):
            best = newest.get(record.shard)
            if best is None or _place(record) > _place(best):
                newest[record.shard] = record
    return [newest[index] for index in sorted(newest)]


def _place(standing: Standing | ShardLedger) -> tuple[int, int]:
    """(term, epoch): grows with every acceptance and every roll-back."""
    return standing.term, 0 if isinstance(standing, ResetRecord) else standing.epoch


def forgotten(state: RunState, seen: Iterable[QuarantineRecord]) -> list[str]:
    """Whom our own records name, sorted, though the ledger has them neither in quarantine nor pardoned about then or later."""
    return sorted(
        {
            owner
            for record in seen
            for owner in record.peers
            if owner not in state.quarantined and state.pardoned.get(owner, -math.inf) + _PARDON_SPREADS < record.issued
        }
    )


def recovered(standing: Iterable[Standing], quarantined: Iterable[str], now: float) -> list[Recovered]:
    """The ledger's entries for words that it lacked."""
    events: list[Recovered] = [
        ResetRecovered(time=now, shard=record.shard, term=record.term)
        if isinstance(record, ResetRecord)
        else AcceptanceRecovered(time=now, acceptance=record)
        for record in standing
    ]
    return [*events, *(QuarantineRecovered(time=now, owner=owner) for owner in quarantined)]


@dataclass
class SignedLineages:
    """The lineages of one run, and its quarantines, as this coordinator's key has signed them."""

    transport: Transport
    live: LiveManifest
    coordinator: str
    """This coordinator's public key: the words of others are no proof."""

    async def lost(self, state: Callable[[], RunState]) -> list[Recovered]:
        """What the DHT shows and the ledger, asked after that, lacks. Raises ConnectionError when this peer is offline."""
        places = asyncio.Semaphore(_READS_AT_ONCE)
        run = self.live().run_id

        async def own(key: str) -> list[Any]:
            async with places:
                found = await read_records(self.transport, key)
            return [record for record, _ in found if record.owner == self.coordinator]

        keys = [acceptance_key(run, shard) for shard in range(len(self.live().shards))]
        found = await asyncio.gather(*map(own, [quarantine_key(run), *keys]))
        words, now = [record for records in found for record in records], self.transport.now()
        standing = ahead(state(), (word for word in words if isinstance(word, AcceptanceRecord | ResetRecord)))
        quarantined = forgotten(state(), (word for word in words if isinstance(word, QuarantineRecord)))
        lost = recovered(standing, quarantined, now)
        for event in lost:
            _log.warning("taken back into the ledger, which had lost it: %s", sentence(event))
        return lost

    async def recover(self, ledger: Ledger, seconds: float) -> None:
        """Look for `seconds`, while peers find their way back, and take every lost word into `ledger`."""
        until = self.transport.now() + seconds
        _log.info("looking for %.0f s what peers hold that the ledger lacks", seconds)
        while True:
            if lost := await self.lost(lambda: ledger.state):
                ledger.append(lost, durable=True)
                convicted = [event.owner for event in lost if isinstance(event, QuarantineRecovered)]
                if again := [due for owner in convicted for due in re_audits(ledger.state, owner, self.transport.now())]:
                    ledger.append(again, durable=True)
            if self.transport.now() >= until:
                return
            await asyncio.sleep(min(1.0, seconds / 4))


async def fetch_missing(transport: Transport, state: RunState, blobs: BlobStore) -> int:
    """Bring the blobs of the newest accepted checkpoints that are not here from the peers that say they hold them.

    Returns how many are still missing; they are tried again later.
    """
    missing = 0
    for shard in list(state.shards.values()):
        for ref in (shard.acceptance.weights, shard.acceptance.state) if shard.acceptance else ():
            if not await asyncio.to_thread(blobs.has, ref.digest) and not await _fetch(transport, state.run, blobs, ref):
                missing += 1
    return missing


async def _fetch(transport: Transport, run: str, blobs: BlobStore, ref: BlobRef) -> bool:
    try:
        found = await read_records(transport, provider_key(run, ref.digest))
        providers = [Provider(record.peer_id, record.addresses) for record, _ in found if isinstance(record, ProviderRecord)]
        await fetch_blob(transport, blobs, ref, providers)
    except (LutetiaError, ConnectionError) as error:
        _log.warning("blob %s of an accepted checkpoint is not here: %s", ref.digest[:12], error)
        return False
    _log.info("fetched blob %s of an accepted checkpoint back from peers", ref.digest[:12])
    return True
