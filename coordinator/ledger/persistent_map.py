"""An immutable map: `set` returns a new one and leaves the old, at the cost of copying one small bucket."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

_BUCKETS = 128

K = TypeVar("K", int, str)
V = TypeVar("V")


def _bucket(key: int | str) -> int:
    """Unlike `hash` of a str, the same in every process, so that replays iterate in the same order."""
    return (key if isinstance(key, int) else zlib.crc32(key.encode())) % _BUCKETS


class PersistentMap(Mapping[K, V], Generic[K, V]):
    """Immutable mapping from int or str; `set` costs O(n / 128)."""

    __slots__ = ("_buckets", "_count")

    def __init__(self, buckets: tuple[dict[K, V], ...] = ({},) * _BUCKETS, count: int = 0) -> None:
        self._buckets = buckets
        self._count = count

    def __getitem__(self, key: K) -> V:
        return self._buckets[_bucket(key)][key]

    def __iter__(self) -> Iterator[K]:
        for bucket in self._buckets:
            yield from bucket

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"PersistentMap({dict(self)})"

    def set(self, key: K, value: V) -> PersistentMap[K, V]:
        index = _bucket(key)
        old = self._buckets[index]
        grown = self._count + (key not in old)
        return PersistentMap((*self._buckets[:index], {**old, key: value}, *self._buckets[index + 1 :]), grown)
