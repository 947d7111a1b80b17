"""What a node remembers between events: its rules, its work, and when it must act next. All of it immutable."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from lutetia.node.machine.messages import Claim, OwnCheckpoint
from lutetia.protocol.claims import ShardView, Stand, rendezvous
from lutetia.protocol.schema.manifest import Manifest, lease_seconds
from lutetia.protocol.schema.records import NodeState
from lutetia.protocol.stalled_claims import Seen
from lutetia.system.retry import backoff

Immutable = TypeVar("Immutable")

CROWD = 10_000
"""Standbys of one shard up to which a takeover stays cheap (see `takeover_delay`)."""


def evolve(old: Immutable, **changes: Any) -> Immutable:
    """`dataclasses.replace` for dataclasses without `__post_init__`, several times faster; unknown fields are refused."""
    if not changes.keys() <= old.__dict__.keys():
        raise TypeError(f"{type(old).__name__} has no {sorted(changes.keys() - old.__dict__.keys())}")
    new = object.__new__(type(old))
    new.__dict__.update(old.__dict__)
    new.__dict__.update(changes)
    return new


@dataclass(frozen=True)
class NodeRules:
    """The run's constants as one node needs them. Times in seconds."""

    run: str
    owner: str
    shards: int
    epochs: int
    heartbeat: float
    propagation: float
    patience: float = 60.0
    """How long a leaving node waits for the verdict on its last checkpoint."""
    hang_after: float = 300.0
    """Silence after which a trainer that has begun counts as hung."""
    start_within: float = 300.0
    """How long a trainer may take to begin: it imports its libraries first."""
    stuck_after: float = 300.0
    """Full disk after which the lease is let go."""
    probe_again: float = 300.0
    max_pending: int = 3
    """Own checkpoints that may wait for acceptance before the trainer waits too."""
    crash_limit: int = 6
    rejection_limit: int = 2
    unjudged_limit: int = 3
    longest_backoff: float = 60.0
    tenure: float = 600.0
    interval: int = 1
    """Samples of an epoch."""

    @classmethod
    def of(cls, manifest: Manifest, owner: str) -> NodeRules:
        """Propagation delay: a twentieth of the heartbeat, between 0.25 s (loopback) and 2 s."""
        heartbeat = manifest.timing.heartbeat
        return cls(
            run=manifest.run_id, owner=owner, shards=len(manifest.shards), epochs=manifest.epochs,
            heartbeat=heartbeat, propagation=min(2.0, max(0.25, heartbeat / 20)),
            tenure=max(manifest.timing.tenure, manifest.timing.lease), interval=manifest.checkpoint_samples,
        )  # fmt: skip

    @property
    def lease(self) -> float:
        return lease_seconds(self.heartbeat)

    def jitter(self, *words: object) -> float:
        """A number in [0, 1) that depends on this node and on `words` only."""
        text = "|".join((self.run, self.owner, *map(str, words)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64

    def backoff(self, attempt: int, *words: object) -> float:
        """1, 2, 4, … s capped, plus up to a quarter of jitter so that peers spread."""
        return backoff(attempt, longest=self.longest_backoff, jitter=self.jitter("backoff", attempt, *words))

    def takeover_delay(self, shard: int, epoch: int) -> float:
        """How long this node waits before it claims a free shard.

        Exponential feedback (Nonnenmacher and Biersack 1998): the lowest rendezvous hash goes first, and of up to CROWD
        standbys only about sqrt(CROWD) claim before the first claim can be seen, without anybody knowing their number.
        """
        share = (rendezvous(self.run, shard, epoch, self.owner) + 1) / 2**64
        return 2 * self.propagation * max(0.0, 1 + math.log(share) / math.log(CROWD))


@dataclass(frozen=True)
class ShardWork:
    """One shard in our hands. `epoch` and `checkpoint` are the accepted state that we stand on, in term `term` of the shard."""

    shard: int
    epoch: int
    checkpoint: str | None
    term: int = 0
    pending: tuple[OwnCheckpoint, ...] = ()
    owned: bool = True
    checking: bool = False
    """Our lease may have lapsed: look before renewing it."""
    trainer: Literal["off", "on"] = "off"
    at: int = 0
    """The epoch on top of which the trainer works."""
    samples: int = 0
    until: int = 0
    drain: int | None = None
    """Where the trainer is to end when the node is to leave."""
    relay: int | None = None
    """Where the trainer, begun under an older manifest, hands over to one that reads the new: no epoch is trained by two."""
    waiting: bool = False
    progress_at: float = 0.0
    started_at: float = 0.0
    restart_at: float = 0.0
    crashes: int = 0
    failure: str | None = None
    """Why the last trainer ended before its time; None while one is at work, and when it ended as it was to."""
    shrink: int = 0
    sync_failures: int = 0
    sync_at: float | None = None
    offering: str | None = None
    offer_at: float = 0.0
    offers: int = 0
    unjudged: int = 0
    """How often the coordinator gave up judging the oldest pending result, of which nothing is known against it."""

    @property
    def stand(self) -> Stand:
        return self.term, self.epoch, self.checkpoint

    @property
    def newest(self) -> int:
        """The newest epoch of ours that is whole on disk."""
        return self.pending[-1].epoch if self.pending else self.epoch

    def most(self, rules: NodeRules) -> int:
        """The epoch below which a trainer may work: the budget, and not too far ahead of what is accepted."""
        return min(rules.epochs, self.epoch + rules.max_pending)

    def may_train(self, rules: NodeRules) -> bool:
        return self.newest < self.most(rules)

    @property
    def cut_short(self) -> bool:
        """Whether a trainer failed in the epoch that a leaving node was to finish."""
        return self.failure is not None and self.drain is not None and self.newest < self.drain

    @property
    def begun(self) -> bool:
        """Whether the trainer has said anything since it was started."""
        return self.progress_at > self.started_at

    def silent_from(self, rules: NodeRules) -> float:
        """When the trainer counts as hung if it says nothing until then."""
        return self.progress_at + (rules.hang_after if self.begun else max(rules.hang_after, rules.start_within))

    def claim(self, draining: bool) -> Claim:
        return Claim(self.shard, self.epoch, self.samples, "draining" if draining else "training")


Stage = Literal["delay", "check", "settle", "judge"]


@dataclass(frozen=True)
class MachineState:
    """Everything a node decides by."""

    last: float = 0.0
    """When the last event came: a long gap means that the box slept."""
    phase: NodeState = "joining"
    why: str = "joining the network"
    since: float = 0.0
    wanted: Literal["run", "pause", "finish", "leave"] = "run"
    online: bool = False
    fitness: Mapping[int, float] = field(default_factory=dict)
    remembered: frozenset[int] = frozenset()
    """Shards of which this box still holds local work."""
    views: Mapping[int, ShardView] = field(default_factory=dict)
    looked: Mapping[int, float] = field(default_factory=dict)
    watched: Mapping[int, Seen] = field(default_factory=dict)
    """What we have seen of the claims of others: those that hold a shard without working on it are passed over."""
    duty: frozenset[int] | None = None
    """The shards that we look after while we stand by, until `duty_until`; None: all of them."""
    duty_until: float = 0.0
    shunned: Mapping[int, float] = field(default_factory=dict)
    rejections: Mapping[int, int] = field(default_factory=dict)
    overtaken: Mapping[int, int] = field(default_factory=dict)
    """How often in a row others' work on a shard that we hold was accepted instead of ours."""
    work: ShardWork | None = None
    target: int | None = None
    stage: Stage = "delay"
    judged: int = 0
    act_at: float = 0.0
    look_at: float = 0.0
    to_look: tuple[int, ...] = ()
    """The shards of a sweep that are still to be looked at (see `choosing.WAVE`)."""
    renew_at: float = 0.0
    renewed_at: float = 0.0
    probe_at: float | None = None
    probe_failures: int = 0
    pause_until: float | None = None
    closed_until: float | None = None
    """When the volunteer's hours begin again; None: they are now, or the volunteer said to go on all the same."""
    drain_until: float | None = None
    trainers: int = 0
    """Trainers started so far: messages of earlier ones are stale."""
    disk_full_since: float | None = None
    disk_freed: tuple[float, float] | None = None
    """When the disk was last full from, and until: what is full again soon after was full all the time."""


def wants_trainer(rules: NodeRules, state: MachineState, work: ShardWork) -> bool:
    """Whether a trainer is to be started at `restart_at`: on a leaving node only in the place of one that failed half-way."""
    if work.trainer == "on" or state.disk_full_since is not None or not work.may_train(rules):
        return False
    return state.phase == "training" or (state.phase == "draining" and work.owned and work.cut_short)


def next_wake(rules: NodeRules, state: MachineState) -> float | None:
    """When the machine wants its next Tick (Unix seconds); None: only on other events."""
    if state.phase in ("joining", "left"):
        return None
    times = [state.renew_at]
    if state.probe_at is not None:
        times.append(state.probe_at)
    if state.pause_until is not None:
        times.append(state.pause_until)
    if state.drain_until is not None:
        times.append(state.drain_until)
    if state.phase == "idle" and state.online:
        times.append(state.look_at)
    elif state.phase == "claiming":
        times.append(state.act_at)
    if state.work:
        times += _work_times(rules, state, state.work)
    return min(times, default=None)


def _work_times(rules: NodeRules, state: MachineState, work: ShardWork) -> list[float]:
    times = []
    if state.phase == "syncing" and work.sync_at is not None:
        times.append(work.sync_at)
    if wants_trainer(rules, state, work):
        times.append(work.restart_at)
    if work.trainer == "on" and not work.waiting and state.disk_full_since is None:
        times.append(work.silent_from(rules))
    if work.pending and work.offering is None and state.online:
        times.append(work.offer_at)
    return times
