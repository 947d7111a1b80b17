"""Runs the judge: takes stimuli from a queue, writes what it decides to the ledger, then carries it out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from lutetia.coordinator.acceptance.audit_comparison import AuditFinding
from lutetia.coordinator.acceptance.checks import CheckFailed, CheckRunner, Limits, Replayed, Verdict, run_checks, run_transfer
from lutetia.coordinator.acceptance.intake.fetch_queue import key_of
from lutetia.coordinator.acceptance.intake.rate_limits import RateWindow
from lutetia.coordinator.acceptance.judge_isolation import author_of, judge_isolated
from lutetia.coordinator.acceptance.messages import (
    Action,
    Answer,
    Audited,
    CheckDone,
    DiscardCandidate,
    FetchDone,
    JudgeTick,
    KeepResult,
    LedgerFacts,
    LendAudit,
    LimitsKnown,
    Merged,
    Proved,
    Publish,
    PublishReset,
    StartAudit,
    StartCheck,
    StartFetch,
    StartMerge,
    StartProof,
    Stimulus,
    Write,
)
from lutetia.coordinator.acceptance.transition import FetchKey, JudgeRules, JudgeState
from lutetia.coordinator.ledger.describe import sentence
from lutetia.coordinator.ledger.events import (
    AuditDone,
    CheckpointAccepted,
    Event,
    LaneAccepted,
    LaneDropped,
    LanesMerged,
    LineageRolledBack,
    MergeRefused,
    PeerQuarantined,
    ResultDoubted,
    ResultRefused,
    ResultSuperseded,
)
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.ledger.run_state import PendingAudit, RunState
from lutetia.protocol.rpc.checkpoint_offer import OfferReply
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord, ResetRecord
from lutetia.system.errors import DiskError, plain

_log = logging.getLogger(__name__)

_AT_ONCE = 64
_FREEING = CheckpointAccepted | LanesMerged | LaneDropped | AuditDone | LineageRolledBack
"""After these, blobs of accepted results may be needed no more."""
TICK_SECONDS = 1.0

Reply = OfferReply | LendAudit | None
Waiting = asyncio.Future[Reply]


class CheckIO(CheckRunner, Protocol):
    """What the judge loop needs besides the checks themselves. `keep`, `discard` and `forget` block on the disk."""

    async def limits(self) -> Limits: ...

    async def replay(self, audit: StartAudit) -> Replayed: ...

    def forget(self, run: RunState) -> None: ...

    def still_whole(self, record: CheckpointRecord) -> Verdict | None: ...

    def keep(self, record: CheckpointRecord, of_lane: bool = False) -> None: ...

    def discard(self, record: CheckpointRecord, run: RunState) -> None: ...


@dataclass
class JudgeLoop:
    """The one place where the run's state changes.

    `state` is only what the ledger already holds on disk, so anything in it may be published at any time.

    Args:
        publish: sends an acceptance or a reset into the DHT.
        now: the coordinator's clock, in Unix seconds.
        changed: called after every change of the state.
        auditors: the peers whose node records say that they are free; None: not known.
        at_work: by shard the lanes at which nodes work; None: not known, or the run has no lanes.
        merge: makes a merged epoch, in a run with lanes. Raises CheckFailed.
        origin_of: the network origin of a peer, by public key; empty when it is not known.
    """

    rules: JudgeRules
    ledger: Ledger
    check_io: CheckIO
    publish: Callable[[AcceptanceRecord | ResetRecord], Awaitable[None]]
    now: Callable[[], float]
    changed: Callable[[RunState], None] = lambda state: None
    origin_of: Callable[[str], str] = lambda owner: ""
    auditors: Callable[[], frozenset[str] | None] = lambda: None
    at_work: Callable[[], Mapping[int, frozenset[int]] | None] = lambda: None
    merge: Callable[[StartMerge], Awaitable[CheckpointRecord]] | None = None
    state: JudgeState = field(init=False)
    _fetches: dict[FetchKey, asyncio.Task[None]] = field(init=False, default_factory=dict)
    _judging: asyncio.Lock = field(init=False, default_factory=asyncio.Lock)
    _inbox: asyncio.Queue[tuple[Stimulus, Waiting]] = field(init=False, default_factory=asyncio.Queue)
    _logged: RateWindow = field(init=False, default_factory=lambda: RateWindow(per_minute=1))

    def __post_init__(self) -> None:
        self.state = JudgeState.restored(self.ledger.state)

    async def submit(self, stimulus: Stimulus) -> Reply:
        """Have `stimulus` judged. The reply to an offer or to a request for an audit comes when its decisions are on disk."""
        future: Waiting = asyncio.get_running_loop().create_future()
        self._inbox.put_nowait((stimulus, future))
        return await future

    async def append(self, *events: Event) -> None:
        """Append events that happened outside of the judge to the ledger, in one transaction."""
        await self.submit(LedgerFacts(events, self.now()))

    async def while_idle(self, work: Callable[[RunState], None]) -> None:
        """Do `work`, which may block on the disk, with the run's state while nothing is judged."""
        async with self._judging:
            await asyncio.to_thread(work, self.state.run)

    async def restore(self) -> None:
        """Add all events of the ledger up again and judge from there on, as after a restart.

        Raises IntegrityError when the events since the start do not follow from those before.
        """
        async with self._judging:
            fetches = list(self._fetches.values())
            self._fetches.clear()
            for fetch in fetches:
                fetch.cancel()
            await asyncio.gather(*fetches, return_exceptions=True)
            state = await asyncio.to_thread(self.ledger.restore)
            self.state = replace(JudgeState.restored(state), limits=self.state.limits)
        self.changed(state)

    async def run(self) -> None:
        """Judge until cancelled. Raises DiskError when the ledger or a result cannot be written; nothing of it was published."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._tick())
            group.create_task(self._learn_limits())
            while True:
                batch = [await self._inbox.get()]
                while len(batch) < _AT_ONCE and not self._inbox.empty():
                    batch.append(self._inbox.get_nowait())
                async with self._judging:
                    await self._judge_batch(batch, group)

    async def _judge_batch(self, batch: Sequence[tuple[Stimulus, Waiting]], group: asyncio.TaskGroup) -> None:
        """Commit what arrives together in one write to the disk, however many acceptances it has."""
        state, actions = self.state, list[Action]()
        replies: list[tuple[Waiting, Reply]] = []
        for stimulus, waiting in batch:
            judged = judge_isolated(self.rules, state, stimulus)
            if judged.error:
                self._log_unjudged(stimulus, judged.error)
            state = judged.state
            actions += judged.actions
            replies.append((waiting, _reply_in(judged.actions)))
        await self._carry_out(state, actions, group)
        for waiting, reply in replies:
            if not waiting.done():
                waiting.set_result(reply)

    def _log_unjudged(self, stimulus: Stimulus, error: Exception) -> None:
        """Once a minute for each network origin: a peer must not fill the disk with one bad record sent again and again."""
        author = author_of(stimulus)
        if self._logged.wait(self.origin_of(author), self.now()) is None:
            name, reason = type(stimulus).__name__, plain(str(error))[:600]
            _log.error("could not judge %s of %s: %s", name, author[:8] or "nobody", reason, exc_info=error)

    async def _carry_out(self, state: JudgeState, actions: Sequence[Action], group: asyncio.TaskGroup) -> None:
        """Store blobs, then write the ledger, then show `state` (the outcome of `actions`) and publish: in this order."""
        for action in actions:
            if isinstance(action, Publish | KeepResult):
                await asyncio.to_thread(self.check_io.keep, action.record, isinstance(action, KeepResult))
        if events := [action.event for action in actions if isinstance(action, Write)]:
            await asyncio.to_thread(self.ledger.append, events)
            for event in events:
                _log_event(event)
        self.state = state
        if events:
            self.changed(state.run)
        for action in actions:
            match action:
                case Publish(acceptance=record) | PublishReset(record=record):
                    group.create_task(self._publish(record))
                case StartFetch():
                    self._fetches[key_of(action.record)] = group.create_task(self._fetch(action))
                case StartCheck():
                    group.create_task(self._check(action))
                case StartMerge():
                    group.create_task(self._merge(action))
                case StartAudit():
                    group.create_task(self._audit(action))
                case StartProof():
                    group.create_task(self._prove(action))
                case DiscardCandidate(record=record):
                    await self._end_fetch(record)
                    await asyncio.to_thread(self.check_io.discard, record, self.state.run)
        if any(isinstance(event, _FREEING) for event in events):
            await asyncio.to_thread(self.check_io.forget, self.state.run)

    async def _publish(self, record: AcceptanceRecord | ResetRecord) -> None:
        await self.publish(record)

    async def _fetch(self, fetch: StartFetch) -> None:
        """Handle unexpected errors as `_check` does."""
        record = fetch.record
        transfer = run_transfer(record, self.rules.manifest, self.check_io, time.monotonic, fetch.patience)
        [verdict] = await asyncio.gather(transfer, return_exceptions=True)
        if isinstance(verdict, BaseException):
            verdict = Verdict("inconclusive", "transfer", _unexpected(verdict, "transfer", record))
        self._fetches.pop(key_of(record), None)
        await self.submit(FetchDone(record, verdict, self.now()))

    async def _end_fetch(self, record: CheckpointRecord) -> None:
        if fetch := self._fetches.pop(key_of(record), None):
            fetch.cancel()
            await asyncio.gather(fetch, return_exceptions=True)

    async def _check(self, check: StartCheck) -> None:
        """An unexpected error is logged and makes the result inconclusive: no result of a peer may end the service."""
        checks = run_checks(check.record, check.parent, self.rules.manifest, self.check_io, time.monotonic)
        [verdict] = await asyncio.gather(checks, return_exceptions=True)
        if isinstance(verdict, Verdict) and verdict.outcome == "valid":
            verdict = await asyncio.to_thread(self.check_io.still_whole, check.record) or verdict
        if isinstance(verdict, BaseException):
            verdict = Verdict("inconclusive", "transfer", _unexpected(verdict, "check", check.record))
        await self.submit(CheckDone(check.record, verdict, self.now()))

    async def _merge(self, order: StartMerge) -> None:
        """Handle unexpected errors as `_check` does."""
        [done] = await asyncio.gather(self._merged(order), return_exceptions=True)
        if isinstance(done, BaseException):
            done = None, Verdict("inconclusive", "transfer", _unexpected(done, "merge", order))
        sources = tuple(source.acceptance.checkpoint for source in order.sources)
        await self.submit(Merged(order.shard, sources, *done, self.now()))

    async def _merged(self, order: StartMerge) -> tuple[CheckpointRecord | None, Verdict]:
        """The merged epoch, and the verdict of the checks that every result passes."""
        assert self.merge, "only a run with lanes has merges"
        try:
            record = await self.merge(order)
        except CheckFailed as failure:
            return None, failure.verdict
        lanes, clock = tuple(source.lane for source in order.sources), time.monotonic
        verdict = await run_checks(record, order.parent, self.rules.manifest, self.check_io, clock, lanes)
        if verdict.outcome == "valid":
            verdict = await asyncio.to_thread(self.check_io.still_whole, record) or verdict
        return record, verdict

    async def _prove(self, proof: StartProof) -> None:
        done = await self._replay(proof.replay)
        finding = done.finding
        if finding.outcome == "valid" and (gone := await asyncio.to_thread(self.check_io.still_whole, proof.record)):
            finding = AuditFinding(outcome="inconclusive", text=gone.text)
        await self.submit(Proved(proof.record, finding, self.now(), done.seconds))

    async def _replay(self, audit: StartAudit) -> Replayed:
        """Handle unexpected errors as `_check` does."""
        [done] = await asyncio.gather(self.check_io.replay(audit), return_exceptions=True)
        if isinstance(done, BaseException):
            return Replayed(AuditFinding(outcome="inconclusive", text=_unexpected(done, "replay", audit.audit)))
        return done

    async def _audit(self, audit: StartAudit) -> None:
        done, whole = await self._replay(audit), audit.audit.whole
        await self.submit(Audited(audit.audit.checkpoint, done.finding, self.now(), done.seconds, again=done.again, whole=whole))

    async def _learn_limits(self) -> None:
        await self.submit(LimitsKnown(await self.check_io.limits(), self.now()))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            await self.submit(JudgeTick(self.now(), self.auditors(), self.at_work()))


def _unexpected(error: BaseException, work: str, on: CheckpointRecord | PendingAudit | StartMerge) -> str:
    """The text for the ledger; the traceback goes into the log. Re-raises CancelledError and DiskError.

    A disk that takes no results ends the service, as one that takes no ledger does: nodes wait for a coordinator that is away,
    but give up on one that cannot check their results.
    """
    if not isinstance(error, Exception) or isinstance(error, DiskError):
        raise error
    author = "its lanes" if isinstance(on, StartMerge) else on.owner[:8]
    _log.error("the %s of shard %d epoch %d of %s failed", work, on.shard, on.epoch, author, exc_info=error)
    return f"the {work} failed unexpectedly ({type(error).__name__}: {plain(str(error))[:600]}); the coordinator's log says more"


def _reply_in(actions: Sequence[Action]) -> Reply:
    for action in actions:
        if isinstance(action, Answer):
            return action.reply
        if isinstance(action, LendAudit):
            return action
    return None


def _log_event(event: Event) -> None:
    match event:
        case CheckpointAccepted(acceptance=given):
            loss, before = given.holdout_loss, event.parent_loss
            _log.info(
                "shard %d epoch %d accepted from %s: %.4f after %.4f", given.shard, given.epoch, given.author[:8], loss, before
            )
        case LaneAccepted() | LanesMerged() | LaneDropped():
            _log.info("%s", sentence(event))
        case MergeRefused():
            _log.warning("%s", sentence(event))
        case ResultRefused():
            facts = (event.shard, event.epoch, event.owner[:8], event.verdict, event.check, event.text)
            _log.info("shard %d epoch %d of %s is %s at check %s: %s", *facts)
        case ResultDoubted():
            facts = (event.shard, event.epoch, event.owner[:8], event.check, event.text)
            _log.warning("shard %d epoch %d of %s fails check %s; its whole epoch is replayed: %s", *facts)
        case ResultSuperseded():
            _log.info("shard %d epoch %d of %s is superseded", event.shard, event.epoch, event.owner[:8])
        case AuditDone():
            facts = (event.shard, event.epoch, event.owner[:8], event.outcome, event.text)
            _log.info("audit of shard %d epoch %d of %s: %s, %s", *facts)
        case PeerQuarantined():
            _log.warning("peer %s is quarantined: %s", event.owner, event.text)
        case LineageRolledBack():
            _log.warning("shard %d is rolled back to epoch %d; %d epochs are void", event.shard, event.epoch, event.dropped)
        case _:
            _log.debug("%s", event.kind)
