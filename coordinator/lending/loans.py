"""Which check is lent to whom, until when, and what a report changes. Pure: every function returns a new LendingDesk.

A check that waits for a report is never forgotten: a loan that is late is no longer counted on, so that another peer is asked,
but its report is still taken when it comes. A borrower that is gone gives its loan back. Where a check has as many loans as it
may have, the one that is late for longest ends for a new one. Who was late, or never reported, gets a check only after others had
time to come for it: otherwise four peers that only ask would hold every check for ever.

A new key costs nothing, so keys without accepted work share the record of their network origin: at any time one loan of an origin
is counted on (four of a prefix), and none while more of its loans were late than in time. The others are given besides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lutetia.coordinator.lending.agreement import NEEDED, Settled, settle
from lutetia.protocol.rpc.check_request import CheckReport
from lutetia.protocol.transport.network_origin import quotas_of

SILENT_SECONDS = 600.0
"""A borrower that has not asked again for so long has lost its loan; while it works it does so every two minutes."""
FORGIVEN_SECONDS = 600.0
"""For so long a peer that could not carry a check out is not offered it again."""
KEPT_SECONDS = 120.0
"""For so long a place is kept for a peer whose own work was accepted."""
_LEAST_LOAN = 600.0
_TIMES_USUAL = 3.0
MOST_LATENESS = 5
"""A peer that was late that often or more lets others come first for so many times KEPT_SECONDS."""
_MOST_LOANS = 4
_MOST_REMEMBERED = 4096
PROOF_AHEAD = 3600.0
"""A replay for which a result waits is lent as if it had waited so many seconds longer: before others, but not for ever."""


@dataclass(frozen=True, slots=True)
class CheckLoan:
    """A check that a peer has. `began`, `heard`, `due` and `counts_until` are Unix seconds."""

    id: str
    began: float
    heard: float
    due: float
    """A report after this is late."""
    counts_until: float
    """After this the coordinator asks another peer, too: at once where the peer, or its origin, let a loan go by."""
    source: str = ""
    """The network origin that shares the record of this loan; empty: its owner has accepted work, or the origin is not known."""


@dataclass(frozen=True, slots=True)
class LentCheck:
    """One check that nodes are to carry out.

    Args:
        name: the coordinator's name for it.
        kind: as in CheckJob.
        shard: whose expert it runs; None: of all shards.
        since: when it was asked for, Unix seconds.
        excluded: owners that must not have it: its author.
        needed: reports that must agree; 1: the first one counts.
        fewest: rows that each part of a result must have been scored on.
        seconds: how long a loan is counted on.
        ahead: seconds that it counts as having waited before it was asked for.
    """

    name: str
    kind: str
    shard: int | None
    since: float
    excluded: frozenset[str] = frozenset()
    needed: int = NEEDED
    fewest: int = 1
    seconds: float = _LEAST_LOAN
    ahead: float = 0.0
    loans: Mapping[str, CheckLoan] = field(default_factory=dict)
    reports: tuple[CheckReport, ...] = ()
    failed: Mapping[str, float] = field(default_factory=dict)
    """Owner -> when it could not carry it out."""
    known: frozenset[str] = frozenset()
    """Those that have it or have reported on it whose own work was accepted."""
    origins: frozenset[str] = frozenset()
    """The public network origins from which it was borrowed."""

    @property
    def borrowers(self) -> frozenset[str]:
        """Those that have it or have reported on it."""
        return frozenset({*self.loans, *(report.owner for report in self.reports)})

    def missing(self, now: float) -> int:
        """How many more peers to ask now."""
        wanted = self.needed if len(self.reports) < self.needed else len(self.reports) + 1
        counted = sum(now < loan.counts_until for loan in self.loans.values())
        return min(wanted - len(self.reports), _MOST_LOANS) - counted

    def crowded_out(self, now: float) -> str | None:
        """Once all loans are out, the borrower that is late for longest: it gives way to another one."""
        late = {owner: loan.counts_until for owner, loan in self.loans.items() if now >= loan.counts_until}
        return min(late, key=lambda owner: late[owner]) if late and len(self.loans) >= _MOST_LOANS else None


@dataclass(frozen=True, slots=True)
class Asker:
    """A peer that asks for a check.

    Args:
        owner: its public key.
        kinds: the kinds of check that it can carry out.
        shards: those whose experts its device runs.
        related: the peers of its operator or its public address, itself included.
        known: whether its own work was accepted.
        origin: the public network origin from which it asks; empty: it is not public.
        source: the network origin whose record it shares while it has no accepted work; empty: it shares none.
    """

    owner: str
    kinds: frozenset[str]
    shards: frozenset[int]
    related: frozenset[str]
    known: bool = False
    origin: str = ""
    source: str = ""

    @property
    def shared(self) -> str:
        """`source`, unless accepted work speaks for the peer itself."""
        return "" if self.known else self.source


@dataclass(frozen=True, slots=True)
class LendingDesk:
    """All checks that wait for reports, by name."""

    checks: Mapping[str, LentCheck] = field(default_factory=dict)
    late: Mapping[str, int] = field(default_factory=dict)
    """Owner, network origin or prefix -> how many of its loans ended late or without a report, less those reported on in time."""

    def held_by(self, owner: str) -> LentCheck | None:
        return next((check for check in self.checks.values() if owner in check.loans), None)

    def with_check(self, check: LentCheck) -> LendingDesk:
        return replace(self, checks={**self.checks, check.name: check})

    def without(self, name: str) -> LendingDesk:
        return replace(self, checks={key: check for key, check in self.checks.items() if key != name})

    def with_lateness(self, owner: str, more: int, source: str = "") -> LendingDesk:
        """The desk when a loan of `owner`, shared by `source`, has ended late (1), or with a report in time (-1)."""
        desk = self
        for name, share in ((owner, 1), *_quotas(source)):
            others = {key: count for key, count in desk.late.items() if key != name}
            count = min(share * MOST_LATENESS, max(0, desk.late.get(name, 0) + more))
            kept = dict(list(others.items())[1 - _MOST_REMEMBERED :])
            desk = replace(desk, late={**kept, name: count} if count else others)
        return desk

    def lateness(self, asker: Asker) -> int:
        """How often the peer was late, or a key without accepted work at its origin or, a quarter of it, in its prefix."""
        return max(self.late.get(name, 0) // share for name, share in ((asker.owner, 1), *_quotas(asker.shared)))

    def counts_on(self, asker: Asker, now: float) -> bool:
        """Whether a loan to this peer is one to wait for: it was not late, and nobody else of its origin is waited for."""
        counted = Counter(
            name
            for check in self.checks.values()
            for loan in check.loans.values()
            if now < loan.counts_until
            for name, _ in _quotas(loan.source)
        )
        return not self.lateness(asker) and all(counted[name] < share for name, share in _quotas(asker.shared))


def _quotas(source: str) -> tuple[tuple[str, int], ...]:
    return quotas_of(source) if source else ()


def loan_seconds_for(size: int, slowest: float, usual: float | None) -> float:
    """How long a loan is counted on.

    Args:
        size: bytes that the borrower fetches.
        slowest: bytes per second at which it must be able to.
        usual: seconds that such checks took so far; None: not known.
    """
    return _LEAST_LOAN + size / slowest + _TIMES_USUAL * (usual or 0.0)


def may_have(check: LentCheck, asker: Asker, now: float, free_known: frozenset[str] = frozenset(), late: int = 0) -> bool:
    """Whether the check needs another peer, and this one is unlike its author and those that have it or have reported on it.

    Of those that check, one place is for a peer whose own work was accepted, as long as one of `free_known` may come for it. A
    peer that was `late` that often lets others come first.
    """
    borrowers, failed = check.borrowers, check.failed.get(asker.owner)
    others = check.excluded | borrowers
    kept = not asker.known and bool(borrowers - check.known) and not check.known and bool(free_known - others)
    return (
        check.missing(now) > 0
        and check.kind in asker.kinds
        and (check.shard is None or check.shard in asker.shards)
        and not others & {asker.owner, *asker.related}
        and not (asker.origin and asker.origin in check.origins)
        and (failed is None or now - failed >= FORGIVEN_SECONDS)
        and not (kept and now - check.since < KEPT_SECONDS)
        and not (late and now - check.since < late * KEPT_SECONDS)
    )


def lend_check(
    desk: LendingDesk, asker: Asker, id_: str, now: float, free_known: frozenset[str] = frozenset()
) -> tuple[LendingDesk, LentCheck | None]:
    """The check that the peer has, or gets now: of those begun by others or put ahead the oldest, then of all others.

    Args:
        desk: all checks.
        asker: who asks.
        id_: the id of the loan, should it get one.
        now: Unix seconds.
        free_known: the peers that are free and whose own work was accepted.
    """
    if check := desk.held_by(asker.owner):
        loan = replace(check.loans[asker.owner], heard=now)
    else:
        late = desk.lateness(asker)
        fit = [check for check in desk.checks.values() if may_have(check, asker, now, free_known, late)]
        check = min(fit, key=_rank, default=None)
        if check is None:
            return desk, None
        if gone := check.crowded_out(now):
            desk = _note_end(desk, gone, check.loans[gone], now)
            check = replace(check, loans={owner: loan for owner, loan in check.loans.items() if owner != gone})
        due = now + check.seconds
        loan = CheckLoan(id_, now, now, due, due if desk.counts_on(asker, now) else now, asker.shared)
    known = check.known | {asker.owner} if asker.known else check.known
    origins = check.origins | {asker.origin} if asker.origin else check.origins
    check = replace(check, loans={**check.loans, asker.owner: loan}, known=known, origins=origins)
    return desk.with_check(check), check


def _note_end(desk: LendingDesk, owner: str, loan: CheckLoan, now: float) -> LendingDesk:
    """The desk when the loan ends for another or with its check: late, if it was due."""
    return desk.with_lateness(owner, 1, loan.source) if now >= loan.due else desk


def _rank(check: LentCheck) -> tuple[bool, float, str]:
    return not (check.ahead or check.reports or check.loans), check.since - check.ahead, check.name


def take_report(desk: LendingDesk, report: CheckReport, now: float) -> tuple[LendingDesk, LentCheck | None, Settled | None]:
    """(desk, the check that the report is of, its outcome if it has one now). None: no such loan."""
    check = desk.held_by(report.owner)
    if check is None or check.loans[report.owner].id != report.id:
        return desk, None, None
    loans = {owner: loan for owner, loan in check.loans.items() if owner != report.owner}
    if report.outcome == "failed":
        check = replace(check, loans=loans, failed={**check.failed, report.owner: now})
        return desk.with_check(check), check, None
    loan = check.loans[report.owner]
    desk = desk.with_lateness(report.owner, -1 if now < loan.due else 1, loan.source)
    check = replace(check, loans=loans, reports=(*check.reports, report))
    outcome = Settled(report) if check.needed == 1 else settle(check.reports, check.fewest, check.known)
    if outcome:
        for owner, other in loans.items():
            desk = _note_end(desk, owner, other, now)
        return desk.without(check.name), check, outcome
    return desk.with_check(check), check, None


def end_check_loans(desk: LendingDesk, free: frozenset[str] | None, now: float, lease: float) -> LendingDesk:
    """Give back the loans of peers that are gone, do other work, or have not been heard of for long: they count as late.

    Args:
        desk: all checks.
        free: the peers whose node records say that they are free; None: not known.
        now: Unix seconds.
        lease: seconds in which a peer's record may be missing.
    """
    for check in desk.checks.values():
        kept = {owner: loan for owner, loan in check.loans.items() if not _ended(owner, loan, free, now, lease)}
        if len(kept) < len(check.loans):
            desk = desk.with_check(replace(check, loans=kept))
        for owner in sorted(check.loans.keys() - kept.keys()):
            desk = desk.with_lateness(owner, 1, check.loans[owner].source)
    return desk


def _ended(owner: str, loan: CheckLoan, free: frozenset[str] | None, now: float, lease: float) -> bool:
    silent = now - loan.heard
    return silent >= SILENT_SECONDS or (free is not None and owner not in free and silent >= lease)
