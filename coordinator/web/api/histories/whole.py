"""Whole histories of all shards as pieces: of each shard only what is new since the last time is rendered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lutetia.coordinator.web.api.documents import LossSeries, SeriesDocument, ShardDocument
from lutetia.coordinator.web.api.histories.pieces import Piece, around, piece_of
from lutetia.coordinator.web.api.history import History, ShardHistory
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.status import SwarmStatus

CHUNK = 128
"""Accepted results in one piece."""
_COMMA = piece_of(b",")
_STEP = 8
"""Pieces that are rendered before others get their turn."""


@dataclass
class _Rendered:
    """What was rendered of one shard. `version`: when results were last made void, which changes those before."""

    version: int = 0
    chunks: list[Piece] = field(default_factory=list)
    last: tuple[int, Piece] | None = None
    """Number of accepted results, and those after the chunks."""
    refused: tuple[int, Piece] | None = None
    """Event of the last refused result, and all."""
    curve: tuple[int, Piece] | None = None
    """Number of accepted results, and their curve."""

    def rest_of(self, past: ShardHistory) -> tuple[Piece, Piece]:
        """The accepted results after the chunks, and the refused ones."""
        if self.last is None or self.last[0] != len(past.accepted):
            self.last = len(past.accepted), piece_of(_listed(past.accepted[len(self.chunks) * CHUNK :]))
        newest = past.refused[-1].event if past.refused else 0
        if self.refused is None or self.refused[0] != newest:
            self.refused = newest, piece_of(_listed(past.refused))
        return self.last[1], self.refused[1]


class WholeHistories:
    """Renders the documents that hold every result of every shard."""

    def __init__(self) -> None:
        self._history: History | None = None
        self._shards: dict[int, _Rendered] = {}

    def shards(self, documents: Sequence[ShardDocument], history: History) -> list[Piece] | None:
        """The pieces of a ShardsDocument; None: some were rendered, and there are more to render.

        Args:
            documents: all shards, without their results.
            history: has the results.
        """
        left = _STEP
        for document in documents:
            past, rendered = history.shard(document.status.shard), self._of(history, document.status.shard)
            while (len(rendered.chunks) + 1) * CHUNK < len(past.accepted):
                if not left:
                    return None
                start = len(rendered.chunks) * CHUNK
                rendered.chunks.append(piece_of(_listed(past.accepted[start : start + CHUNK]) + b","))
                left -= 1
        head, pieces = f'{{"events":{history.events},"shards":['.encode(), []
        for place, document in enumerate(documents):
            past, rendered = history.shard(document.status.shard), self._of(history, document.status.shard)
            before, after = around(document.model_dump_json().encode(), "accepted")
            between, end = around(after, "refused")
            accepted, refused = rendered.rest_of(past)
            pieces += [piece_of(head + before), *rendered.chunks, accepted, piece_of(between), refused]
            head = end + b"," * (place + 1 < len(documents))
        return [*pieces, piece_of(head + b"]}")]

    def curves(self, status: SwarmStatus, history: History, rest: SeriesDocument) -> list[Piece] | None:
        """The pieces of a SeriesDocument with the curves of all shards; `rest`: the document without them."""
        left, pieces = _STEP, []
        for place, shard in enumerate(status.shards):
            past, rendered = history.shard(shard.shard), self._of(history, shard.shard)
            if rendered.curve is None or rendered.curve[0] != len(past.accepted):
                if not left:
                    return None
                left -= 1
                text = loss_series(shard.shard, shard.name, past).model_dump_json()
                rendered.curve = len(past.accepted), piece_of(text.encode())
            pieces += [rendered.curve[1]] if place == 0 else [_COMMA, rendered.curve[1]]
        before, after = around(rest.model_dump_json().encode(), "losses")
        return [piece_of(before), *pieces, piece_of(after)]

    def _of(self, history: History, index: int) -> _Rendered:
        if history is not self._history:
            self._history, self._shards = history, {}
        version = history.shard(index).dropped
        found = self._shards.get(index)
        if found is None or found.version != version:
            found = self._shards[index] = _Rendered(version)
        return found


def loss_series(index: int, name: str, past: ShardHistory) -> LossSeries:
    """The learning curve of a shard, without void results."""
    points = [point for point in past.accepted if not point.void]
    return LossSeries(
        shard=index, name=name, events=tuple(point.event for point in points), times=tuple(point.time for point in points),
        samples=tuple(point.samples for point in points), losses=tuple(point.loss for point in points),
    )  # fmt: skip


def _listed(points: Sequence[Frozen]) -> bytes:
    return b",".join(point.model_dump_json().encode() for point in points)
