"""How the events of a run add up to the credit of its peers: the written rule of docs/explanation/credit.md. Pure.

Each function returns the credit of all peers after one event. Credit is given for work alone: a peer has an entry once a result
of it was accepted or an audit by it counted. So new identities, which cost nothing, cost no memory.
"""

from __future__ import annotations

from collections.abc import Iterable

from lutetia.coordinator.credit.accounts import CreditKind, PeerCredit, ShardCredit
from lutetia.coordinator.ledger.events import AuditDone, CopiesKept, LentCheckCounted
from lutetia.coordinator.ledger.persistent_map import PersistentMap
from lutetia.coordinator.ledger.run_state import AcceptedEpoch, PendingAudit, RunState, ShardLedger
from lutetia.protocol.schema.records import AcceptanceRecord

Credits = PersistentMap[str, PeerCredit]
_NOTHING = ShardCredit()


def trained_samples(shard: ShardLedger, given: AcceptanceRecord) -> int:
    """The samples of the accepted epoch alone. After a gap of unknown epochs it is taken to be as long as the mean."""
    if given.epoch == shard.epoch + 1:
        return max(0, given.samples - (shard.acceptance.samples if shard.acceptance else 0))
    return given.samples // given.epoch


def credit_accepted(state: RunState, given: AcceptanceRecord, samples: int, now: float) -> Credits:
    """An accepted epoch credits its author with its samples."""
    return _plus(state.credit, given.author, given.shard, "standing", samples, now)


def credit_audit(state: RunState, pending: PendingAudit | None, event: AuditDone) -> Credits:
    """An audit credits who replayed it, once its outcome counts: at once, or when the coordinator's own replay confirms it."""
    if event.outcome not in ("valid", "invalid"):
        return state.credit
    by, samples = event.by, event.samples
    if by is None and pending is not None and pending.reported is not None and pending.reported[1] == event.outcome:
        by, samples = pending.reported[0], pending.reported_samples
    return _plus(state.credit, by, event.shard, "audits", samples, event.time) if by and samples else state.credit


def take_invalid(state: RunState, link: AcceptedEpoch | None) -> Credits:
    """An epoch that an audit found invalid is nobody's credit, whether its shard goes back or not."""
    return state.credit if link is None else _taken(state.credit, link)


def credit_copies(state: RunState, event: CopiesKept) -> Credits:
    """Copies count for peers that have done other work, too: keeping some costs no computing."""
    credits = state.credit
    for copy in event.copies:
        if copy.owner in credits and copy.shard in state.shards:
            credits = _plus(credits, copy.owner, copy.shard, "copies", copy.samples, event.time)
    return credits


def credit_lent_check(state: RunState, event: LentCheckCounted) -> Credits:
    """A lent check credits each of those who carried it out, as an audit does."""
    credits = state.credit
    for owner in event.owners if event.shard in state.shards and event.samples else ():
        credits = _plus(credits, owner, event.shard, "audits", event.samples, event.time)
    return credits


def void_epochs(state: RunState, shard: int, gone: Iterable[AcceptedEpoch], whole: bool) -> Credits:
    """Void epochs are taken from authors who are quarantined. Others keep the credit: they did what was asked.

    Args:
        state: the run before the epochs became void.
        shard: its index.
        gone: the void epochs that are known one by one.
        whole: everything of the shard is void, older epochs than these included.
    """
    credits = state.credit
    for link in gone:
        if link.acceptance.author in state.quarantined:
            credits = _taken(credits, link)
        else:
            credits = _kept(credits, link.acceptance.author, shard, link.samples)
    for owner in tuple(credits) if whole else ():
        standing = credits[owner].get(shard, _NOTHING).standing
        if standing and owner in state.quarantined:
            credits = _with(credits, owner, shard, credits[owner][shard].minus(standing, float("-inf")))
        elif standing:
            credits = _kept(credits, owner, shard, standing)
    return credits


def _taken(credits: Credits, link: AcceptedEpoch) -> Credits:
    owner, shard = link.acceptance.author, link.acceptance.shard
    held = credits.get(owner, {}).get(shard)
    return credits if held is None or not link.samples else _with(credits, owner, shard, held.minus(link.samples, link.at))


def _kept(credits: Credits, owner: str, shard: int, samples: int) -> Credits:
    held = credits.get(owner, {}).get(shard)
    return credits if held is None else _with(credits, owner, shard, held.keeping(samples))


def _plus(credits: Credits, owner: str, shard: int, kind: CreditKind, samples: int, now: float) -> Credits:
    held = credits.get(owner, {}).get(shard, _NOTHING)
    return _with(credits, owner, shard, held.plus(kind, samples, now))


def _with(credits: Credits, owner: str, shard: int, credit: ShardCredit) -> Credits:
    return credits.set(owner, {**credits.get(owner, {}), shard: credit})
