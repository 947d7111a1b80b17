"""What came after an event of the ledger, for clients that have what came before. Pure."""

from __future__ import annotations

from bisect import bisect_right

from lutetia.coordinator.web.api.documents import ShardDocument, ShardsDocument
from lutetia.coordinator.web.api.history import History

RECENT_EVENTS = 2000
"""A client that has not read for so many events is sent everything."""
WHOLE_SECONDS = 10.0
"""Whole histories are rendered again after so long, and after each event."""


def is_recent(after: int, history: History) -> bool:
    """Whether a client that has the history up to event `after` is sent only what came after it."""
    return max(1, history.events - RECENT_EVENTS) <= after <= history.events


def only_after(whole: ShardsDocument, history: History, after: int) -> ShardsDocument:
    """Each shard with its results after event `after`; with all of them if results were made void since."""
    shards = tuple(
        shard if history.shard(shard.status.shard).dropped > after else _only_after(shard, after) for shard in whole.shards
    )
    return ShardsDocument(events=whole.events, shards=shards)


def _only_after(shard: ShardDocument, after: int) -> ShardDocument:
    accepted = bisect_right(shard.accepted, after, key=lambda point: point.event)
    refused = bisect_right(shard.refused, after, key=lambda point: point.event)
    return shard.model_copy(update={"accepted": shard.accepted[accepted:], "refused": shard.refused[refused:], "whole": False})
