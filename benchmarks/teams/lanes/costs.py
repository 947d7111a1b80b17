"""What a coordinator spent on the lanes of an epoch, and how that grows with their number. Pure."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Part = Literal["checks", "merges", "audits", "coordinator", "page", "p2pd"]
PARTS: tuple[Part, ...] = get_args(Part)
_WORKERS: Mapping[str, Part] = {
    "checking": "checks", "merging": "merges", "auditing": "audits", "proving": "audits", "proving-parents": "audits",
}  # fmt: skip


def part_of(command: Sequence[str]) -> Part:
    """Which part of the coordinator a process with this command line is."""
    if "p2pd" in " ".join(command):
        return "p2pd"
    if any(word.startswith("lutetia.coordinator.web") for word in command):
        return "page"
    if any(word.startswith("lutetia.coordinator.worker") for word in command):
        known: list[Part] = [_WORKERS[word] for word in command if word in _WORKERS]
        return known[0] if known else "coordinator"
    return "coordinator"


@dataclass(frozen=True)
class EpochCosts:
    """One epoch.

    Attributes:
        lanes: lanes of the run's shard.
        epoch: its number, 1 for the first.
        processor: processor seconds of each part of the coordinator.
        received: bytes of streams that the coordinator received: offers and the files of results.
        sent: bytes of streams that it sent: the merged epoch to each lane, and answers.
        gathered: seconds from the last lane's first offer to the last lane's acceptance; without lanes, to that of the epoch.
        merged: seconds from then to the acceptance of the merged epoch; 0 without lanes.
    """

    lanes: int
    epoch: int
    processor: Mapping[str, float]
    received: int
    sent: int
    gathered: float
    merged: float


@dataclass(frozen=True)
class RunCosts:
    """A run. `peak`: the most resident memory of each part, in MiB."""

    epochs: tuple[EpochCosts, ...]
    peak: Mapping[str, float]

    @property
    def lanes(self) -> int:
        return self.epochs[0].lanes


def quantities(epoch: EpochCosts) -> dict[str, float]:
    """What is compared between numbers of lanes, for the whole epoch."""
    spent = {f"{part}, processor s": epoch.processor.get(part, 0.0) for part in PARTS}
    return {
        **spent, "in all, processor s": sum(spent.values()), "MB received": epoch.received / 1e6, "MB sent": epoch.sent / 1e6,
        "last offer to last lane accepted, s": epoch.gathered, "then to the merged acceptance, s": epoch.merged,
    }  # fmt: skip


def growth(points: Iterable[tuple[int, float]]) -> float | None:
    """x where the value grows as (number of lanes)^x: the slope of a line through the logarithms. None: too few points."""
    logs = [(math.log(lanes), math.log(value)) for lanes, value in points if value > 0]
    if len({lanes for lanes, _ in logs}) < 2:
        return None
    return statistics.linear_regression([lanes for lanes, _ in logs], [value for _, value in logs]).slope


def table(runs: Sequence[RunCosts]) -> str:
    """Medians of the epochs after the first, in which processes start, with their range; each per lane, and the growth.

    Several runs of one number of lanes count together.
    """
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        for epoch in run.epochs[1:] or run.epochs:
            for name, value in quantities(epoch).items():
                found[name][run.lanes].append(value)
        for part, value in run.peak.items():
            found[f"{part}, MiB at most"][run.lanes].append(value)
    numbers = sorted({run.lanes for run in runs})
    rows = [f"| of an epoch | {' | '.join(f'{lanes} lanes' if lanes > 1 else 'no lanes' for lanes in numbers)} | grows as |"]
    rows.append("|---" * (len(numbers) + 2) + "|")
    for name, values in found.items():
        cells = [_cell(values[lanes]) if lanes in values else "" for lanes in numbers]
        slope = growth((lanes, statistics.median(values[lanes])) for lanes in numbers if lanes > 1 and lanes in values)
        rows.append(f"| {name} | {' | '.join(cells)} | {'' if slope is None else f'L^{slope:.2f}'} |")
    return "\n".join(rows)


def _cell(values: Sequence[float]) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.3g}" if len(values) == 1 else f"{middle:.3g} ({low:.3g} to {high:.3g})"
