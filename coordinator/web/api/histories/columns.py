"""All results of a run in few bytes: columns of numbers, in segments of the ledger that never change once they are whole.

The page draws from it, and folds it to any event of the ledger. What it shows of one shard alone, it reads when it is asked to.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import TypeVar

from pydantic import Field

from lutetia.coordinator.web.api.documents import AcceptedPoint, RefusedPoint
from lutetia.coordinator.web.api.histories.pieces import Piece, piece_of
from lutetia.coordinator.web.api.history import History
from lutetia.protocol.schema.canonical import Frozen

SEGMENT_EVENTS = 1024
_DIGITS = 12
P = TypeVar("P", AcceptedPoint, RefusedPoint)


class AcceptedColumns(Frozen):
    """Accepted results: parallel lists in the order of the ledger."""

    event: tuple[int, ...] = Field(description="Numbers of the events")
    time: tuple[float, ...] = Field(description="Unix seconds, to a tenth")
    shard: tuple[int, ...] = Field(description="Indices of the shards")
    epoch: tuple[int, ...] = Field(description="Epochs")
    samples: tuple[int, ...] = Field(description="Samples of the shard trained so far, earlier epochs included")
    trained: tuple[int, ...] = Field(description="Samples of the epoch alone")
    loss: tuple[float, ...] = Field(description="Held-out losses, to a millionth")
    author: tuple[int, ...] = Field(description="Places of the authors in the lists `authors` of all segments, from 0")
    weights_size: tuple[int, ...] = Field(description="Sizes of the weights in bytes")


class RefusedColumns(Frozen):
    """Results that were refused for good, of each shard the last 200: parallel lists in the order of the ledger."""

    event: tuple[int, ...] = Field(description="Numbers of the events")
    time: tuple[float, ...] = Field(description="Unix seconds, to a tenth")
    shard: tuple[int, ...] = Field(description="Indices of the shards")
    epoch: tuple[int, ...] = Field(description="Epochs")
    checkpoint: tuple[str, ...] = Field(description=f"First {_DIGITS} digits of the results' digests")
    check: tuple[str, ...] = Field(description="The checks")


class HistorySegment(Frozen):
    """What happened in one stretch of the ledger."""

    until: int = Field(description="Its last event")
    authors: tuple[str, ...] = Field(description="Public keys of the authors who had none accepted in earlier segments")
    accepted: AcceptedColumns = Field(description="The accepted results")
    refused: RefusedColumns = Field(description="The refused results")
    voids: tuple[tuple[int, int], ...] = Field(
        description="Events that made results void, each with the event that had accepted the result"
    )


class HistoryDocument(Frozen):
    """All results of the run."""

    events: int = Field(description="Events of the ledger that this covers: `after` of the next request to `shards`")
    segments: tuple[HistorySegment, ...] = Field(description="The segments, oldest first")


class HistoryColumns:
    """Renders a history, each whole segment once."""

    def __init__(self) -> None:
        self._begin(None)

    def _begin(self, history: History | None) -> None:
        self._history = history
        self._whole: list[Piece] = []
        self._authors: dict[str, int] = {}

    def document(self, history: History) -> list[Piece] | None:
        """The pieces of the history's HistoryDocument; None: a segment was rendered, and there are more to render."""
        if history is not self._history:
            self._begin(history)
        start = len(self._whole) * SEGMENT_EVENTS
        if history.events >= start + SEGMENT_EVENTS:
            whole = segment_of(history, start, start + SEGMENT_EVENTS, self._authors)
            self._authors |= {key: len(self._authors) + place for place, key in enumerate(whole.authors)}
            self._whole.append(piece_of(whole.model_dump_json().encode() + b","))
            return None
        last = segment_of(history, start, history.events, self._authors).model_dump_json()
        head = f'{{"events":{history.events},"segments":['
        return [piece_of(head.encode()), *self._whole, piece_of(f"{last}]}}".encode())]


def segment_of(history: History, after: int, until: int, known: dict[str, int]) -> HistorySegment:
    """What happened after event `after` up to event `until`. `known`: the place of each author of earlier segments."""
    accepted = _between(history, lambda index: history.shards[index].accepted, after, until)
    refused = _between(history, lambda index: history.shards[index].refused, after, until)
    authors = tuple(dict.fromkeys(point.author for point in accepted if point.author not in known))
    places = known | {key: len(known) + place for place, key in enumerate(authors)}
    voids = history.voids[
        bisect_right(history.voids, after, key=lambda void: void[0]) : bisect_right(
            history.voids, until, key=lambda void: void[0]
        )
    ]
    return HistorySegment(
        until=until, authors=authors, voids=tuple(voids),
        accepted=AcceptedColumns(
            event=tuple(point.event for point in accepted), time=tuple(round(point.time, 1) for point in accepted),
            shard=tuple(point.shard for point in accepted), epoch=tuple(point.epoch for point in accepted),
            samples=tuple(point.samples for point in accepted), trained=tuple(point.trained for point in accepted),
            loss=tuple(round(point.loss, 6) for point in accepted), author=tuple(places[point.author] for point in accepted),
            weights_size=tuple(point.weights_size for point in accepted),
        ),
        refused=RefusedColumns(
            event=tuple(point.event for point in refused), time=tuple(round(point.time, 1) for point in refused),
            shard=tuple(point.shard for point in refused), epoch=tuple(point.epoch for point in refused),
            checkpoint=tuple(point.checkpoint[:_DIGITS] for point in refused), check=tuple(point.check for point in refused),
        ),
    )  # fmt: skip


def _between(history: History, points_of: Callable[[int], Sequence[P]], after: int, until: int) -> list[P]:
    found: list[P] = []
    for index in history.shards:
        points = points_of(index)
        first = bisect_right(points, after, key=lambda point: point.event)
        found += points[first : bisect_right(points, until, lo=first, key=lambda point: point.event)]
    return sorted(found, key=lambda point: point.event)
