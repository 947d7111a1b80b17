"""Blobs: what a checkpoint contains, which peers hold it, and how long a fetch takes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from lutetia.protocol.blobs.download import PARALLEL
from lutetia.simulation.costs import Costs
from lutetia.simulation.event_queue import EventQueue
from lutetia.simulation.network.held_out import Quality
from lutetia.simulation.network.links import Links, SimulatedPeer
from lutetia.system.errors import UnreachableError

T = TypeVar("T")

_HOPELESS = 10 * 1024.0
"""Model: a fetch fails when its providers together give fewer bytes per second."""
_PATIENCE = 30.0
"""Model: after how many seconds such a fetch fails."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a checkpoint contains: a hash of its weights, their held-out loss, and what checks would find.

    `intact`: the bytes match their digest. `sound`: names, shapes and dtypes of the manifest, all finite. `faked`: the steps
    that were not taken, which only a replay shows: none, all, or all but the first (seen by a replay of the whole epoch only).
    """

    weights: str
    loss: float
    intact: bool = True
    sound: bool = True
    faked: Literal["none", "all", "end"] = "none"
    quality: Quality | None = None
    """In settings with few held-out clips."""


def honest_loss(shard: int, epoch: int, weights: str) -> float:
    """The model of learning: an exponential approach with a little noise that depends only on the weights."""
    noise = int(weights[:8], 16) / 2**32 - 0.5
    return (0.25 + 0.05 * (shard % 3)) * (1 + 2 * math.exp(-epoch / 6)) * (1 + 0.004 * noise)


def untrained_loss(shard: int) -> float:
    """Held-out loss of a shard's initial model."""
    return (0.25 + 0.05 * (shard % 3)) * 3.2


@dataclass(frozen=True, slots=True)
class SimulatedDelay(Awaitable[None]):
    """Awaited in a simulated coroutine: continue in `seconds`."""

    seconds: float

    def __await__(self) -> Generator[SimulatedDelay, None, None]:
        yield self


def drive(queue: EventQueue, work: Coroutine[Any, Any, T], done: Callable[[T], object]) -> None:
    """Run a coroutine that awaits only `SimulatedDelay`; call `done` with its result."""
    try:
        pause = work.send(None)
    except StopIteration as end:
        done(end.value)
    else:
        queue.after(pause.seconds, drive, queue, work, done)


class SimulatedBlobs:
    """Which peers hold which parcel: all blobs of a checkpoint (by its digest) or the data of a shard (by its name)."""

    def __init__(self, queue: EventQueue, links: Links, costs: Costs, slots: int) -> None:
        self._queue, self._links, self._costs, self._slots = queue, links, costs, slots
        self.contents: dict[str, Content] = {}
        self.holders: dict[str, dict[int, SimulatedPeer]] = {}
        self.corrupt: set[tuple[int, str]] = set()
        self.origins: set[int] = set()
        self._serving: dict[int, int] = {}

    def put(self, parcel: str, holder: SimulatedPeer) -> None:
        self.holders.setdefault(parcel, {})[holder.index] = holder

    def drop(self, parcel: str, holder: SimulatedPeer) -> None:
        self.holders.get(parcel, {}).pop(holder.index, None)

    def wipe(self, holder: SimulatedPeer) -> None:
        """The holder's disk has failed."""
        for parcel in self.holders.values():
            parcel.pop(holder.index, None)

    def has(self, parcel: str, holder: SimulatedPeer) -> bool:
        return holder.index in self.holders.get(parcel, {})

    async def fetch(self, taker: SimulatedPeer, parcel: str, size: int, hints: Iterable[SimulatedPeer] = ()) -> None:
        """Fetch from several providers at once, nodes first, shared by rate; the others make up for corrupt or missing parts.

        Raises UnreachableError when no provider is left, or they are too slow.
        """
        left, refused, known = float(size), set(), {member.index: member for member in hints}
        while left >= 1 and not self.has(parcel, taker):
            sources = self._sources(taker, parcel, known, refused)
            rates = [self._links.rate(source) / (1 + self._serving.get(source.index, 0)) for source in sources]
            if not sources or sum(rates) < _HOPELESS:
                await SimulatedDelay(_PATIENCE if sources else 3.0)
                raise UnreachableError(f"no reachable peer serves parcel {parcel[:12]} fast enough; trying again")
            for source in sources:
                self._serving[source.index] = self._serving.get(source.index, 0) + 1
            await SimulatedDelay(4 * self._links.packet(taker, sources[0]) + left / sum(rates))
            failed = 0.0
            for source, rate in zip(sources, rates, strict=True):
                self._serving[source.index] -= 1
                if source.index in self.origins:
                    self._costs.served += left * rate / sum(rates)
                if (source.index, parcel) in self.corrupt or not self._links.dials(taker, source) or not self.has(parcel, source):
                    refused.add(source.index)
                    failed += rate / sum(rates)
            self._costs.moved(left)
            if taker.index in self.origins:
                self._costs.received += left
            left *= failed
        self.put(parcel, taker)

    def _sources(
        self, taker: SimulatedPeer, parcel: str, known: dict[int, SimulatedPeer], refused: set[int]
    ) -> list[SimulatedPeer]:
        held = self.holders.get(parcel, {})
        fit = [
            member for index, member in {**held, **known}.items()
            if index in held and index != taker.index and index not in refused and self._links.dials(taker, member)
            and not (index in self.origins and self._serving.get(index, 0) >= self._slots)
        ]  # fmt: skip
        fit.sort(key=lambda member: (member.index in self.origins, -self._links.rate(member), member.index))
        return fit[:PARALLEL]


def weights_after(shard: int, epoch: int, parent: str, device: str, spans: tuple[tuple[int, int], ...]) -> str:
    """The model of training: weights are a hash of their start, the kind of device and the steps taken, in order.

    `spans` are half-open ranges of steps, one per process. A step's randomness depends on its number, so adjacent spans count as
    one: a resumed epoch that took every step once gives the weights of an uninterrupted one (I7), any other gives other weights.
    """
    joined: list[tuple[int, int]] = []
    for first, last in spans:
        if joined and joined[-1][1] == first:
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    text = f"{shard}|{epoch}|{parent}|{device}|{joined}"
    return hashlib.sha256(text.encode()).hexdigest()


def merged_content(shard: int, epoch: int, contents: Sequence[Content]) -> Content:
    """The model of a merge: a hash of the merged weights, faked where one of them is."""
    weights = hashlib.sha256("|".join(["merged", *(content.weights for content in contents)]).encode()).hexdigest()
    faked = any(content.faked != "none" for content in contents)
    return Content(weights, honest_loss(shard, epoch, weights), faked="end" if faked else "none")


def with_span(spans: tuple[tuple[int, int], ...], first: int, last: int) -> tuple[tuple[int, int], ...]:
    """`spans` and then [first, last), if that is any step at all."""
    return (*spans, (first, last)) if first < last else spans
