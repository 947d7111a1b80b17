"""Detects two coordinators under one key, as when a run's folder was copied or an old copy was restored.

A coordinator writes acceptances, rollbacks and quarantines to its ledger before it publishes them. So a record in the DHT under
its own key that its ledger lacks comes from another coordinator, or from a newer ledger. Then this coordinator stops (fail-stop).
Meanwhile readers agree on one of two acceptances by `latest_acceptance`.
"""

from __future__ import annotations

import asyncio
import contextlib

from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.runtime.recovery import Standing, forgotten
from lutetia.protocol.async_helpers import gather_bounded
from lutetia.protocol.dht_records import read_records
from lutetia.protocol.schema.records import AcceptanceRecord, QuarantineRecord, ResetRecord, acceptance_key, quarantine_key
from lutetia.protocol.transport.base import Transport
from lutetia.system.errors import IdentityError

_READS_AT_ONCE = 16


async def refuse_split_brain(transport: Transport, ledger: Ledger, coordinator: str) -> None:
    """Raises IdentityError when the DHT holds an acceptance, rollback or quarantine by `coordinator` that `ledger` lacks."""

    async def look(key: str) -> None:
        with contextlib.suppress(ConnectionError):
            for record, _ in await read_records(transport, key):
                if record.owner == coordinator:
                    await _compare(record, ledger)

    run = ledger.state
    keys = [quarantine_key(run.run), *(acceptance_key(run.run, shard) for shard in run.shards)]
    await gather_bounded(look, keys, _READS_AT_ONCE)


def unknown_term(record: Standing, run: RunState) -> bool:
    """Whether this record, under this coordinator's key, is of a rollback that the ledger lacks."""
    return record.term > run.shards[record.shard].term


def doubtful(record: AcceptanceRecord, run: RunState, coordinator: str) -> bool:
    """Whether this acceptance, if under `coordinator`'s key, must be looked up in the whole ledger: the state has another one."""
    newest = run.shards[record.shard].acceptance
    return record.owner == coordinator and (newest is None or newest.checkpoint != record.checkpoint)


async def _compare(record: object, ledger: Ledger) -> None:
    """Compare a record under this coordinator's key with the ledger as it is now."""
    run = ledger.state
    if isinstance(record, QuarantineRecord):
        if owners := forgotten(run, [record]):
            raise _split_brain(f"a quarantine under this coordinator's key (of peer {owners[0][:16]}…)", ledger)
    elif isinstance(record, AcceptanceRecord | ResetRecord):
        if unknown_term(record, run):
            raise _split_brain(f"a rollback under this coordinator's key (shard {record.shard}, term {record.term})", ledger)
        if not isinstance(record, AcceptanceRecord) or not doubtful(record, run, record.owner):
            return
        if not await asyncio.to_thread(ledger.has_accepted, record.checkpoint):
            place = f"shard {record.shard}, epoch {record.epoch}"
            raise _split_brain(f"an acceptance under this coordinator's key ({place})", ledger)


def _split_brain(what: str, ledger: Ledger) -> IdentityError:
    return IdentityError(
        f"the swarm holds {what} that {ledger.path} does not know: another coordinator is at work, or this folder is an old "
        "copy; serve only the newest copy, or start with --recover to add what is missing to this ledger"
    )
