"""Blobs as the simulation knows them: what a checkpoint's bytes are worth, who holds them, and how long fetching takes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from lutetia.protocol.blobs.download import PARALLEL
from lutetia.simulation.costs import Costs
from lutetia.simulation.event_queue import EventQueue
from lutetia.simulation.network.links import Links, SimulatedPeer
from lutetia.system.errors import UnreachableError

T = TypeVar("T")

_HOPELESS = 10 * 1024.0
_PATIENCE = 30.0


@dataclass(frozen=True, slots=True)
class Content:
    """What lies behind a checkpoint: its weights by hash, their held-out loss, and what a look inside would show.

    `intact`: the bytes hash to their name. `sound`: names, shapes and dtypes of the manifest, all finite. `faked`: which
    steps were not taken, as only a replay can tell: none, all, or all but the first, which a replay of the first does not see.
    """

    weights: str
    loss: float
    intact: bool = True
    sound: bool = True
    faked: Literal["none", "all", "end"] = "none"


def honest_loss(shard: int, epoch: int, weights: str) -> float:
    """The model of learning: an exponential approach with a little noise, which depends on the weights alone."""
    noise = int(weights[:8], 16) / 2**32 - 0.5
    return (0.25 + 0.05 * (shard % 3)) * (1 + 2 * math.exp(-epoch / 6)) * (1 + 0.004 * noise)


@dataclass(frozen=True, slots=True)
class SimulatedDelay(Awaitable[None]):
    """Awaited inside a simulated coroutine: go on in `seconds`."""

    seconds: float

    def __await__(self) -> Generator[SimulatedDelay, None, None]:
        yield self


def drive(queue: EventQueue, work: Coroutine[Any, Any, T], done: Callable[[T], object]) -> None:
    """Run a coroutine that waits by `SimulatedDelay` only; `done` gets its result in virtual time."""
    try:
        pause = work.send(None)
    except StopIteration as end:
        done(end.value)
    else:
        queue.after(pause.seconds, drive, queue, work, done)


class SimulatedBlobs:
    """Who holds which parcel. A parcel is all blobs of a checkpoint (by its digest) or the data of a shard (by its name)."""

    def __init__(self, queue: EventQueue, links: Links, costs: Costs, slots: int) -> None:
        self._queue, self._links, self._costs, self._slots = queue, links, costs, slots
        self.contents: dict[str, Content] = {}
        self.holders: dict[str, dict[int, SimulatedPeer]] = {}
        self.rotten: set[tuple[int, str]] = set()
        self.origins: set[int] = set()
        self._serving: dict[int, int] = {}

    def put(self, parcel: str, holder: SimulatedPeer) -> None:
        self.holders.setdefault(parcel, {})[holder.index] = holder

    def drop(self, parcel: str, holder: SimulatedPeer) -> None:
        self.holders.get(parcel, {}).pop(holder.index, None)

    def wipe(self, holder: SimulatedPeer) -> None:
        """Its disk is gone."""
        for parcel in self.holders.values():
            parcel.pop(holder.index, None)

    def has(self, parcel: str, holder: SimulatedPeer) -> bool:
        return holder.index in self.holders.get(parcel, {})

    async def fetch(self, taker: SimulatedPeer, parcel: str, size: int, hints: Iterable[SimulatedPeer] = ()) -> None:
        """Volunteers first, up to four at once, each by its rate; what a provider spoils or leaves undone comes from the others.

        Raises UnreachableError when nobody is left who could give the rest.
        """
        left, refused, known = float(size), set(), {member.index: member for member in hints}
        while left >= 1 and not self.has(parcel, taker):
            sources = self._sources(taker, parcel, known, refused)
            rates = [self._links.rate(source) / (1 + self._serving.get(source.index, 0)) for source in sources]
            if not sources or sum(rates) < _HOPELESS:
                await SimulatedDelay(_PATIENCE if sources else 3.0)
                raise UnreachableError(f"nobody within reach gives parcel {parcel[:12]} in time; trying again")
            for source in sources:
                self._serving[source.index] = self._serving.get(source.index, 0) + 1
            await SimulatedDelay(4 * self._links.packet(taker, sources[0]) + left / sum(rates))
            failed = 0.0
            for source, rate in zip(sources, rates, strict=True):
                self._serving[source.index] -= 1
                if (source.index, parcel) in self.rotten or not self._links.dials(taker, source) or not self.has(parcel, source):
                    refused.add(source.index)
                    failed += rate / sum(rates)
            self._costs.moved(left)
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
    """The model of training: weights are a hash of where they began, of the device's arithmetic and of the steps taken, in order.

    `spans` are half-open ranges of steps, one per sitting. A step's randomness is keyed by its number, so spans that meet count
    as one: a resumed epoch that took every step once gives the weights of an uninterrupted one (I7), anything else gives others.
    """
    met: list[tuple[int, int]] = []
    for first, last in spans:
        if met and met[-1][1] == first:
            met[-1] = (met[-1][0], last)
        else:
            met.append((first, last))
    text = f"{shard}|{epoch}|{parent}|{device}|{met}"
    return hashlib.sha256(text.encode()).hexdigest()


def sitting(spans: tuple[tuple[int, int], ...], first: int, last: int) -> tuple[tuple[int, int], ...]:
    """`spans` and then [first, last), if that is any step at all."""
    return (*spans, (first, last)) if first < last else spans
