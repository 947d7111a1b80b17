"""Accepted samples per second of a served run, from its ledger. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from lutetia.coordinator.ledger.events import CheckpointAccepted, Event, LaneAccepted, LanesMerged
from lutetia.protocol.schema.manifest import Manifest


class AcceptedWork(NamedTuple):
    """One accepted result. `at` in Unix seconds."""

    at: float
    shard: int
    epoch: int
    author: str
    samples: int


@dataclass(frozen=True)
class Delivery:
    """What nodes delivered in the measured time.

    Attributes:
        seconds: the measured time.
        samples: of accepted results.
        authors: samples by author.
        epochs: seconds from one epoch of a shard to its next.
        rate: accepted samples per second, of all shards together. That of a shard is taken over its whole epochs: a few of them
            fit into the measured time, so where it cuts the last one would say more than how fast they are. A shard without a
            whole epoch counts over the measured time.
    """

    seconds: float
    samples: int
    authors: Mapping[str, int]
    epochs: tuple[float, ...]
    rate: float


def accepted_work(events: Iterable[Event], manifest: Manifest) -> list[AcceptedWork]:
    """Every accepted result; those of lanes with the samples of their share."""
    found = []
    for event in events:
        if isinstance(event, LaneAccepted | CheckpointAccepted):
            given = event.acceptance
            samples = event.samples if isinstance(event, LaneAccepted) else manifest.checkpoint_samples
            found.append(AcceptedWork(event.time, given.shard, given.epoch, given.author, samples))
    return found


def epoch_ends(events: Iterable[Event]) -> dict[int, list[float]]:
    """When each epoch of each shard was there, by shard, in Unix seconds."""
    ends: dict[int, list[float]] = defaultdict(list)
    for event in events:
        if isinstance(event, CheckpointAccepted | LanesMerged):
            ends[event.acceptance.shard].append(event.time)
    return dict(ends)


def begins(events: Iterable[Event], manifest: Manifest, nodes: int) -> float | None:
    """When `nodes` peers had an accepted result each; None while fewer have. Then all of them are at work.

    An epoch of each shard is not enough: lanes are merged at a quorum, so a node may still be starting then.
    """
    first: dict[str, float] = {}
    for work in accepted_work(events, manifest):
        first.setdefault(work.author, work.at)
    times = sorted(first.values())
    return times[nodes - 1] if len(times) >= nodes else None


def delivery(events: Iterable[Event], manifest: Manifest, begin: float, end: float) -> Delivery:
    """What was accepted after `begin` and until `end` (Unix seconds)."""
    events = list(events)
    inside = [work for work in accepted_work(events, manifest) if begin < work.at <= end]
    authors: dict[str, int] = defaultdict(int)
    for work in inside:
        authors[work.author] += work.samples
    gaps, rate, ends = list[float](), 0.0, epoch_ends(events)
    for shard in {work.shard for work in inside}:
        times = [moment for moment in ends.get(shard, ()) if begin <= moment <= end]
        gaps += [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
        first, last = (times[0], times[-1]) if len(times) > 1 else (begin, end)
        rate += sum(work.samples for work in inside if work.shard == shard and first < work.at <= last) / (last - first)
    return Delivery(end - begin, sum(authors.values()), dict(authors), tuple(gaps), rate)
