"""The ledger as server-sent events (HTML Living Standard, section 9.2): one per ledger event, its number as the id."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable

from fastapi import HTTPException
from fastapi.responses import StreamingResponse

from lutetia.coordinator.web.api.answers import SAFE, RequestLimit
from lutetia.coordinator.web.api.source import RunSource
from lutetia.coordinator.web.api.views import event_lines
from lutetia.coordinator.web.connections import ConnectionTimes, HttpLimits, crowded_out
from lutetia.protocol.transport.network_origin import prefix_of, quotas_of

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
    """Opens streams of a run's events within the limits.

    When all places are taken, the oldest stream of the most crowded prefix, and there of the most crowded origin, ends. Old
    events are read as fast as the origin's `limit` allows.
    """

    def __init__(self, source: RunSource, limit: RequestLimit, clock: Callable[[], float] = time.thread_time) -> None:
        self._source, self._limit, self._clock = source, limit, clock
        self._open: list[ConnectionTimes] = []

    def open(self, origin: str, after: int) -> StreamingResponse:
        """A stream from the event after `after` on. Raises HTTPException 503 if its origin or prefix has too many."""
        for name, share in quotas_of(origin):
            if sum(name in (one.origin, prefix_of(one.origin)) for one in self._open) >= share * STREAMS_PER_ORIGIN:
                text = "too many event streams are open; read /api/v1/events instead"
                raise HTTPException(503, text, {"Retry-After": "30"})
        return StreamingResponse(self._events(origin, after), media_type="text/event-stream", headers=SAFE)

    async def _events(self, origin: str, after: int) -> AsyncGenerator[str]:
        now = asyncio.get_running_loop().time()
        mine = ConnectionTimes(origin, now, None, moved=now)
        self._open.append(mine)
        if victim := crowded_out(self._open, mine, HttpLimits(connections=STREAMS, per_origin=STREAMS_PER_ORIGIN)):
            self._open.remove(victim)
        try:
            yield "retry: 5000\n\n"
            while mine in self._open:
                if not await self._source.wait_for_more(after, _IDLE_SECONDS):
                    yield ": idle\n\n"
                    continue
                if self._limit.exhausted(origin):
                    await asyncio.sleep(1)
                    continue
                began = self._clock()
                lines = event_lines(self._source.rows(after, _BATCH))
                text = "".join(f"id: {line.event}\nevent: ledger\ndata: {line.model_dump_json()}\n\n" for line in lines)
                self._limit.charge(origin, self._clock() - began)
                after = lines[-1].event
                yield text
        finally:
            if mine in self._open:
                self._open.remove(mine)
