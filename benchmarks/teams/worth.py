"""How many nodes a team is worth: steps that one node needs for the team's held-out loss, over the team's own steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.teams.arms import Cell, Result

Point = tuple[float, float]
"""Steps and held-out loss."""


@dataclass(frozen=True)
class Worth:
    """A reading.

    Attributes:
        nodes: the worth, in nodes.
        bound: "": read between two points; ">": the loss is below the whole curve, so it is worth more; "<": above it.
    """

    nodes: float
    bound: str = ""

    def __str__(self) -> str:
        return f"{self.bound}{' ' if self.bound else ''}{self.nodes:.2f}"


def curve_of_one_node(done: Mapping[Cell, Result], team: Cell) -> list[Point]:
    """One node's points with the team's size, batch, seed and parent, at the best rate of each number of steps."""
    best: dict[int, float] = {}
    for cell, result in done.items():
        if cell.arm == "one" and place(cell) == place(team):
            best[cell.steps] = min(result.loss, best.get(cell.steps, math.inf))
    return sorted(best.items())


def worth(curve: Sequence[Point], steps: int, loss: float) -> Worth | None:
    """What a team with `loss` after `steps` steps is worth, read off between points in log steps; None: no curve.

    A curve that rises somewhere is read as the lowest loss so far: more steps can be left unused.
    """
    falling = _lowest_so_far(curve)
    if len(falling) < 2:
        return None
    if loss > falling[0][1]:
        return Worth(falling[0][0] / steps, "<")
    for (before, high), (after, low) in zip(falling[:-1], falling[1:], strict=True):
        if high >= loss >= low:
            share = (high - loss) / (high - low)
            return Worth(before * (after / before) ** share / steps)
    return Worth(falling[-1][0] / steps, ">")


def _lowest_so_far(curve: Iterable[Point]) -> list[Point]:
    falling: list[Point] = []
    for steps, loss in curve:
        if not falling or loss < falling[-1][1]:
            falling.append((steps, loss))
    return falling


def place(cell: Cell) -> tuple[str, int, int, int]:
    """What a team and the node that it is compared with have in common: size, batch, seed and parent."""
    return cell.size, cell.batch, cell.seed, cell.parent
