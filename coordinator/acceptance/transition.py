"""The judge's rules and state, and one call of the judge in progress."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypedDict, Unpack

from lutetia.coordinator.acceptance.checks import Limits, Verdict
from lutetia.coordinator.acceptance.intake.newcomer_holds import NEWCOMER_EPOCHS
from lutetia.coordinator.acceptance.messages import Action, Proved, Write
from lutetia.coordinator.ledger.events import CheckCost, Event, ResultRefused, ResultSuperseded
from lutetia.coordinator.ledger.persistent_map import PersistentMap
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.run_state import RunState, ShardLedger
from lutetia.protocol.rpc.checkpoint_offer import OfferReply
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord
from lutetia.system.retry import backoff

_LONGEST_RETRY = 3600.0

FetchKey = tuple[int, str, str]
"""(shard, owner, digest) of a candidate."""


class Loan(NamedTuple):
    """An audit that a peer carries out. Times are Unix seconds."""

    owner: str
    """Public key of the peer."""
    until: float
    """When the coordinator carries it out itself."""
    heard: float
    """When the peer last asked for it."""


class RunningMerge(NamedTuple):
    """A merge of one shard that is being made, or that is made again at `again_at` (Unix seconds)."""

    sources: tuple[str, ...]
    """Digests of the merged results, by lane; empty: none is being made."""
    attempts: int = 0
    again_at: float = 0.0
    alone: bool = False
    """Their merge failed a check: the best result goes on alone."""


@dataclass(frozen=True)
class JudgeRules:
    """What does not change while the service runs under one manifest. Times are seconds."""

    manifest: Manifest
    coordinator: str
    """Public key of this coordinator."""
    secret: bytes
    """Makes the audit lottery unpredictable to peers."""
    offers_per_minute: int = 30
    """Offers and audit requests of one peer."""
    candidates_per_shard: int = 16
    """Undecided results of one shard."""
    fetches_at_once: int = 64
    """Results that are fetched at the same time."""
    fetches_per_shard: int = 16
    """Results of one shard that are fetched at the same time, until the first has arrived."""
    checks_at_once: int = 4
    """Results under check at the same time, at most one per shard."""
    attempts: int = 4
    """How often an inconclusive result is checked before it is given up."""
    retry_delay: float = 5.0
    """Delay before the second check; it doubles every time."""
    audit_attempts: int = 6
    """How often an inconclusive audit is tried before it is given up."""
    audit_delay: float = 10.0
    """Delay before the second audit; it doubles every time."""
    audit_wait: float = 60.0
    """While peers ask for audits, an audit waits this long for one of them; then the coordinator carries it out itself."""
    audit_loan: float = 600.0
    """How long a peer has for an audit that it was lent, or is silent; up to six times as long for a whole epoch."""
    newcomer_epochs: int = NEWCOMER_EPOCHS
    """So many epochs of each author are replayed whole before its audits follow the lottery."""
    asks_per_second: float = 5.0
    """Audit requests of all peers together: the more peers stand by, the longer each is told to wait."""

    def retry_after(self, attempts: int) -> float:
        """Seconds until a result is checked again after `attempts` checks without a verdict (0: the first delay)."""
        return backoff(attempts + 1, first=self.retry_delay, longest=_LONGEST_RETRY)


@dataclass(frozen=True)
class JudgeState:
    """The run's state, and what a restart may lose without harm."""

    run: RunState
    limits: Limits | None = None
    pending: frozenset[int] = frozenset()
    """Shards that have candidates."""
    fetching: frozenset[FetchKey] = frozenset()
    """Candidates whose blobs are on their way."""
    fetched: Mapping[FetchKey, tuple[CheckCost, ...]] = field(default_factory=dict)
    """Candidates whose blobs have all arrived, with what that cost; they wait for their checks or are under check."""
    held: Mapping[FetchKey, Verdict] = field(default_factory=dict)
    """Candidates that passed their checks and wait for the audit of an epoch below them (`intake.newcomer_holds`)."""
    origins: PersistentMap[str, str] = field(default_factory=PersistentMap)
    """Peer -> network origin of its last offer."""
    failures: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    """Source or owner -> (fetches and checks that failed one after the other, when the last one did)."""
    checking: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    """Slot (without lanes: shard) -> (owner, digest) of the candidate under check."""
    merging: Mapping[int, RunningMerge] = field(default_factory=dict)
    """Shard -> the merge of its lanes that is under way, or was."""
    at_work: Mapping[int, frozenset[int]] | None = None
    """Shard -> the lanes that are claimed; None: not known."""
    offers: PersistentMap[str, tuple[float, ...]] = field(default_factory=PersistentMap)
    """Peer -> times of its offers within the last minute."""
    auditing: str | None = None
    """Checkpoint of the audit that the coordinator itself carries out."""
    proving: tuple[str, str] | None = None
    """(owner, digest) of the doubted result whose epoch the coordinator replays."""
    proving_parent: str | None = None
    """Checkpoint of the audit that the coordinator carries out besides, since a proof waits for it."""
    proved: Mapping[FetchKey, Proved] = field(default_factory=dict)
    """Doubted results whose replay has ended, and that wait for audits of the epochs below."""
    lent: Mapping[str, Loan] = field(default_factory=dict)
    """Checkpoint -> who audits it, also once the loan has ended: no audit is lent twice."""
    asked: float = float("-inf")
    """When a peer last asked for an audit."""

    @classmethod
    def restored(cls, run: RunState) -> JudgeState:
        """After a restart every candidate without a final verdict is checked again, and every due audit is carried out."""
        return cls(run, pending=frozenset(index for index, shard in run.shards.items() if shard.candidates))


