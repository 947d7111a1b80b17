"""Finding the peers nearest to a key that are really there. The search itself is pure; `run` asks.

As in Kademlia, with one difference: names prove nothing. Anybody can make up any number of peer ids next to any key, so only
those that answer count towards the width of a search, and who names silent ones is soon believed no more.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from lutetia.system.retry import backoff

AT_ONCE = 12
DOUBTFUL = 8
"""So many of somebody's peers may be silent, one more for each DOUBTFUL that answered, before the rest are left alone."""
PATIENCE = 1.0
"""Seconds without news, after which a search that has found enough does not wait for the slow."""
_REST, _LONGEST_REST, _MOST_SILENT = 5.0, 320.0, 4096


class Lookup:
    """Nodes are numbers; those of least XOR distance to `target` are sought. `known` are the first to ask."""

    def __init__(self, target: int, width: int, known: Iterable[int]) -> None:
        self._target, self._width = target, width
        self._namers: dict[int, set[int]] = {node: set() for node in known}
        self._trusted = set(self._namers)
        self._waiting = set(self._namers)
        self._held_against: dict[int, set[int]] = {}
        self._silent: Counter[int] = Counter()
        self._heard: Counter[int] = Counter()
        self._answered: list[int] = []

    def next(self) -> int | None:
        """The nearest node worth asking now, which counts as asked from here on."""
        within = self._bound()
        node = min(
            (node for node in self._waiting if self._away(node) < within and self._believed(node)), key=self._away, default=None
        )
        if node is not None:
            self._waiting.discard(node)
            self._held_against[node] = set(self._namers[node])
            self._silent.update(self._held_against[node])  # until it answers
        return node

    def answered(self, node: int, named: Iterable[int]) -> None:
        """`node` is there, and names others."""
        namers = self._held_against.pop(node)
        self._silent.subtract(namers)
        self._heard.update(namers)
        self._answered.append(node)
        for other in named:
            if other not in self._namers:
                self._waiting.add(other)
            self._namers.setdefault(other, set()).add(node)

    @property
    def enough(self) -> bool:
        return len(self._answered) >= self._width

    def nearest(self) -> list[int]:
        """Of those that answered, the nearest first."""
        return sorted(self._answered, key=self._away)[: self._width]

    def _bound(self) -> float:
        """Farther ones are of no use."""
        return self._away(self.nearest()[-1]) if self.enough else float("inf")

    def _believed(self, node: int) -> bool:
        return node in self._trusted or any(
            self._silent[namer] < DOUBTFUL + self._heard[namer] // DOUBTFUL for namer in self._namers[node]
        )

    def _away(self, node: int) -> int:
        return node ^ self._target


async def run(search: Lookup, ask: Callable[[int], Awaitable[Iterable[int] | None]]) -> None:
    """Drive `search` to its end. `ask` returns what a node names, None when it does not answer."""
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
    """Who did not answer is left alone for a while, each time for twice as long. Times are seconds of any clock."""

    _until: dict[Any, tuple[int, float]] = field(default_factory=dict)

    def add(self, name: Any, now: float) -> None:
        times, _ = self._until.pop(name, (0, 0.0))
        self._until[name] = times + 1, now + backoff(times + 1, first=_REST, longest=_LONGEST_REST)
        if len(self._until) > _MOST_SILENT:
            del self._until[next(iter(self._until))]

    def forget(self, name: Any) -> None:
        self._until.pop(name, None)

    def left_alone(self, name: Any, now: float) -> bool:
        return name in self._until and now < self._until[name][1]
