"""The state of the node's machine: its rules, its work, and when it must act next. All of it immutable."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from lutetia.node.machine.messages import Claim, OwnCheckpoint
from lutetia.protocol.claims import ShardView, Stand, lane_fitness, rendezvous, shard_and_lane, slot_of, slots_of
from lutetia.protocol.schema.manifest import Manifest, lease_seconds
from lutetia.protocol.schema.model.team_spec import TeamSpec
from lutetia.protocol.schema.records import NodeState
from lutetia.protocol.stalled_claims import Seen
from lutetia.system.retry import backoff

Immutable = TypeVar("Immutable")

BUSIEST: tuple[NodeState, ...] = (
    "training", "publishing", "draining", "syncing", "claiming", "idle", "paused", "probing", "joining", "left",
)  # fmt: skip
"""A node with several devices is said to do what the first of its devices' states here says."""
MANY_STANDBYS = 10_000
"""Number of standbys of one shard up to which a takeover stays cheap (see `takeover_delay`)."""


def evolve(old: Immutable, **changes: Any) -> Immutable:
    """`dataclasses.replace` for dataclasses without `__post_init__`, several times faster. Raises TypeError on unknown fields."""
    known = old.__dict__
    fields = known | changes
    if len(fields) != len(known):
        raise TypeError(f"{type(old).__name__} has no {sorted(changes.keys() - known.keys())}")
    new = object.__new__(type(old))
    object.__setattr__(new, "__dict__", fields)
    return new


