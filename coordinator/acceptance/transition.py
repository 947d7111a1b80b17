"""What the judge rules by and remembers, and one call of it in progress."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

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
    """What does not change while the service runs. `secret` makes audits unforeseeable.

    `audit_attempts`: how often an audit without outcome is tried before it is given up; `audit_delay` seconds double every time.
    While peers ask for audits, one waits `audit_wait` seconds for a taker, who has `audit_loan` seconds for it (six times as
    long for a whole epoch); then the coordinator carries it out itself. However many peers stand by, they are told to ask no
    oftener than `asks_per_second` in all.
    """

    manifest: Manifest
    coordinator: str
    secret: bytes
    offers_per_minute: int = 30
    candidates_per_shard: int = 16
    checks_at_once: int = 4
    attempts: int = 4
    retry_delay: float = 5.0
    audit_attempts: int = 6
    audit_delay: float = 10.0
    audit_wait: float = 60.0
    audit_loan: float = 600.0
    asks_per_second: float = 5.0

    def retry_after(self, attempts: int) -> float:
        """Seconds until a result is checked again after `attempts` checks without a verdict (0: the first delay)."""
        return backoff(attempts + 1, first=self.retry_delay, longest=_LONGEST_RETRY)


@dataclass(frozen=True)
class JudgeState:
    """The run, and what is lost at a restart without harm.

    `pending`: shards with candidates; `checking`: shards under check; `auditing`: the audit that the coordinator carries out;
    `lent`: audits that peers carry out, as (public key, until when); `asked`: when a peer last asked for one.
    """

    run: RunState
    limits: Limits | None = None
    pending: frozenset[int] = frozenset()
    checking: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    offers: PersistentMap[str, tuple[float, ...]] = field(default_factory=PersistentMap)
    auditing: str | None = None
    lent: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    asked: float = float("-inf")

    @classmethod
    def restored(cls, run: RunState) -> JudgeState:
        """After a restart every candidate that had no final verdict is judged again, and every due audit is carried out."""
        return cls(run, pending=frozenset(index for index, shard in run.shards.items() if shard.candidates))


class JudgeTransition:
    """One call of `judge`: collects events and actions."""

    def __init__(self, rules: JudgeRules, state: JudgeState, now: float) -> None:
        self.rules, self.state, self.now = rules, state, now
        self.actions: list[Action] = []

    @property
    def run(self) -> RunState:
        return self.state.run

    def write(self, event: Event) -> None:
        self.state = replace(self.state, run=apply(self.state.run, event))
        self.actions.append(Write(event))

    def tidy(self, shard: int) -> None:
        """`pending` names the shards that have candidates."""
        if not self.run.shards[shard].candidates:
            self.state = replace(self.state, pending=self.state.pending - {shard})


def refusal(record: CheckpointRecord, verdict: Verdict, now: float, again_at: float | None = None) -> ResultRefused:
    """The event that says it."""
    assert verdict.outcome != "valid"
    return ResultRefused(
        time=now, shard=record.shard, epoch=record.epoch, owner=record.owner, checkpoint=record.digest,
        verdict=verdict.outcome, rung=verdict.rung, text=verdict.text[:1000], again_at=again_at, costs=verdict.costs,
    )  # fmt: skip
