"""The map of the ledger's state: setting gives a new one and leaves the old."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lutetia.coordinator.ledger.persistent_map import PersistentMap


@given(st.one_of([st.lists(st.tuples(keys, st.integers())) for keys in (st.integers(0, 10**6), st.text(max_size=8))]))
def test_map_holds_what_was_set_last_and_older_maps_stay(pairs: list[tuple[Any, int]]) -> None:
    now, expected, before = PersistentMap[Any, int](), dict[Any, int](), []
    for key, value in pairs:
        before.append((now, dict(expected)))
        now, expected = now.set(key, value), {**expected, key: value}
    for held, known in (*before, (now, expected)):
        assert dict(held) == known
        assert dict(held.items()) == known
        assert sorted(held.values()) == sorted(known.values())
        assert len(held) == len(known)
        assert all(held[key] == value for key, value in known.items())
    assert list(now) == list(PersistentMap.of(pairs)), "in the order of the same keys set one after the other"
