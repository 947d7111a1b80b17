"""Limits per peer, and per network origin: all identities behind one address share its quota, all addresses of a prefix four.

The judge counts the requests of each peer. By origin (`protocol.transport.network_origin`) offers and audit requests are counted
per minute, and undecided results, each of which costs the coordinator a download and a check. Peers behind relays share one
origin. Also: whose owner is dialled before a record of the DHT counts, and how long a peer may keep an audit. No own clock.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TypeVar

from lutetia.coordinator.acceptance.transition import JudgeRules, JudgeTransition
from lutetia.coordinator.ledger.persistent_map import PersistentMap
from lutetia.coordinator.ledger.run_state import PendingAudit, RunState
from lutetia.protocol.rpc.checkpoint_offer import OfferReply
from lutetia.protocol.schema.records import CheckpointRecord
from lutetia.protocol.transport.network_origin import origin_of, quotas_of
from lutetia.system.retry import backoff

T = TypeVar("T")

_MINUTE = 60.0
_REMEMBERED = 4096
LOAN_FACTOR = 3
"""A peer may be so many times slower at a whole epoch than its author."""
BUSY_SECONDS = 10.0
DIALS_AT_ONCE = 8
_FIRST_PAUSE, _LONGEST_PAUSE = 20.0, 3600.0


@dataclass
class RateWindow:
    """At most `per_minute` requests from one origin within any minute, and PREFIX_FACTOR times as many from one prefix."""

    per_minute: int
    _moments: OrderedDict[str, deque[float]] = field(default_factory=OrderedDict)

    def wait(self, origin: str, now: float) -> float | None:
        """Seconds to wait, or None; the request is counted then."""
        quotas = quotas_of(origin)
        for name, share in quotas:
            moments = self._moments.get(name) or deque()
            while moments and moments[0] <= now - _MINUTE:
                moments.popleft()
            if len(moments) >= share * self.per_minute:
                return moments[0] + _MINUTE - now
        for name, _ in quotas:
            moments = self._moments.get(name) or deque()
            moments.append(now)
            _remember(self._moments, name, moments)
        return None


class Admission:
    """Whether an offer is looked at now.

    Of one origin: at most `offers_per_minute`, and `undecided` results at a time; of one prefix PREFIX_FACTOR times as many.
    """

    def __init__(self, offers_per_minute: int = 120, undecided: int = 8) -> None:
        self._pace, self._undecided = RateWindow(offers_per_minute), undecided
        self._origins: OrderedDict[str, str] = OrderedDict()

    def refusal(self, peer_id: str, origin: str, waiting: Collection[str], now: float) -> OfferReply | None:
        """The reply to an offer that must come later, or None. `waiting`: the peer id of each undecided result.

        A peer may ask for the state of its own results, unless these alone are as many as its origin may have: one key may hold
        several shards, and each of its results costs a download and a check.
        """
        if wait := self._pace.wait(origin, now):
            return OfferReply(verdict="busy", text="too many offers from this address", retry_after=wait)
        known = (self._origins[other] for other in waiting if other in self._origins)
        counted = Counter(name for other in known for name, _ in quotas_of(other))
        full = next((name for name, share in quotas_of(origin) if counted[name] >= share * self._undecided), None)
        own = sum(other == peer_id for other in waiting)
        if full is not None and not 0 < own < self._undecided:
            text = f"{counted[full]} results from this address or its neighbours are being checked; offer yours again later"
            return OfferReply(verdict="busy", text=text, retry_after=BUSY_SECONDS)
        _remember(self._origins, peer_id, origin)
        return None

    def origin(self, peer_id: str) -> str:
        """The network origin from which this peer last offered; empty for a peer that never did."""
        return self._origins.get(peer_id, "")


def may_become_candidate(run: RunState, record: CheckpointRecord) -> bool:
    """Whether the result is for the next epoch of its shard, and neither waiting nor decided."""
    shard = run.shards.get(record.shard)
    if shard is None or record.epoch != shard.epoch + 1 or record.parent != shard.accepted or record.owner in run.quarantined:
        return False
    if record.lane in shard.gathered:
        return False
    waits = any(one.record.lane == record.lane for one in shard.undecided_of(record.owner))
    return not waits and (record.owner, record.digest) not in shard.judged


@dataclass
class OwnerDials:
    """The results read from the DHT whose owners are to be dialled. `now` is in Unix seconds.

    A record in the DHT costs its author nothing and may name any address. So before anything of such a result is fetched, its
    owner must answer a dial, which proves its key. Few owners are dialled at a time, one at each host; one that did not answer
    waits longer each time, behind those that have not been tried.
    """

    _waiting: dict[str, CheckpointRecord] = field(default_factory=dict)
    _running: dict[str, str] = field(default_factory=dict)
    _failures: dict[str, tuple[int, float]] = field(default_factory=dict)

    def add(self, record: CheckpointRecord) -> None:
        """Have the owner dialled; a newer result of the same owner replaces the older one."""
        if record.owner in self._waiting or len(self._waiting) < _REMEMBERED:
            self._waiting[record.owner] = record

    def start(self, now: float) -> list[CheckpointRecord]:
        """The results whose owners are to be dialled now. Tell `ended` of each."""
        started: list[CheckpointRecord] = []
        for owner, record in sorted(self._waiting.items(), key=lambda item: self._failures.get(item[0], (0, 0.0))[0]):
            host = _host(record)
            if len(self._running) >= DIALS_AT_ONCE:
                break
            if owner not in self._running and host not in self._running.values() and self._due(owner, now):
                self._running[owner] = host
                started.append(self._waiting.pop(owner))
        return started

    def ended(self, record: CheckpointRecord, answered: bool, now: float) -> None:
        self._running.pop(record.owner, None)
        failures, _ = self._failures.pop(record.owner, (0, 0.0))
        if not answered:
            self._failures[record.owner] = (failures + 1, now)
            if len(self._failures) > _REMEMBERED:
                del self._failures[next(iter(self._failures))]

    def _due(self, owner: str, now: float) -> bool:
        failures, last = self._failures.get(owner, (0, 0.0))
        return not failures or now - last >= backoff(failures, first=_FIRST_PAUSE, longest=_LONGEST_PAUSE)


def _host(record: CheckpointRecord) -> str:
    """The host of the owner's first address; relayed peers, and those by name, count as one host."""
    return origin_of(record.addresses[0]) if record.addresses else ""


