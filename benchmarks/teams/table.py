"""The table and the drawing of the measured cells."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks.teams.arms import Cell, Result, cell_of
from benchmarks.teams.worth import Worth, curve_of_one_node, worth

LINES = "cells.jsonl"
Done = Mapping[Cell, Result]


def read_cells(folder: Path) -> dict[Cell, Result]:
    """The cells of the lines in `folder`; a line that a kill cut off is left out."""
    path, done = folder / LINES, dict[Cell, Result]()
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        done[cell_of(values)] = Result(values["loss"], values["seconds"])
    return done


def write_cell(folder: Path, cell: Cell, result: Result) -> None:
    """Append a line."""
    with (folder / LINES).open("a") as lines:
        lines.write(json.dumps(asdict(cell) | asdict(result)) + "\n")


def table(done: Done) -> str:
    """A row per arm at its best rate, with the worth of a team in nodes."""
    head = "| size | after | batch | what | steps | rate | loss | worth, nodes | seeds |\n|---|---|---|---|---|---|---|---|---|"
    return "\n".join([head, *(_row(done, arm) for arm in _arms(done))])


def _arms(done: Done) -> list[Cell]:
    """The arms by size, batch and kind, without rate and seed."""
    kinds = ("one", "lanes", "branches", "whole")
    arms = {replace(cell, rate=0.0, seed=0) for cell in done}
    return sorted(
        arms, key=lambda arm: (_million(arm), arm.parent, arm.batch, kinds.index(arm.arm), arm.nodes, arm.steps, str(arm))
    )


def _million(arm: Cell) -> float:
    return float(arm.size[:-1]) if arm.size.endswith("M") else 1000.0


def _row(done: Done, arm: Cell) -> str:
    best = best_of_seeds(done, arm)
    losses = [done[cell].loss for cell in best]
    readings = [] if arm.arm == "one" else [found for cell in best if (found := _reading(done, cell))]
    rates = sorted({cell.rate for cell in best})
    rate = ", ".join(f"{rate:g}{_edge(done, arm, rate)}" for rate in rates)
    parent = f"{arm.parent} steps" if arm.parent else "first weights"
    cells = (arm.size, parent, arm.batch, describe(arm), arm.steps, rate, _spread(losses), _worths(readings), len(best))
    return f"| {' | '.join(map(str, cells))} |"


def best_of_seeds(done: Done, arm: Cell) -> list[Cell]:
    """The arm's cell with the lowest loss of each seed."""
    best: dict[int, Cell] = {}
    for cell, result in done.items():
        if replace(cell, rate=0.0, seed=0) == arm and (cell.seed not in best or result.loss < done[best[cell.seed]].loss):
            best[cell.seed] = cell
    return [best[seed] for seed in sorted(best)]


def describe(arm: Cell) -> str:
    """The arm in words."""
    if arm.arm == "one":
        return "one node"
    if arm.arm == "whole":
        return f"whole batch of {arm.nodes} nodes at every step"
    if arm.arm == "branches":
        return f"{arm.nodes} branches"
    parts = [f"{arm.nodes} lanes", f"H = {arm.interval}"]
    if arm.outer != (1.0, 0.0):
        parts.append(f"outer step {arm.outer[0]:g} / {arm.outer[1]:g}")
    if arm.moments == "new":
        parts.append("moments begun again")
    return ", ".join(parts)


def _reading(done: Done, cell: Cell) -> Worth | None:
    return worth(curve_of_one_node(done, cell), cell.steps, done[cell].loss)


def _edge(done: Done, arm: Cell, rate: float) -> str:
    """Says that a best rate is the lowest, the highest or the only one that was tried."""
    tried = {cell.rate for cell in done if replace(cell, rate=0.0, seed=0) == arm and cell.seed == 0}
    if len(tried) < 2:
        return " (only one)"
    return " (lowest)" if rate == min(tried) else " (highest)" if rate == max(tried) else ""


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} [{min(values):.4f}, {max(values):.4f}]"


def _worths(readings: Sequence[Worth]) -> str:
    if not readings:
        return ""
    if len(readings) == 1:
        return str(readings[0])
    mean = statistics.mean(reading.nodes for reading in readings)
    bounds = {reading.bound for reading in readings if reading.bound}
    note = f", {'/'.join(sorted(bounds))} the curve in {sum(bool(r.bound) for r in readings)}" if bounds else ""
    low, high = min(r.nodes for r in readings), max(r.nodes for r in readings)
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]{note}"


def draw(done: Done, path: Path) -> None:
    """Held-out loss over steps: one node's curve and the teams beside it, a panel per size and batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = [arm for arm in _arms(done) if arm.arm != "one"]
    panels = list(dict.fromkeys((arm.size, arm.batch, arm.parent) for arm in arms))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(5 * columns, 3.8 * rows), squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        mine = [arm for arm in arms if (arm.size, arm.batch, arm.parent) == panel]
        curve = curve_of_one_node(done, replace(mine[0], seed=0))
        axis.plot([steps for steps, _ in curve], [loss for _, loss in curve], "k.-", label="one node")
        for arm in mine:
            cell = best_of_seeds(done, arm)[0]
            axis.plot(arm.steps, done[cell].loss, {"lanes": "o", "whole": "s", "branches": "^"}[arm.arm], label=describe(arm))
        axis.set(xscale="log", xlabel="steps one after another", ylabel="held-out loss", title=f"{panel[0]}, batch {panel[1]}")
        axis.legend(fontsize=6)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
