"""Which results of a shard a client is sent: those that came after an event, or the last before one. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from lutetia.coordinator.web.api.documents import AcceptedPoint, RefusedPoint
from lutetia.coordinator.web.api.history import History, ShardHistory

RECENT_EVENTS = 2000
"""A client that has not read for so many events is sent everything."""
P = TypeVar("P", AcceptedPoint, RefusedPoint)


class Results(NamedTuple):
    """Results of one shard, oldest first. `whole`: none are left out."""

    accepted: Sequence[AcceptedPoint]
    refused: Sequence[RefusedPoint]
    whole: bool


NONE = Results((), (), True)


def is_recent(after: int, history: History) -> bool:
    """Whether a client that has the history up to event `after` is sent only what came after it."""
    return max(1, history.events - RECENT_EVENTS) <= after <= history.events


def results_after(past: ShardHistory, after: int) -> Results:
    """What came after event `after`; everything if results were made void since."""
    if past.dropped > after:
        return Results(past.accepted, past.refused, True)
    return Results(_after(past.accepted, after), _after(past.refused, after), False)


def last_results(past: ShardHistory, before: int | None, most: int | None) -> Results:
    """At most the last `most` of each list before event `before`; None: of all, and all."""
    accepted = newest_before(past.accepted, before, most)
    refused = newest_before(past.refused, before, most)
    return Results(accepted, refused, (len(accepted), len(refused)) == (len(past.accepted), len(past.refused)))


def newest_before(points: Sequence[P], before: int | None, most: int | None) -> Sequence[P]:
    """The last `most` of `points` before event `before`, oldest first; None: of all, and all."""
    end = len(points) if before is None else bisect_left(points, before, key=lambda point: point.event)
    return points[0 if most is None else max(0, end - most) : end]


def _after(points: Sequence[P], after: int) -> Sequence[P]:
    return points[bisect_right(points, after, key=lambda point: point.event) :]
