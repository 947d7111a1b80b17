"""An immutable map: `set` returns a new one and leaves the old, at the cost of copying one small bucket."""

from __future__ import annotations

import zlib
from collections.abc import ItemsView, Iterable, Iterator, Mapping, ValuesView
from typing import Any, Generic, TypeVar, cast, get_args

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

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

    def items(self) -> ItemsView[K, V]:
        return _Items(self)

    def values(self) -> ValuesView[V]:
        return _Values(self)

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"PersistentMap({dict(self)})"

    @classmethod
    def of(cls, pairs: Iterable[tuple[K, V]]) -> PersistentMap[K, V]:
        """The map that `set` makes of `pairs` one after the other."""
        buckets: tuple[dict[K, V], ...] = tuple({} for _ in range(_BUCKETS))
        for key, value in pairs:
            buckets[_bucket(key)][key] = value
        return PersistentMap(buckets, sum(map(len, buckets)))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return _pairs_schema(cls.of, source, handler)

    def set(self, key: K, value: V) -> PersistentMap[K, V]:
        index = _bucket(key)
        old = self._buckets[index]
        grown = self._count + (key not in old)
        return PersistentMap((*self._buckets[:index], {**old, key: value}, *self._buckets[index + 1 :]), grown)


class _Items(ItemsView[K, V]):
    """Reads the buckets, instead of looking up every key again."""

    def __iter__(self) -> Iterator[tuple[K, V]]:
        for bucket in cast(PersistentMap[K, V], self._mapping)._buckets:
            yield from bucket.items()


class _Values(ValuesView[V]):
    """The same."""

    def __iter__(self) -> Iterator[V]:
        for bucket in cast(PersistentMap[Any, V], self._mapping)._buckets:
            yield from bucket.values()


class AsPairs:
    """An annotation: pydantic writes and reads a mapping as a list of pairs, in its order. Keys of JSON's own are texts."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return _pairs_schema(dict, source, handler)


def _pairs_schema(make: Any, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
    """The schema of a mapping type `source[K, V]` that `make` makes of a list of pairs."""
    pairs = handler.generate_schema(list[tuple[get_args(source)]])  # pyright: ignore[reportInvalidTypeForm]
    written = core_schema.plain_serializer_function_ser_schema(lambda mapping: list(mapping.items()), return_schema=pairs)
    return core_schema.no_info_after_validator_function(make, pairs, serialization=written)
