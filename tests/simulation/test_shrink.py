"""Delta debugging on invented predicates."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from lutetia.simulation.shrink import shortest


@given(st.integers(1, 60), st.data())
def test_shortest_gives_exactly_the_needed_steps(count: int, data: st.DataObject) -> None:
    needed = data.draw(st.sets(st.integers(0, count - 1), max_size=5))
    steps = shortest(range(count), lambda chosen: needed <= set(chosen))
    assert steps == sorted(needed)


@given(st.integers(2, 40))
def test_shortest_of_two_sufficient_steps_is_one(count: int) -> None:
    steps = shortest(range(count), lambda chosen: 0 in chosen or count - 1 in chosen)
    assert steps in ([0], [count - 1])


def test_shortest_gives_up_after_max_tries() -> None:
    tried: list[Sequence[int]] = []

    def breaks(chosen: Sequence[int]) -> bool:
        tried.append(chosen)
        return len(chosen) >= 50

    steps = shortest(range(100), breaks, max_tries=10)
    assert len(tried) == 10
    assert len(steps) >= 50
