"""The changes of `MachineState` and `ShardWork`, typed so that a misspelt field or a wrong type fails type checking.

A new field of either class is added here too; a test compares them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypedDict

from lutetia.node.machine.messages import OwnCheckpoint
from lutetia.node.machine.state import ShardWork, Stage
from lutetia.protocol.claims import ShardView
from lutetia.protocol.schema.records import NodeState
from lutetia.protocol.stalled_claims import Seen


class MachineChanges(TypedDict, total=False):
    """Fields of `MachineState`."""

    last_event_at: float
    phase: NodeState
    why: str
    since: float
    wanted: Literal["run", "pause", "finish", "leave"]
    online: bool
    fitness: Mapping[int, float]
    rate: float
    remembered: frozenset[int]
    views: Mapping[int, ShardView]
    looked_at: Mapping[int, float]
    taken: frozenset[int]
    claim_histories: Mapping[int, Seen]
    watched_shards: frozenset[int] | None
    watched_until: float
    avoided_until: Mapping[int, float]
    rejections: Mapping[int, int]
    overtaken: Mapping[int, int]
    left_out: str
    work: ShardWork | None
    target: int | None
    stage: Stage
    settle_rounds: int
    act_at: float
    look_at: float
    to_look: tuple[int, ...]
    renew_at: float
    renewed_at: float
    probe_at: float | None
    probe_failures: int
    pause_until: float | None
    closed_until: float | None
    bytes_until: float | None
    bytes_why: str
    may_offer: bool
    drain_until: float | None
    trainers_started: int
    disk_full_since: float | None
    disk_freed: tuple[float, float] | None


class WorkChanges(TypedDict, total=False):
    """Fields of `ShardWork`."""

    shard: int
    epoch: int
    checkpoint: str | None
    term: int
    pending: tuple[OwnCheckpoint, ...]
    owned: bool
    checking: bool
    trainer: Literal["off", "on"]
    trainer_epoch: int
    samples: int
    until: int
    drain_epoch: int | None
    pause_epoch: int | None
    handover_epoch: int | None
    waiting: bool
    progress_at: float
    started_at: float
    restart_at: float
    crashes: int
    failure: str | None
    halvings: int
    sync_failures: int
    sync_at: float | None
    offering: str | None
    offer_at: float
    offers: int
    unjudged: int
    ahead: int
    gathered: bool
    merge_look_at: float
