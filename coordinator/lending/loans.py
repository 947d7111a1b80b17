"""Which check is lent to whom, until when, and what a report changes. Pure: every function returns a new LendingDesk.

A check that waits for a report is never forgotten: a loan that is late is no longer counted on, so that another peer is asked,
but its report is still taken when it comes. A borrower that is gone gives its loan back. Where a check has as many loans as it
may have, the one that is late for longest ends for a new one. Who let a loan go by without a report is offered checks more rarely
each time: otherwise four peers that only ask would hold every check for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lutetia.coordinator.lending.agreement import NEEDED, Settled, settle
from lutetia.protocol.rpc.check_request import CheckReport
from lutetia.system.retry import backoff

SILENT_SECONDS = 600.0
"""A borrower that has not asked again for so long has lost its loan; while it works it does so every two minutes."""
FORGIVEN_SECONDS = 600.0
"""For so long a peer that could not carry a check out is not offered it again."""
KEPT_SECONDS = 120.0
"""For so long a place is kept for a peer whose own work was accepted."""
_LEAST_LOAN = 600.0
_TIMES_USUAL = 3.0
LONGEST_PAUSE = 86400.0
"""A peer that never reports is offered a check once in so many seconds."""
_MOST_LOANS = 4
_MOST_REMEMBERED = 4096
PROOF_AHEAD = 3600.0
"""A replay for which a result waits is lent as if it had waited so many seconds longer: before others, but not for ever."""


@dataclass(frozen=True, slots=True)
class CheckLoan:
    """A check that a peer has. `began`, `heard` and `counts_until` are Unix seconds."""

    id: str
    began: float
    heard: float
    counts_until: float
    """After this the coordinator asks another peer, too."""


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
        """The borrower that gives way to another one: of as many as there may be the one that is late for longest."""
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
    """

    owner: str
    kinds: frozenset[str]
    shards: frozenset[int]
    related: frozenset[str]
    known: bool = False
    origin: str = ""


@dataclass(frozen=True, slots=True)
class LendingDesk:
    """All checks that wait for reports, by name."""

    checks: Mapping[str, LentCheck] = field(default_factory=dict)
    unanswered: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    """Owner -> how many of its loans ended without a report since its last one, and when the last of them did."""

    def held_by(self, owner: str) -> LentCheck | None:
        return next((check for check in self.checks.values() if owner in check.loans), None)

    def with_check(self, check: LentCheck) -> LendingDesk:
        return replace(self, checks={**self.checks, check.name: check})

    def without(self, name: str) -> LendingDesk:
        return replace(self, checks={key: check for key, check in self.checks.items() if key != name})

    def after_silence(self, owner: str, now: float) -> LendingDesk:
        """The desk when a loan of `owner` has ended without a report."""
        others = {key: entry for key, entry in self.unanswered.items() if key != owner}
        entry = self.unanswered.get(owner, (0, now))[0] + 1, now
        return replace(self, unanswered={**dict(list(others.items())[1 - _MOST_REMEMBERED :]), owner: entry})

    def after_report(self, owner: str) -> LendingDesk:
        """The desk when `owner` has reported."""
        return replace(self, unanswered={key: entry for key, entry in self.unanswered.items() if key != owner})

    def may_ask(self, owner: str, now: float) -> bool:
        """Whether the pause is over after the loans that it let go by."""
        count, since = self.unanswered.get(owner, (0, 0.0))
        return not count or now - since >= backoff(count, first=FORGIVEN_SECONDS, longest=LONGEST_PAUSE)


def loan_seconds_for(size: int, slowest: float, usual: float | None) -> float:
    """How long a loan is counted on.

    Args:
        size: bytes that the borrower fetches.
        slowest: bytes per second at which it must be able to.
        usual: seconds that such checks took so far; None: not known.
    """
    return _LEAST_LOAN + size / slowest + _TIMES_USUAL * (usual or 0.0)


def may_have(check: LentCheck, asker: Asker, now: float, free_known: frozenset[str] = frozenset()) -> bool:
    """Whether the check needs another peer, and this one is unlike its author and those that have it or have reported on it.

    Of those that check, one place is for a peer whose own work was accepted, as long as one of `free_known` may come for it.
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
        fit = [check for check in desk.checks.values() if may_have(check, asker, now, free_known)]
        check = min(fit, key=_rank, default=None)
        if check is None or not desk.may_ask(asker.owner, now):
            return desk, None
        if late := check.crowded_out(now):
            check = replace(check, loans={owner: loan for owner, loan in check.loans.items() if owner != late})
            desk = desk.after_silence(late, now)
        loan = CheckLoan(id_, now, now, now + check.seconds)
    known = check.known | {asker.owner} if asker.known else check.known
    origins = check.origins | {asker.origin} if asker.origin else check.origins
    check = replace(check, loans={**check.loans, asker.owner: loan}, known=known, origins=origins)
    return desk.with_check(check), check


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
    check, desk = replace(check, loans=loans, reports=(*check.reports, report)), desk.after_report(report.owner)
    outcome = Settled(report) if check.needed == 1 else settle(check.reports, check.fewest, check.known)
    if outcome:
        for owner in (owner for owner, loan in loans.items() if now >= loan.counts_until):
            desk = desk.after_silence(owner, now)
        return desk.without(check.name), check, outcome
    return desk.with_check(check), check, None


def end_check_loans(desk: LendingDesk, free: frozenset[str] | None, now: float, lease: float) -> LendingDesk:
    """Give back the loans of peers that are gone, do other work, or have not been heard of for long.

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
        for owner in check.loans.keys() - kept.keys():
            if now >= check.loans[owner].counts_until:
                desk = desk.after_silence(owner, now)
    return desk


def _ended(owner: str, loan: CheckLoan, free: frozenset[str] | None, now: float, lease: float) -> bool:
    silent = now - loan.heard
    return silent >= SILENT_SECONDS or (free is not None and owner not in free and silent >= lease)
