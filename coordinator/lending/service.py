"""Lends checks to nodes: answers the check stream, serves borrowers the blobs of their check, and writes liars to the ledger."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from lutetia.coordinator.acceptance.intake.rate_limits import RateWindow
from lutetia.coordinator.credit.lent import counted
from lutetia.coordinator.ledger.events import CheckerRefuted, Event
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.lending.agreement import NEEDED, Settled
from lutetia.coordinator.lending.loans import (
    Asker,
    LendingDesk,
    LentCheck,
    end_check_loans,
    lend_check,
    take_report,
)
from lutetia.coordinator.lending.reports import well_formed
from lutetia.coordinator.runtime.audit_service import relatives
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.rpc.check_request import CheckAnswer, CheckJob, CheckReport, CheckRequest, serve_checks
from lutetia.protocol.schema.identity import public_key_of
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.records import NodeRecord, RecordRefused
from lutetia.protocol.transport.base import Stream, Transport

_log = logging.getLogger(__name__)

_TICK_SECONDS = 1.0
_ASK_AGAIN = 15.0
_NEVER = 3600.0
_WARN_SECONDS = 60.0


@dataclass
class _Waiting:
    """A check on the desk: what borrowers are told, which blobs they may fetch, and who waits for the outcome."""

    job: CheckJob
    lends: Mapping[str, BlobStore]
    outcome: asyncio.Future[Settled]
    fastest: float = math.inf
    """Seconds that the quickest borrower took, by the coordinator's clock: who is slow on purpose must not make loans longer."""


