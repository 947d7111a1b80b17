"""Delta debugging: a shortest part of a list of steps that still violates an invariant (Zeller and Hildebrandt 2002)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

MAX_TRIES = 400


def shortest(numbers: Sequence[int], breaks: Callable[[Sequence[int]], bool], max_tries: int = MAX_TRIES) -> list[int]:
    """A sublist, in order, from which no single element can be left out; the shortest found so far after `max_tries` calls.

    Args:
        numbers: known to break.
        breaks: whether a sublist still breaks.
        max_tries: bound on the calls of `breaks`.
    """
    left, parts, tries = list(numbers), 2, 0
    while len(left) >= 1 and tries < max_tries:
        width = max(1, -(-len(left) // parts))
        for begin in range(0, len(left), width):
            shorter = left[:begin] + left[begin + width :]
            tries += 1
            if breaks(shorter):
                left, parts = shorter, max(2, parts - 1)
                break
            if tries >= max_tries:
                return left
        else:
            if width == 1:
                return left
            parts = min(len(left), 2 * parts)
    return left
