"""The hash ring of all DHT members, and which of them keep the records of a key."""

from __future__ import annotations

import bisect
import hashlib
from dataclasses import dataclass
from typing import Generic, TypeVar

from lutetia.simulation.network.links import Links, SimulatedPeer

M = TypeVar("M", bound=SimulatedPeer)


@dataclass(frozen=True, slots=True)
class _Route(Generic[M]):
    """The replicas of a key, and the arc of the ring from its place to that of the last replica."""

    replicas: list[M]
    first: int
    last: int
    whole: bool
    """The walk passed every member."""

    def passes(self, place: int) -> bool:
        """Whether the walk depends on a member at this place."""
        if self.whole:
            return True
        if self.first <= self.last:
            return self.first <= place <= self.last
        return place >= self.first or place <= self.last


class Ring(Generic[M]):
    """A key is kept by the next `replicas` members that answer. A walk is kept until a member on its arc or a link changes."""

    def __init__(self, links: Links, replicas: int) -> None:
        self._links, self._replicas = links, replicas
        self._ring: list[tuple[int, int]] = []
        self._members: dict[int, M] = {}
        self._keys: dict[str, int] = {}
        self._routes: dict[tuple[str, int], _Route[M]] = {}
        self._links_version = 0

    def __len__(self) -> int:
        return len(self._members)

    def add(self, member: M, name: str) -> list[M]:
        """`member` answers from now on, at the place of `name`. Returns its neighbours, the next ones on the ring."""
        self._members[member.index] = member
        place = (_position(name), member.index)
        start = bisect.bisect_left(self._ring, place)
        if self._ring[start : start + 1] != [place]:
            self._ring.insert(start, place)
        self._moved(place[0])
        count = min(len(self._ring), self._replicas + 1)
        return [self._members[self._ring[(start + offset) % len(self._ring)][1]] for offset in range(1, count)]

    def remove(self, member: M) -> None:
        self._members.pop(member.index, None)
        self.changed(member)
        self._ring = [place for place in self._ring if place[1] != member.index]

    def changed(self, member: M) -> None:
        """A member stopped or began to answer."""
        for place, index in self._ring:
            if index == member.index:
                self._moved(place)

    def _moved(self, place: int) -> None:
        """Forget the walks that pass this place."""
        gone = [slot for slot, route in self._routes.items() if route.passes(place)]
        for slot in gone:
            del self._routes[slot]

    def nearest(self, source: M, key: str) -> list[M]:
        """The replicas of `key` as `source` finds them, itself included. The same list as long as nothing changes."""
        links = self._links
        if links.version != self._links_version:
            self._routes.clear()
            self._links_version = links.version
        slot = (key, -1 - source.index if links.blocked else links.group(source.index))
        route = self._routes.get(slot)
        if route is None:
            route = self._routes[slot] = self._walk(source, key)
        return route.replicas

    def _walk(self, source: M, key: str) -> _Route[M]:
        first = self._keys.get(key)
        if first is None:
            first = self._keys[key] = _position(key)
        ring, replicas, last = self._ring, list[M](), first
        start = bisect.bisect_left(ring, (first, -1))
        for offset in range(len(ring)):
            last, index = ring[(start + offset) % len(ring)]
            member = self._members[index]
            if member is source or self._links.dials(source, member):
                replicas.append(member)
                if len(replicas) == self._replicas:
                    return _Route(replicas, first, last, whole=offset == len(ring) - 1)
        return _Route(replicas, first, last, whole=True)


def _position(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
