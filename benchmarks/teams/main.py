"""`python -m benchmarks teams`: what 2, 4 and 8 nodes on one expert are worth, as lanes, as branches and with one whole batch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.report import Machine
from benchmarks.teams.arms import Arms
from benchmarks.teams.clips import team_clips
from benchmarks.teams.grid import grid
from benchmarks.teams.sizes import SIZES
from benchmarks.teams.table import LINES, draw, read_cells, table, write_cell


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks teams", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("teams"), help="folder of clips, lines and table (default: teams)")
    parser.add_argument(
        "--size", action="append", choices=sorted(SIZES), help="a size to measure, may be given again (default: all but toy)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the cells that decide (default: 3)")
    parser.add_argument("--resume", action="store_true", help="go on with the cells that an earlier call measured in the folder")
    parser.add_argument("--table", action="store_true", help="write table and drawing of the cells in the folder; train nothing")
    parser.add_argument("--averager", action="store_true", help="compare hivemind's averager with lanes, in real processes")
    arguments = parser.parse_args(argv)
    folder: Path = arguments.out
    torch.set_num_threads(1)
    if arguments.averager:
        from benchmarks.teams.averager import compare

        compare(folder)
        return
    if not arguments.table:
        if (folder / LINES).exists() and not arguments.resume:
            parser.error(f"{folder / LINES} exists; go on with --resume, or name another folder with --out")
        measure(folder, frozenset(arguments.size or SIZES.keys() - {"toy"}), arguments.seeds)
    done = read_cells(folder)
    if not done:
        parser.error(f"{folder} has no measured cells; measure some first, without --table")
    draw(done, folder / "worth.png")
    (folder / "table.md").write_text(table(done) + "\n")
    print(table(done))


def measure(folder: Path, sizes: frozenset[str], seeds: int) -> None:
    """Train the cells that have no line yet; each line is written when its cell ends."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "machine.json").write_text(json.dumps(asdict(Machine.this())))
    arms = Arms(team_clips(folder), folder)
    done = read_cells(folder)
    while (cell := next((each for each in grid(done, sizes, seeds) if each not in done), None)) is not None:
        done[cell] = arms.run(cell)
        write_cell(folder, cell, done[cell])
        print(f"{cell}: {done[cell]}", file=sys.stderr, flush=True)
