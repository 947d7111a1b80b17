"""The run's history as the web API shows it, added up event by event from the ledger."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

from pydantic import Field

from lutetia.coordinator.ledger.events import (
    AcceptanceRecovered,
    AuditDone,
    BaselineMeasured,
    CheckpointAccepted,
    Event,
    LaneAccepted,
    LanesMerged,
    LineageRolledBack,
    MixtureStitched,
    PeerPardoned,
    PeerQuarantined,
    QuarantineRecovered,
    ResetRecovered,
    ResultRefused,
    ResultSuperseded,
    RouterTrained,
)
from lutetia.coordinator.ledger.persistent_map import AsPairs
from lutetia.coordinator.web.api.documents import (
    AcceptedPoint,
    AuditPoint,
    MixturePoint,
    RefusedPoint,
    RouterPoint,
    SupersededPoint,
)
from lutetia.protocol.schema.records import AcceptanceRecord

T = TypeVar("T")
HOUR = 3600.0
RECENT = 200
"""Entries of each list that are kept for one author."""


@dataclass
class ShardHistory:
    """What became of one shard's results, oldest first."""

    initial_loss: float | None = None
    accepted: list[AcceptedPoint] = field(default_factory=list)
    refused: list[RefusedPoint] = field(default_factory=list)
    refusals: dict[str, int] = field(default_factory=dict)
    """How many results were refused for good, by check."""
    dropped: int = 0
    """Number of the last event that made accepted results void; 0: none did."""


@dataclass
class AuthorHistory:
    """What became of one peer's results. The lists hold the last `RECENT` entries, oldest first."""

    samples: int = 0
    accepted: int = 0
    void: int = 0
    invalid: int = 0
    last_accepted: float | None = None
    quarantined: str | None = None
    points: Annotated[list[AcceptedPoint], Field(exclude=True)] = field(default_factory=list)
    """Not written to a snapshot: `History.restored` finds them among those of the shards."""
    refused: list[RefusedPoint] = field(default_factory=list)
    superseded: list[SupersededPoint] = field(default_factory=list)
    audits: list[AuditPoint] = field(default_factory=list)


