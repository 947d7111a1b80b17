"""Run the handlers of inbound streams, each in its own task: one that fails ends only its own stream."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from lutetia.protocol.transport.base import Handler, Stream
from lutetia.protocol.transport.network_origin import prefix_of, quotas_of
from lutetia.system.errors import LutetiaError
from lutetia.system.log_limit import LimitedLog

log = logging.getLogger(__name__)

PLACES = 64
"""Streams of one protocol that are answered at once."""
PEER_SHARE = 4
"""One peer gets at most one in so many places."""
KEPT_SHARE = 4
"""One in so many places is kept for peers with accepted work."""
STREAMS_AT_ONCE, STREAMS_PER_SECOND = 128, 32.0
"""Streams of one origin that are answered without delay: burst and rate. A prefix has PREFIX_FACTOR times both."""
LONGEST_DELAY = 5.0
"""Seconds; a stream that would wait longer is refused."""
_MOST_REMEMBERED = 4096


@dataclass(frozen=True, eq=False)
class StreamPlace:
    """An open stream as the limits see it. `moved` is when its last byte came or went, in seconds of the loop's clock."""

    peer_id: str
    origin: str
    moved: float


def give_way(open_streams: Collection[StreamPlace], newcomer: StreamPlace) -> StreamPlace | None:
    """Which stream ends so that `newcomer` gets its place; None: the newcomer is refused.

    The one of the most crowded prefix, and there of the most crowded origin, that has been silent for longest. It gives way only
    if its prefix, or its origin within the same prefix, then still has no fewer streams than the newcomer's.
    """
    longest = most_crowded(open_streams)
    if longest is None:
        return None
    crowded, own = prefix_of(longest.origin), prefix_of(newcomer.origin)
    if crowded == own:
        origins = Counter(each.origin for each in open_streams)
        return longest if origins[longest.origin] >= origins[newcomer.origin] + 2 else None
    prefixes = Counter(prefix_of(each.origin) for each in open_streams)
    return longest if prefixes[crowded] >= prefixes[own] + 2 else None


def most_crowded(open_streams: Collection[StreamPlace]) -> StreamPlace | None:
    """The stream that has been silent for longest, of the most crowded origin of the most crowded prefix."""
    prefixes = Counter(prefix_of(each.origin) for each in open_streams)
    origins = Counter(each.origin for each in open_streams)
    return max(open_streams, key=lambda each: (prefixes[prefix_of(each.origin)], origins[each.origin], -each.moved), default=None)


@dataclass
class StreamPace:
    """How long the streams of each origin wait before they are answered, so that none costs more than a share of the processor.

    Whoever asks without pause waits, and is not refused, so that asking again gains nothing. By the generic cell rate algorithm:
    each origin has a moment at which its streams so far will have had their time (ITU-T I.371, virtual scheduling).
    """

    at_once: int = STREAMS_AT_ONCE
    per_second: float = STREAMS_PER_SECOND
    _due: dict[str, float] = field(default_factory=dict)

    def delay(self, origin: str, now: float) -> float | None:
        """Seconds that a new stream of `origin` waits; None: too long, and it is not counted. `now`: seconds of any clock."""
        window, due, delay = self.at_once / self.per_second, dict[str, float](), 0.0
        for name, share in quotas_of(origin):
            due[name] = max(self._due.get(name, 0.0), now - window) + 1 / (share * self.per_second)
            delay = max(delay, due[name] - now)
        if delay > LONGEST_DELAY:
            return None
        if len(self._due) > _MOST_REMEMBERED:
            self._due = {name: moment for name, moment in self._due.items() if moment > now - window}
        self._due |= due
        return delay


class HandlerTasks:
    """The running handlers, at most `places` of each protocol.

    A protocol that is flooded thus takes nothing from the others. One peer gets at most a quarter of the places. When they are
    taken, the most crowded network gives way (`give_way`). Streams of one origin are answered at a pace (`StreamPace`). `known`
    says which peers have accepted work: a share of the places is kept for them, they give way to nobody else and have no pace.
    """

    def __init__(self, places: int = PLACES, pace: StreamPace | None = None) -> None:
        self.known: Callable[[str], bool] = lambda peer_id: False
        self._places = places
        self._open: defaultdict[str, dict[asyncio.Task[None], tuple[Stream, bool]]] = defaultdict(dict)
        """Protocol -> running handler -> its stream, and whether that is of a known peer."""
        self._pace = pace or StreamPace()
        self._refused, self._ended_badly = LimitedLog(log), LimitedLog(log)

    def start(self, protocol: str, handler: Handler, stream: Stream) -> bool:
        """Run `handler` in the background and close `stream` at its end. False when it gets no place."""
        loop, tasks = asyncio.get_running_loop(), self._open[protocol]
        stream.moved = loop.time()
        known = self.known(stream.peer_id)
        delay = 0.0 if known else self._pace.delay(stream.origin, loop.time())
        if delay is None or not self._make_room(tasks, stream, known):
            origin = stream.origin or "relays"
            text = "refused a stream %s of peer %s from %s: %d are open"
            self._refused(logging.WARNING, origin, text, protocol, stream.peer_id, origin, len(tasks))
            return False
        task = loop.create_task(_answer(handler, stream, delay))
        tasks[task] = stream, known
        task.add_done_callback(lambda done: self._ended(done, protocol, stream))
        return True

    async def close(self) -> None:
        """Cancel all handlers and wait until they have ended."""
        tasks = [task for tasks in self._open.values() for task in tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _make_room(self, tasks: dict[asyncio.Task[None], tuple[Stream, bool]], stream: Stream, known: bool) -> bool:
        """End a stream if that gives the new one a place. False when there is none for it."""
        if sum(other.peer_id == stream.peer_id for other, _ in tasks.values()) >= max(1, self._places // PEER_SHARE):
            return False
        for_strangers = self._places - self._places // KEPT_SHARE
        if len(tasks) < self._places and (known or sum(not each for _, each in tasks.values()) < for_strangers):
            return True
        running = {StreamPlace(other.peer_id, other.origin, other.moved): task for task, (other, _) in tasks.items()}
        newcomer = StreamPlace(stream.peer_id, stream.origin, stream.moved)
        strangers = [place for place, task in running.items() if not tasks[task][1]]
        victim = most_crowded(strangers) or give_way(running, newcomer) if known else give_way(strangers, newcomer)
        if victim is None:
            return False
        running[victim].cancel()
        tasks.pop(running[victim])
        return True

    def _ended(self, task: asyncio.Task[None], protocol: str, stream: Stream) -> None:
        self._open[protocol].pop(task, None)
        error, origin = None if task.cancelled() else task.exception(), stream.origin or "relays"
        if isinstance(error, (LutetiaError, OSError, EOFError, TimeoutError)):
            self._ended_badly(logging.INFO, origin, "stream %s of %s ended: %s", protocol, stream.peer_id, error)
        elif error is not None:
            text = "the handler of %s failed for %s"
            self._ended_badly(logging.ERROR, origin, text, protocol, stream.peer_id, exc_info=error)


async def _answer(handler: Handler, stream: Stream, delay: float) -> None:
    try:
        if delay:
            await asyncio.sleep(delay)
        await handler(stream)
    finally:
        await stream.close()
