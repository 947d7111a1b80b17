"""Two coordinators under one key, as when a run's folder was copied or an old copy was put back: two words about one epoch.

What is accepted, rolled back or quarantined is written to the ledger before the swarm hears of it. So such a word in the swarm
under our own key that our ledger does not know comes from another coordinator, or from a newer ledger than ours. Then this one
stops before it adds to the confusion (fail-stop); readers meanwhile agree by `latest_acceptance`.
"""

from __future__ import annotations

import asyncio

from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.runtime.recovery import Standing, forgotten
from lutetia.protocol.dht_records import read_records
from lutetia.protocol.schema.records import AcceptanceRecord, QuarantineRecord, ResetRecord, acceptance_key, quarantine_key
from lutetia.protocol.transport.base import Transport
from lutetia.system.errors import IdentityError

_READS_AT_ONCE = 16


async def refuse_a_rival(transport: Transport, ledger: Ledger, coordinator: str) -> None:
    """Raises IdentityError when the swarm holds an acceptance, roll-back or quarantine by `coordinator` that `ledger` lacks."""
    places = asyncio.Semaphore(_READS_AT_ONCE)

    async def look(key: str) -> None:
        async with places:
            found = await read_records(transport, key)
        for record, _ in found:
            if record.owner == coordinator:
                await _compare(record, ledger)

    run = ledger.state
    keys = [quarantine_key(run.run), *(acceptance_key(run.run, shard) for shard in run.shards)]
    for outcome in await asyncio.gather(*map(look, keys), return_exceptions=True):
        if isinstance(outcome, BaseException) and not isinstance(outcome, ConnectionError):
            raise outcome


def unknown_term(record: Standing, run: RunState) -> bool:
    """Whether this word, under our own key, is of a roll-back that the ledger lacks."""
    return record.term > run.shards[record.shard].term


def doubtful(record: AcceptanceRecord, run: RunState, coordinator: str) -> bool:
    """Whether only the whole ledger can tell if this acceptance, where it is under `coordinator`'s key, is its own."""
    ours = run.shards[record.shard].acceptance
    return record.owner == coordinator and (ours is None or ours.checkpoint != record.checkpoint)


async def _compare(record: object, ledger: Ledger) -> None:
    """One word under our own key with the ledger as it is by now."""
    run = ledger.state
    if isinstance(record, QuarantineRecord):
        if strangers := forgotten(run, [record]):
            raise _rival(f"a quarantine under this coordinator's key (of peer {strangers[0][:16]}…)", ledger)
    elif isinstance(record, AcceptanceRecord | ResetRecord):
        if unknown_term(record, run):
            raise _rival(f"a roll-back under this coordinator's key (shard {record.shard}, term {record.term})", ledger)
        if not isinstance(record, AcceptanceRecord) or not doubtful(record, run, record.owner):
            return
        if not await asyncio.to_thread(ledger.has_accepted, record.checkpoint):
            place = f"shard {record.shard}, epoch {record.epoch}"
            raise _rival(f"an acceptance under this coordinator's key ({place})", ledger)


def _rival(what: str, ledger: Ledger) -> IdentityError:
    return IdentityError(
        f"the swarm holds {what} that {ledger.path} does not know: another coordinator is at work, or this folder is an old "
        "copy; serve the newest, and only one at a time, or take back what was lost with --recover"
    )
