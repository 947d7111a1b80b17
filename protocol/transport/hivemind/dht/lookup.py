"""Find the peers nearest to a key. `Lookup` decides and does no I/O, `run_lookup` asks the peers.

It differs from Kademlia because anyone can make up peer ids next to any key: only peers that answer count towards the width of a
search, and a peer that names too many silent ones is no longer believed.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from lutetia.system.retry import backoff

AT_ONCE = 12
SILENT_ALLOWED = 8
"""Peers named by one peer that may be silent, plus one for every SILENT_ALLOWED that answered, before the others are skipped."""
PATIENCE = 1.0
"""Seconds without an answer after which a search that has found enough ends."""
_PAUSE, _LONGEST_PAUSE, _MOST_SILENT = 5.0, 320.0, 4096


class Lookup:
    """A search for the `width` nodes with the least XOR distance to `target`. Nodes are numbers.

    Args:
        target: The hashed key.
        width: How many nodes to find.
        known: The nodes to ask first.
    """

    def __init__(self, target: int, width: int, known: Iterable[int]) -> None:
        self._target, self._width = target, width
        self._namers: dict[int, set[int]] = {node: set() for node in known}
        self._trusted = set(self._namers)
        self._waiting = set(self._namers)
        self._blamed: dict[int, set[int]] = {}
        self._silent: Counter[int] = Counter()
        self._answering: Counter[int] = Counter()
        self._answered: list[int] = []

    def next(self) -> int | None:
        """The nearest node that is worth asking now. It counts as asked from here on."""
        bound = self._bound()
        candidates = (node for node in self._waiting if self._distance(node) < bound and self._trustworthy(node))
        node = min(candidates, key=self._distance, default=None)
        if node is not None:
            self._waiting.discard(node)
            self._blamed[node] = set(self._namers[node])
            self._silent.update(self._blamed[node])  # until it answers
        return node

    def answered(self, node: int, named: Iterable[int]) -> None:
        """Note that `node` answered and named other nodes."""
        namers = self._blamed.pop(node)
        self._silent.subtract(namers)
        self._answering.update(namers)
        self._answered.append(node)
        for other in named:
            if other not in self._namers:
                self._waiting.add(other)
            self._namers.setdefault(other, set()).add(node)

    @property
    def enough(self) -> bool:
        return len(self._answered) >= self._width

    def nearest(self) -> list[int]:
        """The nodes that answered, the nearest first."""
        return sorted(self._answered, key=self._distance)[: self._width]

    def _bound(self) -> float:
        """The distance from which on a node is of no use."""
        return self._distance(self.nearest()[-1]) if self.enough else float("inf")

    def _trustworthy(self, node: int) -> bool:
        return node in self._trusted or any(
            self._silent[namer] < SILENT_ALLOWED + self._answering[namer] // SILENT_ALLOWED for namer in self._namers[node]
        )

    def _distance(self, node: int) -> int:
        return node ^ self._target


async def run_lookup(search: Lookup, ask: Callable[[int], Awaitable[Iterable[int] | None]]) -> None:
    """Run `search` to its end. `ask` returns the nodes that a node names, or None when it does not answer."""
    asked: dict[asyncio.Future[Iterable[int] | None], int] = {}
    try:
        while True:
            while len(asked) < AT_ONCE and (node := search.next()) is not None:
                asked[asyncio.ensure_future(ask(node))] = node
            done, _ = (
                await asyncio.wait(asked, timeout=PATIENCE if search.enough else None, return_when=asyncio.FIRST_COMPLETED)
                if asked
                else (set(), set())
            )
            if not done:
                return
            for answer in done:
                node, named = asked.pop(answer), answer.result()
                if named is not None:
                    search.answered(node, named)
    finally:
        for answer in asked:
            answer.cancel()


@dataclass
class UnresponsivePeers:
    """Peers that did not answer. Each is not asked again for a while, twice as long each time. Times are seconds of any clock."""

    _until: dict[Any, tuple[int, float]] = field(default_factory=dict)

    def add(self, name: Any, now: float) -> None:
        times, _ = self._until.pop(name, (0, 0.0))
        self._until[name] = times + 1, now + backoff(times + 1, first=_PAUSE, longest=_LONGEST_PAUSE)
        if len(self._until) > _MOST_SILENT:
            del self._until[next(iter(self._until))]

    def forget(self, name: Any) -> None:
        self._until.pop(name, None)

    def paused(self, name: Any, now: float) -> bool:
        return name in self._until and now < self._until[name][1]
