"""Which cells are trained, in an order of which every beginning is a usable table; later ones at the best rates so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.teams.arms import Cell, Result
from benchmarks.teams.worth import place

Done = Mapping[Cell, Result]


@dataclass(frozen=True)
class Block:
    """Cells of one size and batch that are compared with the same curve of one node.

    Attributes:
        size: name of the expert's size.
        batch: samples per step of each node.
        steps: steps one after another.
        rates: learning rates that each arm is tried at, in multiples of the size's.
        slower: further rates for one node alone. Teams, whose gradients are less noisy, need none below their lowest.
        longer: multiples of `steps` that one node is trained for at its best rate, as far as a team's loss is below its curve.
        nodes: nodes of lanes and of the whole batch.
        interval: steps between two merges of lanes.
        parent: steps before, see `Cell`.
    """

    size: str
    batch: int
    steps: int
    rates: tuple[float, ...]
    slower: tuple[float, ...] = ()
    longer: tuple[float, ...] = (2, 4, 8)
    nodes: int = 4
    interval: int = 50
    parent: int = 0

    def rates_of(self, arm: Literal["one", "whole", "lanes"]) -> tuple[float, ...]:
        return (*self.rates, *self.slower) if arm == "one" else self.rates

    def cell(self, arm: Literal["one", "whole", "lanes"], rate: float, seed: int) -> Cell:
        team = {"one": {}, "whole": {"nodes": self.nodes}, "lanes": {"nodes": self.nodes, "interval": self.interval}}[arm]
        return Cell(self.size, arm, self.batch, self.steps, rate, seed, parent=self.parent, **team)


TINY_1, TINY_2 = Block("0.16M", 1, 500, (1, 2, 4)), Block("0.16M", 2, 500, (1, 2, 4))
TINY_8 = Block("0.16M", 8, 500, (2, 4))
MIDDLE_2, MIDDLE_8 = (Block("1.25M", batch, 300, (1, 2), slower=(0.5, 0.25)) for batch in (2, 8))
LARGE_2, LARGE_8 = (Block("21M", batch, 80, (1,), slower=(0.5, 0.25), interval=20, parent=100) for batch in (2, 8))
ADAPTERS_2 = Block("adapters", 2, 300, (1, 2), slower=(0.5, 0.25))


def grid(done: Done, sizes: frozenset[str], seeds: int) -> Iterator[Cell]:
    """The cells in the order in which they are trained.

    Args:
        done: what is measured already; best rates are read off it.
        sizes: names of the sizes that are wanted.
        seeds: how many seeds the cells of 0.16 M get that decide.
    """
    return (cell for cell in _ordered(done, seeds) if cell.size in sizes)


def _ordered(done: Done, seeds: int) -> Iterator[Cell]:
    yield from compared(TINY_2, 0, done)
    yield from compared(LARGE_2, 0, done)
    yield from branches(LARGE_2)
    yield from variants(TINY_2, done)
    yield from compared(TINY_8, 0, done)
    for seed in range(1, seeds):
        yield from compared(TINY_2, seed, done)
    yield from compared(MIDDLE_2, 0, done)
    yield from compared(ADAPTERS_2, 0, done)
    yield from compared(TINY_1, 0, done)
    for seed in range(1, seeds):
        yield from compared(LARGE_2, seed, done)
        yield from compared(MIDDLE_2, seed, done)
        yield from compared(TINY_8, seed, done)
    yield from more_variants(TINY_2, done)
    yield from variants(TINY_8, done)
    yield from compared(MIDDLE_8, 0, done)
    yield from compared(LARGE_8, 0, done)


def compared(block: Block, seed: int, done: Done) -> Iterator[Cell]:
    """One node, lanes and the whole batch; the first seed tries all rates, the others train at its best ones."""
    for arm in ("one", "lanes", "whole"):
        for rate in block.rates_of(arm) if seed == 0 else (best_rate(block, arm, done),):
            yield block.cell(arm, rate, seed)
        if arm != "one":
            yield from _longer(block, seed, done)


def _longer(block: Block, seed: int, done: Done) -> Iterator[Cell]:
    """One node with more steps, until its curve reaches down to the teams' losses."""
    one = block.cell("one", best_rate(block, "one", done), seed)
    mine = {cell: result.loss for cell, result in done.items() if place(cell) == place(one)}
    teams = min((loss for cell, loss in mine.items() if cell.arm != "one"), default=0.0)
    for multiple in block.longer:
        longer = replace(one, steps=round(block.steps * multiple))
        shorter = min((loss for cell, loss in mine.items() if cell.arm == "one" and cell.steps < longer.steps), default=0.0)
        if teams < shorter:
            yield longer


def variants(block: Block, done: Done) -> Iterator[Cell]:
    """Lanes with other intervals, an outer step and other numbers of nodes, and branches; at the best rate of four lanes."""
    lanes = block.cell("lanes", best_rate(block, "lanes", done), 0)
    yield replace(lanes, interval=10)
    yield replace(lanes, arm="branches", interval=0)
    yield replace(lanes, outer=(0.7, 0.9))
    yield replace(lanes, nodes=8)
    yield replace(lanes, interval=250)
    yield replace(lanes, nodes=2)


def branches(block: Block) -> Iterator[Cell]:
    """Branches at each rate of one node: after the split each child is one."""
    for rate in block.rates_of("one"):
        yield replace(block.cell("lanes", rate, 0), arm="branches", interval=0)


def more_variants(block: Block, done: Done) -> Iterator[Cell]:
    """Moments set to zero in every round, a milder outer step, and the whole batch of eight nodes."""
    lanes = block.cell("lanes", best_rate(block, "lanes", done), 0)
    yield replace(lanes, moments="new")
    yield replace(lanes, outer=(0.7, 0.5))
    yield replace(block.cell("whole", best_rate(block, "whole", done), 0), nodes=8)


def best_rate(block: Block, arm: Literal["one", "whole", "lanes"], done: Done) -> float:
    """The rate at which the arm has its lowest loss with the first seed; the middle one while none is measured."""
    losses = {rate: done[cell].loss for rate in block.rates_of(arm) if (cell := block.cell(arm, rate, 0)) in done}
    return min(losses, key=losses.__getitem__) if losses else block.rates[len(block.rates) // 2]