@dataclass
class CheckLender:
    """Has checks carried out by nodes that stand by.

    Args:
        transport: serves the stream.
        manifest: the newest one.
        run: the ledger's state.
        peers: the node records that the DHT has now.
        free: the peers whose records say that they are free; None: not known.
        append: writes events to the ledger.
        checkers: the only nodes that are asked, by public key; empty: any node of the run.
        pace: bounds how often one address asks.
    """

    transport: Transport
    manifest: Callable[[], Manifest]
    run: Callable[[], RunState]
    peers: Callable[[], list[NodeRecord]]
    free: Callable[[], frozenset[str] | None]
    append: Callable[[Event], Awaitable[None]]
    checkers: frozenset[str] = frozenset()
    pace: RateWindow = field(default_factory=lambda: RateWindow(120))
    desk: LendingDesk = field(default_factory=LendingDesk)
    usual: dict[str, float] = field(default_factory=dict)
    """Seconds that checks of each kind took lately."""
    _waiting: dict[str, _Waiting] = field(default_factory=dict)
    _warned: float = float("-inf")

    @property
    def named(self) -> bool:
        """Whether the run's owner has named those that check."""
        return bool(self.checkers)

    async def serve(self) -> None:
        await serve_checks(self.transport, self._answer, self._admit)

    async def ask(self, check: LentCheck, job: CheckJob, lends: Mapping[str, BlobStore]) -> Settled:
        """Have `check` carried out, however long that takes. Cancel it to take it back from its borrowers.

        Args:
            check: its rules.
            job: what a borrower is told; `id` and `until` are filled in for each.
            lends: the blobs that its borrowers may fetch besides those that are served to all, with their stores.
        """
        outcome: asyncio.Future[Settled] = asyncio.get_running_loop().create_future()
        self._waiting[check.name] = _Waiting(job, lends, outcome)
        self.desk = self.desk.with_check(check)
        try:
            return await outcome
        finally:
            self.desk = self.desk.without(check.name)
            self._waiting.pop(check.name, None)

    def excluded(self, author: str) -> frozenset[str]:
        """The peers that must not check the work of `author`: itself, its operator's and those at its address."""
        return relatives(author, self.peers()) | {author}

    def lent_store(self, peer_id: str, digest: str) -> BlobStore | None:
        """The store of a blob that this peer may fetch because of the check that it has; None: it may not."""
        owner = public_key_of(peer_id)
        check = self.desk.held_by(owner) if owner else None
        waiting = self._waiting.get(check.name) if check else None
        return waiting.lends.get(digest) if waiting else None

    async def watch(self) -> None:
        """End the loans of peers that are gone, and say what waits, until cancelled."""
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            now = self.transport.now()
            self.desk = end_check_loans(self.desk, self.free(), now, self.manifest().timing.lease)
            waiting = self.held_up(now)
            if waiting and now - self._warned >= _WARN_SECONDS:
                self._warned = now
                for shard, why in sorted(waiting.items()):
                    _log.warning("%s: %s", "router" if shard < 0 else f"shard {shard}", why)

    def held_up(self, now: float) -> dict[int, str]:
        """By shard (-1: the router): what its checks have waited for longer than a lease, in a clause."""
        found: dict[int, str] = {}
        for check in sorted(self.desk.checks.values(), key=lambda check: check.since, reverse=True):
            if check.missing(now) > 0 and now - check.since > self.manifest().timing.lease:
                who = "another node that the setting checkers names" if self.checkers else "a node of another operator"
                apart = ", which contradict each other," if len(check.reports) >= NEEDED else ""
                have = f"{len(check.reports)} reports{apart} and {len(check.loans)} borrowers"
                cure = "; name more there, and start the coordinator again" if self.checkers else ""
                text = f"a check ({check.kind}) has waited {now - check.since:.0f} s for {who}; it has {have}{cure}"
                found[-1 if check.shard is None else check.shard] = text
        return found

    # --- the stream ---------------------------------------------------------------------------------------------------------

    def _admit(self, stream: Stream) -> CheckAnswer | None:
        if wait := self.pace.wait(stream.origin, self.transport.now()):
            return CheckAnswer(retry_after=wait, text="too many requests for checks from this address")
        return None

    async def _answer(self, request: CheckRequest, origin: str) -> CheckAnswer:
        if why := self._barred(request.owner):
            return CheckAnswer(retry_after=_NEVER, text=why)
        if request.report is not None:
            await self._take(request.report)
            return CheckAnswer()
        now = self.transport.now()
        run, owner = self.run(), request.owner
        known = run.has_accepted_work(owner) or owner in self.checkers
        related = relatives(owner, self.peers())
        kinds, shards = frozenset(request.kinds), frozenset(request.shards)
        asker = Asker(owner, kinds, shards, related, known, public_origin(origin), shared_origin(origin))
        free_known = frozenset(filter(run.has_accepted_work, self.free() or ()))
        self.desk, check = lend_check(self.desk, asker, secrets.token_hex(32), now, free_known)
        if check is None:
            return CheckAnswer(retry_after=_ASK_AGAIN)
        loan, waiting = check.loans[request.owner], self._waiting[check.name]
        return CheckAnswer(job=waiting.job.model_copy(update={"id": loan.id, "until": now + check.seconds}))

    def _barred(self, owner: str) -> str:
        run, allowed = self.run(), self.manifest().allowlist
        if banned := self.manifest().orders.refusal_of(owner):
            return banned
        if self.checkers and owner not in self.checkers:
            return "the run's owner has named others to check"
        if owner in run.quarantined or (allowed is not None and owner not in allowed):
            return "this peer may not take part"
        if owner in run.refuted_checkers:
            return "a report of this peer contradicts those of two others; ask the run's operator"
        return ""

    async def _take(self, report: CheckReport) -> None:
        if report.run != self.manifest().run_id:
            raise RecordRefused(f"the report is of run {report.run[:12]}, not of {self.manifest().run_id[:12]}")
        held = self.desk.held_by(report.owner)
        if held is None or held.loans[report.owner].id != report.id:
            raise RecordRefused("no check of that id is lent to this peer")
        waiting = self._waiting[held.name]
        if why := well_formed(waiting.job, report, held.fewest):
            _log.warning("the report of %s on a check (%s) does not answer it: %s", report.owner[:8], held.kind, why)
            report = report.model_copy(update={"outcome": "failed"})
        now = self.transport.now()
        self.desk, check, settled = take_report(self.desk, report, now)
        if report.outcome == "failed":
            _log.info("%s could not carry out a check (%s): %s", report.owner[:8], held.kind, report.text)
        elif check:
            waiting.fastest = min(waiting.fastest, now - held.loans[report.owner].began)
        if check and settled:
            self.usual[held.kind] = (self.usual.get(held.kind, waiting.fastest) + waiting.fastest) / 2
            for liar in sorted(settled.liars):
                await self.append(_refuted(check, liar, waiting.job.epoch, now))
            batch = self.manifest().optimisation.batch
            if event := counted(waiting.job, check.reports, check.known, settled, batch, now):
                await self.append(event)
            if not waiting.outcome.done():
                waiting.outcome.set_result(settled)


def _refuted(check: LentCheck, owner: str, epoch: int, now: float) -> CheckerRefuted:
    others = len(check.reports) - 1
    text = f"its report on a check ({check.kind}) contradicts those of two of {others} others that agree"
    return CheckerRefuted(time=now, owner=owner, check=check.kind, shard=check.shard or 0, epoch=epoch, text=text)


def public_origin(origin: str) -> str:
    """`origin` if it is an address of the internet; those of private networks and of one machine tell nobody apart."""
    try:
        return origin if ipaddress.ip_address(origin.partition("/")[0]).is_global else ""
    except ValueError:
        return ""


def shared_origin(origin: str) -> str:
    """Whose record a key without accepted work shares: its origin's, or that of all relayed peers; nobody's on one machine."""
    try:
        return "" if ipaddress.ip_network(origin).is_loopback else origin
    except ValueError:
        return origin or "relay"
