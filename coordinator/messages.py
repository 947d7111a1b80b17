"""What the judge hears (stimuli) and what it wants done (actions)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..protocol.events import Event
from ..protocol.offers import OfferReply
from ..protocol.records import AcceptanceRecord, CheckpointRecord
from .ladder import Limits, Verdict


@dataclass(frozen=True)
class Offered:
    """An opened, correctly signed record came in, by the offer stream or by reading the DHT."""

    record: CheckpointRecord
    now: float
    via: Literal["offer", "poll"] = "offer"


@dataclass(frozen=True)
class Checked:
    """The ladder's verdict on a candidate."""

    record: CheckpointRecord
    verdict: Verdict
    now: float


@dataclass(frozen=True)
class LimitsKnown:
    """The size limits of each shard's blobs; nothing is fetched before."""

    limits: Limits
    now: float


@dataclass(frozen=True)
class Tick:
    """Time passes: retries may be due."""

    now: float


@dataclass(frozen=True)
class Noted:
    """Facts that need no decision: a router was trained, a mixture stitched."""

    events: tuple[Event, ...]
    now: float


Stimulus = Offered | Checked | LimitsKnown | Tick | Noted


@dataclass(frozen=True)
class Write:
    """Append to the ledger, durably, before any later action is carried out."""

    event: Event


@dataclass(frozen=True)
class Answer:
    """Reply to the offer."""

    reply: OfferReply


@dataclass(frozen=True)
class Check:
    """Climb the ladder with this candidate and come back with `Checked`."""

    record: CheckpointRecord
    parent_loss: float | None


@dataclass(frozen=True)
class Publish:
    """Keep the accepted blobs, and publish the signed acceptance."""

    acceptance: AcceptanceRecord
    record: CheckpointRecord


@dataclass(frozen=True)
class Discard:
    """The candidate is out: what was fetched of it may go."""

    record: CheckpointRecord


Action = Write | Answer | Check | Publish | Discard