def over_rate(transition: JudgeTransition, owner: str) -> float | None:
    """Seconds to wait when `owner` offered or asked too often within the last minute; otherwise this request is counted."""
    now, offers = transition.now, transition.state.offers
    recent = tuple(moment for moment in offers.get(owner, ()) if moment > now - _MINUTE)
    if len(recent) >= transition.rules.offers_per_minute:
        return recent[0] + _MINUTE - now
    transition.set(offers=offers.set(owner, (*recent, now)))
    return None


def forget_offers(transition: JudgeTransition) -> None:
    """Forget peers that have offered nothing for a minute."""
    begin, offers = transition.now - _MINUTE, transition.state.offers
    if any(moments[-1] <= begin for _, moments in offers.items()):
        transition.set(offers=PersistentMap.of((owner, moments) for owner, moments in offers.items() if moments[-1] > begin))


def forget_origins(transition: JudgeTransition) -> None:
    """Forget the origins of peers without an undecided result."""
    state = transition.state
    waiting = {one.record.owner for index in state.pending for one in state.run.shards[index].candidates.values()}
    if any(owner not in waiting for owner in state.origins):
        transition.set(
            origins=PersistentMap.of((owner, state.origins[owner]) for owner in sorted(waiting & state.origins.keys()))
        )


def loan_seconds(rules: JudgeRules, run: RunState, audit: PendingAudit) -> float:
    """How long a peer has for an audit: for a whole epoch LOAN_FACTOR times what the author took, at least and at most
    one and six times as long as for a few steps.
    """
    pace = run.peer(audit.owner).interval
    if not audit.whole:
        return rules.audit_loan
    longest = 6 * rules.audit_loan
    return longest if pace is None else min(longest, max(rules.audit_loan, LOAN_FACTOR * pace))


def end_loans(transition: JudgeTransition, auditors: frozenset[str] | None) -> None:
    """End the loans of peers that are gone or do other work, and of those that have not been heard of for long.

    `auditors`: the peers whose node records say that they are free; None: not known.
    """
    now, rules = transition.now, transition.rules
    lent = dict(transition.state.lent)
    for name, loan in lent.items():
        gone = auditors is not None and loan.owner not in auditors and now - loan.heard >= rules.manifest.timing.lease
        if loan.until > now and (gone or now - loan.heard >= rules.audit_loan):
            lent[name] = loan._replace(until=now)
    if lent != transition.state.lent:
        transition.set(lent=lent)


def _remember(known: OrderedDict[str, T], name: str, value: T) -> None:
    """Keep the newest _REMEMBERED entries."""
    known[name] = value
    known.move_to_end(name)
    if len(known) > _REMEMBERED:
        known.popitem(last=False)
