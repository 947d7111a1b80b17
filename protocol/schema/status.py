"""The one status document that the table, `--json`, the page, the metrics and the status stream all print."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.ledger_head import SignedHead
from lutetia.protocol.schema.manifest import Digest, PublicKey
from lutetia.protocol.schema.records import NodeState, Word
from lutetia.protocol.schema.verdicts import CheckName

MAX_STATUS_BYTES = 4 << 20
AuditState = Literal["not due", "due", "valid", "invalid", "inconclusive", "not carried out"]
ShardState = Literal["unclaimed", "claimed", "training", "overdue", "done"]


class TolerantDocument(Frozen):
    """Part of the status, which nobody signs or hashes: what a newer coordinator says besides, an older reader passes over."""

    model_config = ConfigDict(extra="ignore")


class ShardStatus(TolerantDocument):
    """Accepted work of one shard. `last_accepted` is Unix seconds; `due` is when the next acceptance should be there."""

    shard: int
    name: str
    epoch: int
    epochs: int
    samples: int
    samples_budget: int
    state: ShardState
    owner: PublicKey | None = None
    claim_expires: float | None = None
    holdout_loss: float | None = None
    checkpoint: Digest | None = None
    last_accepted: float | None = None
    due: float | None = None
    initial_loss: float | None = None
    waiting: int = Field(default=0, description="Results that wait for judgement")
    audit: AuditState | None = Field(default=None, description="Of the accepted checkpoint")
    term: int = Field(default=0, description="How often its lineage was rolled back")
    copies: int | None = Field(
        default=None, description="Live peers besides coordinators that say they hold the accepted checkpoint; null: not counted"
    )


class NodeStatus(TolerantDocument):
    """A peer. `health` is `working` only while its own work is being accepted in time (invariant I6)."""

    owner: PublicKey
    peer_id: str
    state: NodeState
    health: Literal["working", "starting", "standby", "paused", "overdue", "quarantined"]
    device: Word
    samples_per_second: float
    shard: int | None = None
    accepted: int = 0
    rejected: int = 0
    last_accepted: float | None = None
    last_seen: float
    relayed: bool = False
    software: Word = ""


class RouterStatus(TolerantDocument):
    """Held-out accuracy of the router, overall and for ten equal bins of t."""

    accuracy: float
    accuracy_by_time: tuple[float, ...] = ()
    trained_at: float
    epochs: tuple[int, ...] = ()
    calibration_error: float | None = None


class RefusalStatus(TolerantDocument):
    """A result that was not accepted, and why. `inconclusive` ones may be tried again."""

    time: float
    shard: int
    epoch: int
    owner: PublicKey
    checkpoint: Digest
    verdict: Literal["invalid", "inconclusive"]
    check: CheckName
    text: str


class CheckStatus(TolerantDocument):
    """What a check has cost: it was run `count` times with `outcome`, in `seconds`, over `size` bytes."""

    check: CheckName
    outcome: Literal["valid", "invalid", "inconclusive"]
    count: int
    seconds: float
    size: int


class QuarantineStatus(TolerantDocument):
    """A peer whose work an audit found faked: epoch `epoch` of `shard`."""

    time: float
    owner: PublicKey
    shard: int
    epoch: int
    text: str


class SwarmStatus(TolerantDocument):
    """The whole run as its coordinator sees it at `time`."""

    format: Literal[1] = 1
    run: Digest
    name: str
    manifest_version: int
    time: float
    coordinator: PublicKey
    software: str
    shards: tuple[ShardStatus, ...]
    nodes: tuple[NodeStatus, ...] = ()
    router: RouterStatus | None = None
    mixture: Digest | None = Field(default=None, description="Digest of the last stitched mixture's description")
    accepted: int = 0
    rejected: int = 0
    events: int = 0
    refusals: tuple[RefusalStatus, ...] = Field(default=(), description="The last ones, oldest first")
    checks: tuple[CheckStatus, ...] = Field(default=(), description="What the checks have cost, by check and outcome")
    audits_due: int = Field(default=0, description="Accepted results that wait for an audit")
    quarantined: tuple[QuarantineStatus, ...] = Field(default=(), description="The newest, oldest first")
    mixture_epochs: tuple[int, ...] = Field(default=(), description="Which accepted epoch of each shard the mixture holds")
    ledger: SignedHead | None = Field(default=None, description="How far the coordinator's ledger reached at the last acceptance")
    finished: bool = Field(default=False, description="Every budget is done and the final mixture is stitched")

    @property
    def done(self) -> bool:
        return all(shard.epoch >= shard.epochs for shard in self.shards)