@dataclass
class History:
    """What all events up to `events` add up to."""

    events: int = 0
    shards: dict[int, ShardHistory] = field(default_factory=dict)
    authors: dict[str, AuthorHistory] = field(default_factory=dict)
    weights_bytes: int = 0
    trained: int = 0
    """Samples of all accepted results, void ones included."""
    routers: list[RouterPoint] = field(default_factory=list)
    mixtures: list[MixturePoint] = field(default_factory=list)
    voids: list[tuple[int, int]] = field(default_factory=list)
    """Numbers of the events that made results void, each with the number of the event that had accepted the result."""
    hours: Annotated[dict[int, tuple[int, int]], AsPairs()] = field(default_factory=dict)
    """Hour (Unix seconds / 3600) -> samples and number of the results that were accepted in it and are not void."""
    _before: Annotated[dict[tuple[int, int], int], AsPairs()] = field(default_factory=dict)
    """(shard, epoch) -> samples of the shard up to that accepted epoch, in the present lineage."""

    def restored(self) -> History:
        """This history as read from a snapshot, with the points of its authors."""
        for point in sorted((point for shard in self.shards.values() for point in shard.accepted), key=lambda point: point.event):
            if point.author in self.authors:  # not a coordinator, which merged it
                _keep(self.author(point.author).points, point)
        return self

    def shard(self, index: int) -> ShardHistory:
        return self.shards.setdefault(index, ShardHistory())

    def author(self, owner: str) -> AuthorHistory:
        return self.authors.setdefault(owner, AuthorHistory())

    def add(self, number: int, event: Event) -> None:
        """Add the event with this number in the ledger."""
        self.events = number
        if isinstance(event, LineageRolledBack | ResetRecovered):
            self.shard(event.shard).dropped = number
        match event:
            case BaselineMeasured():
                self.shard(event.shard).initial_loss = event.loss
            case CheckpointAccepted():
                self._accept(number, event.time, event.acceptance, event.parent_loss, event.note)
            case LaneAccepted(acceptance=given):
                author = self.author(given.author)
                author.samples, author.accepted, author.last_accepted = (
                    author.samples + event.samples,
                    author.accepted + 1,
                    event.time,
                )
            case LanesMerged():
                self._accept(number, event.time, event.acceptance, event.parent_loss, "", credited=False)
            case AcceptanceRecovered():
                self._accept(number, event.time, event.acceptance, None, "")
            case LineageRolledBack():
                self._drop(number, event.shard, event.epoch)
            case ResetRecovered():
                self._drop(number, event.shard, 0)
            case ResultRefused():
                self._refuse(number, event)
            case ResultSuperseded():
                point = SupersededPoint(event=number, time=event.time, shard=event.shard, epoch=event.epoch, by=event.by)
                _keep(self.author(event.owner).superseded, point)
            case AuditDone(again_at=None):
                point = AuditPoint(
                    event=number, time=event.time, shard=event.shard, epoch=event.epoch, outcome=event.outcome, text=event.text
                )
                _keep(self.author(event.owner).audits, point)
            case PeerQuarantined() | QuarantineRecovered():
                self.author(event.owner).quarantined = event.text or "an audit found its work invalid"
            case PeerPardoned():
                self.author(event.owner).quarantined = None
            case RouterTrained():
                self.routers.append(_router(number, event))
            case MixtureStitched():
                point = MixturePoint(
                    event=number, time=event.time, mixture=event.mixture, epochs=event.epochs, current=event.current,
                    loss=event.loss, text=event.text,
                )  # fmt: skip
                self.mixtures.append(point)
            case _:
                pass

    def _accept(
        self, number: int, time: float, given: AcceptanceRecord, parent_loss: float | None, note: str, *, credited: bool = True
    ) -> None:
        """`credited`: its author trained it. Those of merged lanes were credited before."""
        done = given.samples - self._before.get((given.shard, given.epoch - 1), 0) if given.epoch > 1 else given.samples
        point = AcceptedPoint(
            event=number, time=time, shard=given.shard, epoch=given.epoch, samples=given.samples, trained=max(done, 0),
            loss=given.holdout_loss, parent_loss=parent_loss, author=given.author, checkpoint=given.checkpoint,
            weights=given.weights.digest, weights_size=given.weights.size, note=note,
        )  # fmt: skip
        self._before[given.shard, given.epoch] = given.samples
        self.weights_bytes += given.weights.size
        self.trained += point.trained
        self.shard(given.shard).accepted.append(point)
        self._work(point, 1)
        if not credited:
            return
        author = self.author(given.author)
        author.samples, author.accepted, author.last_accepted = author.samples + point.trained, author.accepted + 1, time
        _keep(author.points, point)

    def _drop(self, number: int, index: int, epoch: int) -> None:
        """The accepted epochs after `epoch` are void, and their samples count for nobody."""
        accepted = self.shard(index).accepted
        for place in range(len(accepted) - 1, -1, -1):
            point = accepted[place]
            if point.void:
                continue
            if point.epoch <= epoch:
                break
            accepted[place] = void = point.model_copy(update={"void": True, "void_event": number})
            self.voids.append((number, point.event))
            self._work(point, -1)
            self._before.pop((index, point.epoch), None)
            if point.author not in self.authors:
                continue  # merged lanes, whose authors keep their credit
            author = self.author(point.author)
            author.samples, author.accepted, author.void = author.samples - point.trained, author.accepted - 1, author.void + 1
            author.points[:] = [void if kept.event == void.event else kept for kept in author.points]

    def _work(self, point: AcceptedPoint, count: int) -> None:
        """Count the result in its hour, or with -1 no more."""
        samples, results = self.hours.get(int(point.time // HOUR), (0, 0))
        self.hours[int(point.time // HOUR)] = samples + count * point.trained, results + count

    def _refuse(self, number: int, event: ResultRefused) -> None:
        if event.again_at is not None:
            return  # it is tried again: no verdict yet
        point = RefusedPoint(
            event=number, time=event.time, shard=event.shard, epoch=event.epoch, owner=event.owner, checkpoint=event.checkpoint,
            verdict=event.verdict, check=event.check, text=event.text,
        )  # fmt: skip
        shard = self.shard(event.shard)
        shard.refusals[event.check] = shard.refusals.get(event.check, 0) + 1
        _keep(shard.refused, point)
        author = self.author(event.owner)
        author.invalid += event.verdict == "invalid"
        _keep(author.refused, point)


def lately(points: Sequence[AcceptedPoint], since: float) -> list[AcceptedPoint]:
    """The results after `since` (Unix seconds), oldest first; `points` are in the order of time."""
    count = next((number for number, point in enumerate(reversed(points)) if point.time <= since), len(points))
    return list(points[len(points) - count :])


def samples_per_second(shards: Iterable[Sequence[AcceptedPoint]], now: float, window: float) -> float:
    """Samples that were accepted per second during the last `window` seconds up to `now` (Unix seconds)."""
    recent = (point for points in shards for point in lately(points, now - window))
    return sum(point.trained for point in recent if not point.void and point.time <= now) / window


def seconds_left(remaining: Mapping[int, int], rates: Mapping[int, float]) -> float | None:
    """Seconds until all shards have their budgets: those of the slowest one. None if one with samples left has no rate.

    `remaining`: shard -> samples left. `rates`: shard -> samples per second.
    """
    times = []
    for shard, samples in remaining.items():
        if samples > 0:
            if rates.get(shard, 0.0) <= 0:
                return None
            times.append(samples / rates[shard])
    return max(times, default=0.0)


def _router(number: int, event: RouterTrained) -> RouterPoint:
    return RouterPoint(
        event=number, time=event.time, accuracy=event.accuracy, accuracy_by_time=event.accuracy_by_time,
        calibration_error=event.calibration_error, router=event.router.digest,
    )  # fmt: skip


def _keep(entries: list[T], entry: T) -> None:
    entries.append(entry)
    if len(entries) > RECENT:
        del entries[: len(entries) - RECENT]
