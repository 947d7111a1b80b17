"""Delta debugging: of a list of steps that breaks a promise, a shortest part that still does (Zeller and Hildebrandt 2002)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

MOST_TRIES = 400


def shortest(numbers: Sequence[int], breaks: Callable[[Sequence[int]], bool], most_tries: int = MOST_TRIES) -> list[int]:
    """A sublist, in order, of which no single element can be left out. `numbers` itself is known to break.

    Gives the shortest found when `most_tries` calls of `breaks` did not suffice.
    """
    left, parts, tries = list(numbers), 2, 0
    while len(left) >= 1 and tries < most_tries:
        width = max(1, -(-len(left) // parts))
        for begin in range(0, len(left), width):
            rest = left[:begin] + left[begin + width :]
            tries += 1
            if breaks(rest):
                left, parts = rest, max(2, parts - 1)
                break
            if tries >= most_tries:
                return left
        else:
            if width == 1:
                return left
            parts = min(len(left), 2 * parts)
    return left
