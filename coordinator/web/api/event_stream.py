"""The ledger as server-sent events (HTML Living Standard, section 9.2): one per ledger event, its number as the id."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator

from fastapi import HTTPException
from fastapi.responses import StreamingResponse

from lutetia.coordinator.web.api.answers import SAFE
from lutetia.coordinator.web.api.source import RunSource
from lutetia.coordinator.web.api.views import event_lines

STREAMS = 64
"""Open streams, over all clients."""
STREAMS_PER_ORIGIN = 8
_BATCH = 200
_IDLE_SECONDS = 15.0
"""After so long without an event a comment is sent, so that nobody between closes the connection."""


def last_event(header: str | None, after: int | None, head: int) -> int:
    """The number of the last event that a client has: by its header, else its query, else the newest; never beyond that."""
    if header is not None and header.isascii() and header.isdigit():
        return min(int(header), head)
    return head if after is None else min(after, head)


class EventStreams:
    """Opens streams of a run's events within the limits."""

    def __init__(self, source: RunSource) -> None:
        self._source, self._open = source, Counter[str]()

    def open(self, origin: str, after: int) -> StreamingResponse:
        """A stream from the event after `after` on. Raises HTTPException 503 if too many are open."""
        if self._open[origin] >= STREAMS_PER_ORIGIN or self._open.total() >= STREAMS:
            raise HTTPException(503, "too many event streams are open; read /api/v1/events instead", {"Retry-After": "30"})
        return StreamingResponse(self._events(origin, after), media_type="text/event-stream", headers=SAFE)

    async def _events(self, origin: str, after: int) -> AsyncIterator[str]:
        self._open[origin] += 1
        try:
            yield "retry: 5000\n\n"
            while True:
                if not await self._source.wait_for_more(after, _IDLE_SECONDS):
                    yield ": idle\n\n"
                    continue
                for line in event_lines(self._source.rows(after, _BATCH)):
                    after = line.event
                    yield f"id: {line.event}\nevent: ledger\ndata: {line.model_dump_json()}\n\n"
        finally:
            self._open[origin] -= 1
            if not self._open[origin]:
                del self._open[origin]
