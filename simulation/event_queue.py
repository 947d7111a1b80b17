"""A heap of calls in virtual time. Equal seeds give equal orders."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

START = 1_800_000_000.0
_SPINS = 200_000


class EventLoopStuck(RuntimeError):
    """Calls cause calls and time does not pass: an endless loop in the simulated program."""


class EventQueue:
    """`now` is in Unix seconds. Every call remembers the trace entry that caused it, so that a violation can be explained."""

    __slots__ = ("_count", "_heap", "_spins", "cause", "done", "now")

    def __init__(self, start: float = START) -> None:
        self.now = start
        self.cause = -1
        self.done = 0
        self._count = self._spins = 0
        self._heap: list[tuple[float, int, int, Callable[..., object], tuple[Any, ...]]] = []

    def after(self, seconds: float, call: Callable[..., object], *args: Any) -> None:
        """Call `call(*args)` in `seconds` (at once: 0)."""
        self._count += 1
        heapq.heappush(self._heap, (self.now + seconds, self._count, self.cause, call, args))

    def run(self, until: float) -> None:
        """Make all calls that are due until `until`. Raises EventLoopStuck."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until:
            when, _, self.cause, call, args = pop(heap)
            if when > self.now:
                self.now, self._spins = when, 0
            else:
                self._spins += 1
                if self._spins > _SPINS:
                    raise EventLoopStuck(f"{_SPINS} calls in a row at the same moment, the last {call!r}")
            self.done += 1
            call(*args)
        self.now = max(self.now, until)
        self.cause = -1