class JudgeChanges(TypedDict, total=False):
    """New values for fields of JudgeState."""

    run: RunState
    limits: Limits | None
    pending: frozenset[int]
    fetching: frozenset[FetchKey]
    fetched: Mapping[FetchKey, tuple[CheckCost, ...]]
    held: Mapping[FetchKey, Verdict]
    origins: PersistentMap[str, str]
    failures: Mapping[str, tuple[int, float]]
    checking: Mapping[int, tuple[str, str]]
    merging: Mapping[int, RunningMerge]
    at_work: Mapping[int, frozenset[int]] | None
    offers: PersistentMap[str, tuple[float, ...]]
    auditing: str | None
    proving: tuple[str, str] | None
    proving_parent: str | None
    proved: Mapping[FetchKey, Proved]
    lent: Mapping[str, Loan]
    asked: float


def released(state: JudgeState, checkpoint: str) -> JudgeChanges:
    """The coordinator's own replay of this audit has ended."""
    changes: JudgeChanges = {}
    if state.auditing == checkpoint:
        changes["auditing"] = None
    if state.proving_parent == checkpoint:
        changes["proving_parent"] = None
    return changes


class JudgeTransition:
    """One call of `judge`: the state so far, and the actions that follow from it."""

    def __init__(self, rules: JudgeRules, state: JudgeState, now: float) -> None:
        self.rules, self.state, self.now = rules, state, now
        self.actions: list[Action] = []

    @property
    def run(self) -> RunState:
        return self.state.run

    def set(self, **changes: Unpack[JudgeChanges]) -> None:
        self.state = replace(self.state, **changes)

    def write(self, event: Event) -> None:
        """Add `event` to the run's state and to the ledger."""
        self.set(run=apply(self.run, event))
        self.actions.append(Write(event))

    def tidy(self, shard: int) -> None:
        """Remove a shard without candidates from `pending`."""
        if not self.run.shards[shard].candidates:
            self.set(pending=self.state.pending - {shard})


def refusal(record: CheckpointRecord, verdict: Verdict, now: float, again_at: float | None = None) -> ResultRefused:
    """The event of a verdict that is not `valid`."""
    assert verdict.outcome != "valid"
    return ResultRefused(
        time=now, shard=record.shard, epoch=record.epoch, owner=record.owner, checkpoint=record.digest,
        verdict=verdict.outcome, check=verdict.check, text=verdict.text[:1000], again_at=again_at, costs=verdict.costs,
    )  # fmt: skip


def earlier_reply(run: RunState, shard: ShardLedger, record: CheckpointRecord) -> OfferReply | None:
    """The reply to a result that is decided or waiting already; None for a new one."""
    digest = record.digest
    gathered = shard.gathered.get(record.lane)
    if gathered and record.epoch == shard.epoch + 1 and record.parent == shard.accepted:
        if gathered.acceptance.checkpoint == digest:
            return OfferReply(verdict="gathered", text=f"it is the result of lane {record.lane} and waits for the merge")
        text = f"another result of lane {record.lane} of shard {record.shard} was accepted first; wait for the merge"
        return OfferReply(verdict="superseded", text=text)
    if run.peer(record.owner).checkpoint == digest and (link := shard.link(digest)) and not link.acceptance.lanes:
        return OfferReply(verdict="accepted")
    if shard.term and record.epoch > shard.epoch and (record.epoch > shard.epoch + 1 or record.parent != shard.accepted):
        text = f"shard {record.shard} was rolled back to epoch {shard.epoch}; sync it and go on from there"
        return OfferReply(verdict="superseded", text=text)
    if record.epoch <= shard.epoch:
        part = shard.link(digest)
        if part and part.acceptance.lanes and part.acceptance.author == record.owner:
            return OfferReply(verdict="gathered", text=f"it is a part of epoch {record.epoch} of shard {record.shard}")
        merged = shard.acceptance is not None and shard.acceptance.lanes
        how = "merged before this result was there, which costs its author nothing" if merged else "accepted from another result"
        text = f"epoch {shard.epoch} of shard {record.shard} was {how}; sync it and go on from there"
        return OfferReply(verdict="superseded", text=text)
    if (record.owner, digest) in shard.candidates:
        return OfferReply(verdict="queued")
    match shard.judged.get((record.owner, digest)):
        case ResultRefused() as refusal:
            return OfferReply(verdict=refusal.verdict, check=refusal.check, text=refusal.text)
        case ResultSuperseded():
            return OfferReply(verdict="superseded")
    return None


def acceptance_of(
    rules: JudgeRules, record: CheckpointRecord, term: int, loss: float, now: float, lanes: tuple[int, ...] = ()
) -> AcceptanceRecord:
    """The acceptance of a result that has passed its checks; `lanes`: those of the run's team from which it is."""
    return AcceptanceRecord(
        run=record.run, owner=rules.coordinator, issued=now, shard=record.shard, epoch=record.epoch, checkpoint=record.digest,
        parent=record.parent, weights=record.weights, state=record.state, samples=record.samples, author=record.owner,
        tenure_until=now + rules.manifest.timing.tenure, holdout_loss=loss, term=term, lanes=lanes,
    )  # fmt: skip