@dataclass(frozen=True)
class NodeRules:
    """Constants of the run for one node. Times in seconds."""

    run: str
    owner: str
    shards: int
    epochs: int
    heartbeat: float
    propagation: float
    patience: float = 60.0
    """How long a draining node waits at least for the verdict on its last checkpoint."""
    hang_after: float = 300.0
    """Silence after which a trainer that has reported before counts as hung."""
    start_within: float = 300.0
    """How long a trainer may take to its first report: it imports its libraries first."""
    stuck_after: float = 300.0
    """How long a disk may be full before the lease is released."""
    probe_again: float = 300.0
    """How long to wait before a node that fits nothing is probed again."""
    max_pending: int = 3
    """Own checkpoints that may wait for acceptance before the trainer has to wait, while a coordinator answers."""
    max_ahead: int = 32
    """The same while none answers, as far as the disk has room: there is nothing else to do, and its verdicts will come."""
    crash_limit: int = 6
    """Failures in a row after which the shard is released."""
    rejection_limit: int = 2
    """Refused checkpoints in a row after which the shard is released."""
    unjudged_limit: int = 3
    """Inconclusive verdicts on one checkpoint after which the shard is released."""
    longest_backoff: float = 60.0
    paused: str | None = None
    """Why the run's owner has paused it (empty: no reason given); None: the run goes on."""
    banned: str | None = None
    """Why the run's owner has banned this node; None: it has not."""
    tenure: float = 600.0
    interval: int = 1
    """Samples per epoch."""
    team: TeamSpec | None = None
    """Lanes of the run. Then numbers of shards in states, events and actions are slots (`protocol.claims.slot_of`)."""

    @classmethod
    def of(cls, manifest: Manifest, owner: str) -> NodeRules:
        """Rules of a run for peer `owner`. Propagation delay: a twentieth of the heartbeat, at least 0.25 s, at most 2 s."""
        heartbeat, orders = manifest.timing.heartbeat, manifest.orders
        ban = orders.ban_of(owner)
        waits: dict[str, int] = {"max_pending": 1, "max_ahead": 1} if manifest.team else {}  # the next epoch begins at the merge
        return cls(
            run=manifest.run_id, owner=owner, shards=len(manifest.shards), epochs=manifest.epochs,
            heartbeat=heartbeat, propagation=min(2.0, max(0.25, heartbeat / 20)),
            tenure=max(manifest.timing.tenure, manifest.timing.lease), interval=manifest.checkpoint_samples,
            team=manifest.team, **waits,
            paused=orders.paused.text if orders.paused else None, banned=ban.text if ban else None,
        )  # fmt: skip

    @property
    def slots(self) -> tuple[int, ...]:
        """What a node can claim: the lanes of all shards; without lanes the shards."""
        return slots_of(self.shards, self.team.lanes if self.team else 1)

    def slot_fitness(self, fitness: Mapping[int, float], rate: float) -> Mapping[int, float]:
        """Slot -> fitness, from that of its shard and the node's samples per second."""
        if (team := self.team) is None:
            return fitness
        of_lane = [team.share(lane) for lane in range(team.lanes)]
        found = {
            (value, share): lane_fitness(value, share, rate, self.interval, team.deadline)
            for value in set(fitness.values())
            for share in set(of_lane)
        }
        first = [(slot_of(0, lane), share) for lane, share in enumerate(of_lane)]
        return {shard + slot: found[value, share] for slot, share in first for shard, value in fitness.items()}

    def fitness_of(self, slot: int, fitness: float, rate: float) -> float:
        """How well one slot fits a node of so many samples per second that fits its shard."""
        if (team := self.team) is None:
            return fitness
        return lane_fitness(fitness, team.share(shard_and_lane(slot)[1]), rate, self.interval, team.deadline)

    def rate_needed(self, slot: int) -> float:
        """Samples per second that a slot's share of an epoch needs within the deadline; 0 without lanes."""
        return self.team.share(shard_and_lane(slot)[1]) * self.interval / self.team.deadline if self.team else 0.0

    @property
    def rates_needed(self) -> dict[int, float]:
        """Every slot, with the samples per second that it needs."""
        lanes = {slot: self.rate_needed(slot) for slot in slots_of(1, self.team.lanes if self.team else 1)}
        return {first + shard: rate for first, rate in lanes.items() for shard in range(self.shards)}

    @property
    def slowest_rate(self) -> float:
        """Samples per second that the smallest share of a lane needs within the deadline; 0 without lanes."""
        return min(map(self.rate_needed, slots_of(1, self.team.lanes))) if self.team else 0.0

    @property
    def lease(self) -> float:
        return lease_seconds(self.heartbeat)

    @property
    def merge_look(self) -> float:
        """Seconds between two looks for the merge: the trainer stands still until it is seen."""
        return self.heartbeat / 4

    def jitter(self, *words: object) -> float:
        """A number in [0, 1) that depends only on run, node and `words`."""
        text = "|".join((self.run, self.owner, *map(str, words)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64

    def backoff(self, attempt: int, *words: object) -> float:
        """1, 2, 4, … s up to `longest_backoff`, plus up to a quarter of jitter so that peers spread."""
        return backoff(attempt, longest=self.longest_backoff, jitter=self.jitter("backoff", attempt, *words))

    def takeover_delay(self, shard: int, epoch: int) -> float:
        """How long this node waits before it claims a free shard.

        Exponential feedback (Nonnenmacher and Biersack 1998): the lowest rendezvous hash goes first, and of up to MANY_STANDBYS
        standbys only about sqrt(MANY_STANDBYS) claim before they can see the first claim. No peer needs to know their number.
        """
        share = (rendezvous(self.run, shard, epoch, self.owner) + 1) / 2**64
        return 2 * self.propagation * max(0.0, 1 + math.log(share) / math.log(MANY_STANDBYS))


@dataclass(frozen=True)
class ShardWork:
    """The work on one shard. `epoch`, `checkpoint` and `term` name the accepted state that it starts from."""

    shard: int
    epoch: int
    checkpoint: str | None
    term: int = 0
    pending: tuple[OwnCheckpoint, ...] = ()
    owned: bool = True
    checking: bool = False
    """The lease may have lapsed: look at the shard before renewing it."""
    trainer: Literal["off", "on"] = "off"
    trainer_epoch: int = 0
    """The parent epoch of what the trainer trains now."""
    samples: int = 0
    until: int = 0
    drain_epoch: int | None = None
    """The epoch after which the trainer ends because the node drains."""
    pause_epoch: int | None = None
    """The epoch after which the trainer waits because the run is paused."""
    handover_epoch: int | None = None
    """The epoch after which a trainer under the previous manifest hands over to one under the new manifest."""
    waiting: bool = False
    progress_at: float = 0.0
    started_at: float = 0.0
    restart_at: float = 0.0
    crashes: int = 0
    failure: str | None = None
    """Why the last trainer failed; None while a trainer runs and after a normal end."""
    halvings: int = 0
    sync_failures: int = 0
    sync_at: float | None = None
    offering: str | None = None
    offer_at: float = 0.0
    offers: int = 0
    unjudged: int = 0
    """Inconclusive verdicts on the oldest pending result."""
    ahead: int = 0
    """Own checkpoints that may wait because no coordinator answers; 0: one answers."""
    gathered: bool = False
    """The result of this lane is accepted, and waits for the merge with those of other lanes."""
    merge_look_at: float = 0.0
    """When to look next whether the lanes are merged."""

    @property
    def stand(self) -> Stand:
        return self.term, self.epoch, self.checkpoint

    @property
    def newest(self) -> int:
        """The newest complete epoch: pending on disk, or accepted."""
        return self.pending[-1].epoch if self.pending else self.epoch

    def epoch_limit(self, rules: NodeRules) -> int:
        """The last epoch that may be trained: within the budget, and as far beyond the accepted one as results may wait."""
        return min(rules.epochs, self.epoch + max(rules.max_pending, self.ahead))

    def may_train(self, rules: NodeRules) -> bool:
        return self.newest < self.epoch_limit(rules)

    @property
    def cut_short(self) -> bool:
        """Whether a trainer failed in the epoch that a draining node was to finish."""
        return self.failure is not None and self.drain_epoch is not None and self.newest < self.drain_epoch

    @property
    def has_reported(self) -> bool:
        """Whether the trainer has reported since it was started."""
        return self.progress_at > self.started_at

    def hung_at(self, rules: NodeRules) -> float:
        """When the trainer counts as hung without a further report. Unix seconds."""
        return self.progress_at + (rules.hang_after if self.has_reported else max(rules.hang_after, rules.start_within))

    def claim(self, draining: bool) -> Claim:
        return Claim(self.shard, self.epoch, self.samples, "draining" if draining else "training")


Stage = Literal["delay", "check", "settle", "decide"]


@dataclass(frozen=True)
class MachineState:
    """All that a node's decisions depend on. Times are Unix seconds."""

    last_event_at: float = 0.0
    """A long gap since then means that the machine slept."""
    phase: NodeState = "joining"
    why: str = "joining the network"
    since: float = 0.0
    wanted: Literal["run", "pause", "finish", "leave"] = "run"
    online: bool = False
    fitness: Mapping[int, float] = field(default_factory=dict)
    rate: float = 0.0
    """Samples per second, as probed; 0: not known."""
    remembered: frozenset[int] = frozenset()
    """Shards with local work on disk."""
    views: Mapping[int, ShardView] = field(default_factory=dict)
    looked_at: Mapping[int, float] = field(default_factory=dict)
    taken: frozenset[int] = frozenset()
    """Shards that the node's other devices claim or work on."""
    claim_histories: Mapping[int, Seen] = field(default_factory=dict)
    """What this node has seen of other peers' claims, by shard; claims without progress are ignored."""
    watched_shards: frozenset[int] | None = None
    """The shards to watch while standing by, until `watched_until`; None: all of them."""
    watched_until: float = 0.0
    avoided_until: Mapping[int, float] = field(default_factory=dict)
    rejections: Mapping[int, int] = field(default_factory=dict)
    overtaken: Mapping[int, int] = field(default_factory=dict)
    """By shard: how often in a row another peer's result was accepted in place of this node's."""
    left_out: str = ""
    """Why this node's last work on a lane is in no merge, in a sentence; empty: its last result was in time."""
    work: ShardWork | None = None
    target: int | None = None
    stage: Stage = "delay"
    settle_rounds: int = 0
    act_at: float = 0.0
    look_at: float = 0.0
    to_look: tuple[int, ...] = ()
    """Shards of the current round that are still to be looked at (see `claiming.WAVE`)."""
    renew_at: float = 0.0
    renewed_at: float = 0.0
    probe_at: float | None = None
    probe_failures: int = 0
    pause_until: float | None = None
    closed_until: float | None = None
    """When the schedule opens again; None: it is open, or the volunteer resumed in spite of it."""
    bytes_until: float | None = None
    """Until when the cap on bytes lets no epoch begin; None: it does."""
    bytes_why: str = ""
    may_offer: bool = True
    """Whether the cap on bytes leaves enough to upload the results that are whole."""
    drain_until: float | None = None
    trainers_started: int = 0
    """Number of the current trainer; messages of earlier ones are stale."""
    disk_full_since: float | None = None
    disk_freed: tuple[float, float] | None = None
    """(begin, end) of the last time the disk was full; if it is full again soon after, `begin` counts."""


def wants_trainer(rules: NodeRules, state: MachineState, work: ShardWork) -> bool:
    """Whether to start a trainer at `restart_at`. A draining node only replaces one that failed within its epoch."""
    if work.trainer == "on" or state.disk_full_since is not None or not work.may_train(rules):
        return False
    may_begin = rules.paused is None and state.bytes_until is None
    return (state.phase == "training" and may_begin) or (state.phase == "draining" and work.owned and work.cut_short)


def next_wake(rules: NodeRules, state: MachineState) -> float | None:
    """When the machine needs its next ClockTick (Unix seconds); None: not before another event."""
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
        times.append(work.hung_at(rules))
    if work.pending and work.offering is None and state.online and state.may_offer:
        times.append(work.offer_at)
    if work.gathered and state.online:
        times.append(work.merge_look_at)
    return times
