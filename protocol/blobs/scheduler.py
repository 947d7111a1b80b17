"""Which worker fetches which chunks of a blob. Spans are given out, stolen from slow workers, returned by failed ones. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MAX_SPAN = 128
FIRST_SPAN = 8
SPAN_SECONDS = 2.0
_SMOOTHING = 0.3


@dataclass(eq=False)
class Span:
    """Chunks `first` to `end` (exclusive), read in order by `worker`, which began chunk `next` at `since`.

    `doubles`: another worker fetches the same chunk at the same time.
    """

    worker: int
    first: int
    next: int
    end: int
    since: float
    doubles: bool = False

    @property
    def left(self) -> int:
        return max(0, self.end - self.next)


class DownloadPlan:
    """The chunks still missing and the spans in flight. Times are seconds of any monotonic clock."""

    def __init__(self, missing: Iterable[int]) -> None:
        self._missing = set(missing)
        self._pending = sorted(self._missing, reverse=True)  # the next one to give out is last
        self._spans: list[Span] = []
        self._pace: dict[int, float] = {}

    @property
    def done(self) -> bool:
        return not self._missing

    def pace(self, worker: int) -> float | None:
        """Recent seconds per chunk of `worker`; None before its first."""
        return self._pace.get(worker)

    def take(self, worker: int, now: float, workers: int = 1) -> Span | None:
        """The next span for `worker`: SPAN_SECONDS of work, less when others need their share. None: all are given out."""
        if not self._pending:
            return None
        pace = self._pace.get(worker)
        wanted = FIRST_SPAN if pace is None else int(SPAN_SECONDS / max(pace, 1e-6))
        share = len(self._pending) if workers <= 1 else len(self._pending) // (2 * workers)
        width = max(1, min(wanted, share, MAX_SPAN))
        first = last = self._pending.pop()
        while last + 1 - first < width and self._pending and self._pending[-1] == last + 1:
            last = self._pending.pop()
        return self._begin(worker, first, last + 1, now)

    def steal(self, thief: int, now: float) -> Span | None:
        """The later half of the slowest other worker's span, or its last chunk if that is long overdue. None: not worth it."""
        others = [span for span in self._spans if span.worker != thief and span.left]
        victim = max(others, key=lambda span: self._seconds_left(span, now), default=None)
        if victim is None or self._seconds_left(victim, now) < 2 * self._pace.get(thief, 1.0):
            return None
        if victim.left > 1:
            middle = victim.next + (victim.left + 1) // 2
            stolen = self._begin(thief, middle, victim.end, now)
            victim.end = middle
            return stolen
        if any(span is not victim and span.first <= victim.next < span.end for span in self._spans):
            return None  # another worker doubles it already
        return self._begin(thief, victim.next, victim.end, now, doubles=True)

    def is_missing(self, index: int) -> bool:
        return index in self._missing

    def advance(self, span: Span, now: float) -> None:
        """Note that chunk `span.next` has been read, though not verified yet."""
        seconds, old = now - span.since, self._pace.get(span.worker)
        self._pace[span.worker] = seconds if old is None else (1 - _SMOOTHING) * old + _SMOOTHING * seconds
        span.next, span.since = span.next + 1, now

    def arrived(self, span: Span, index: int) -> list[int]:
        """Note that chunk `index` of `span` is verified and kept. Returns the workers that were too slow at it."""
        self._missing.discard(index)
        if not span.doubles:
            return []
        return [other.worker for other in self._spans if other is not span and other.next == index and other.left]

    def release(self, span: Span) -> None:
        """End `span`, finished or not. Its missing chunks are pending again."""
        self._spans.remove(span)
        covered = {index for other in self._spans for index in range(other.first, other.end)}
        left = (self._missing - covered).intersection(range(span.first, span.end))
        if left:
            self._pending = sorted({*self._pending, *left}, reverse=True)

    def _begin(self, worker: int, first: int, end: int, now: float, doubles: bool = False) -> Span:
        span = Span(worker, first, first, end, now, doubles)
        self._spans.append(span)
        return span

    def _seconds_left(self, span: Span, now: float) -> float:
        """At the worker's pace or that of its current chunk, whichever is slower."""
        return span.left * max(self._pace.get(span.worker, 0.0), now - span.since)
