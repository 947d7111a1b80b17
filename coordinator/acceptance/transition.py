"""The judge's rules and state, and one call of the judge in progress."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypedDict, Unpack

from lutetia.coordinator.acceptance.checks import Limits, Verdict
from lutetia.coordinator.acceptance.messages import Action, Write
from lutetia.coordinator.ledger.events import Event, ResultRefused
from lutetia.coordinator.ledger.persistent_map import PersistentMap
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.records import CheckpointRecord
from lutetia.system.retry import backoff

_LONGEST_RETRY = 3600.0


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
    """How long a peer has for an audit that it was lent; six times as long for a whole epoch."""
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
    checking: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    """Shard -> (owner, digest) of the candidate under check."""
    offers: PersistentMap[str, tuple[float, ...]] = field(default_factory=PersistentMap)
    """Peer -> times of its offers within the last minute."""
    auditing: str | None = None
    """Checkpoint of the audit that the coordinator itself carries out."""
    proving: tuple[str, str] | None = None
    """(owner, digest) of the doubted result whose epoch the coordinator replays."""
    lent: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    """Checkpoint -> (public key of the peer that audits it, until when)."""
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
    checking: Mapping[int, tuple[str, str]]
    offers: PersistentMap[str, tuple[float, ...]]
    auditing: str | None
    proving: tuple[str, str] | None
    lent: Mapping[str, tuple[str, float]]
    asked: float


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
