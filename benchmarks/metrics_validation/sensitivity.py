"""The sensitivity table: the figure of each metric on real clips and on the same clips with known faults.

The conditions are real clips, mild noise, strong noise, shuffled frames, frozen first frame and shuffled captions. No metric
sees every fault, and none has to: each names the conditions that it must put in order, and at least one metric must notice
each fault.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from benchmarks.metrics_validation.degradations import (
    MILD_SIGMA,
    STRONG_SIGMA,
    frozen,
    noisy,
    shuffled_captions,
    shuffled_frames,
)
from lutetia.models.metrics.clips import ClipSet
from lutetia.models.metrics.stats.intervals import Figure, Statistic, subsampling
from lutetia.protocol.schema.canonical import Frozen

REAL, MILD, STRONG, SHUFFLED, FROZEN, CAPTIONS = (
    "real", "mild noise", "strong noise", "shuffled frames", "frozen first frame", "shuffled captions",
)  # fmt: skip
CONDITIONS = (REAL, MILD, STRONG, SHUFFLED, FROZEN, CAPTIONS)
# from best to worst, as the literature orders them; the frozen clip has no agreed place
ORDER = (REAL, MILD, STRONG, SHUFFLED, CAPTIONS)


@dataclass(frozen=True)
class Measure:
    """A metric of the table.

    Args:
        name: as printed.
        prepare: turns clips into a statistic of one index array over the clips. A metric that compares the clips with its
            own reference takes two: over the reference clips and over the clips.
        better: which direction is better.
        order: the conditions that it must put in this order, best first.
        reference: number of its reference clips; 0 if it has none.
    """

    name: str
    prepare: Callable[[ClipSet], Statistic]
    better: Literal["lower", "higher"]
    order: tuple[str, ...]
    reference: int = 0

    def sizes(self, clips: int) -> list[int]:
        """The length of each index array of the statistic."""
        return [self.reference, clips] if self.reference else [clips]


class SensitivityRow(Frozen):
    """One metric of the table, measured."""

    name: str = Field(description="name of the metric")
    better: Literal["lower", "higher"] = Field(description="which direction is better")
    figures: dict[str, Figure] = Field(description="condition to the figure, in the unit of the metric")
    excess: dict[str, Figure] = Field(description="fault to how much worse the figure is than on the same clips without it")
    order: tuple[str, ...] = Field(description="conditions that the metric must put in this order, best first")
    in_order: bool = Field(description="whether the figures get strictly worse along `order`")
    whole_order: bool = Field(description="whether the figures get strictly worse along all of ORDER")
    notices: tuple[str, ...] = Field(description="faults whose interval of the excess lies above 0")


class SensitivityTable(Frozen):
    """All metrics on all conditions."""

    rows: tuple[SensitivityRow, ...] = Field(description="one row per metric")
    conditions: tuple[str, ...] = Field(description="the columns")
    unnoticed: tuple[str, ...] = Field(description="faults that no metric tells from real clips; empty if the set is sound")

    def markdown(self) -> str:
        """The table, with the faults that each metric notices."""
        head = ["metric", *self.conditions, "in order", "notices"]
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for row in self.rows:
            cells = [str(row.figures[condition]) for condition in self.conditions]
            order = f"{' → '.join(row.order)}: {'yes' if row.in_order else 'NO'}"
            arrow = "↓" if row.better == "lower" else "↑"
            lines.append(f"| {row.name} {arrow} | " + " | ".join(cells) + f" | {order} | {', '.join(row.notices) or 'nothing'} |")
        return "\n".join(lines) + f"\n\nFaults that no metric notices: {', '.join(self.unnoticed) or 'none'}.\n"


def per_clip(values: Callable[[ClipSet], NDArray[np.float64]]) -> Callable[[ClipSet], Statistic]:
    """`prepare` for a metric that is the mean of one number per clip."""

    def prepare(clips: ClipSet) -> Statistic:
        numbers = values(clips)
        return lambda index: float(numbers[index].mean())

    return prepare


def against(
    reference: NDArray[np.float64],
    features: Callable[[ClipSet], NDArray[np.float64]],
    distance: Callable[[NDArray[np.float64], NDArray[np.float64]], float],
) -> Callable[[ClipSet], Statistic]:
    """`prepare` for a distance between features of clips and those of a reference."""

    def prepare(clips: ClipSet) -> Statistic:
        rows = features(clips)
        return lambda i, j: distance(reference[i], rows[j])

    return prepare


def degraded(real: ClipSet, conditions: Sequence[str] = CONDITIONS, seed: int = 0) -> dict[str, ClipSet]:
    """`real` under each condition."""
    makers: Mapping[str, Callable[[], ClipSet]] = {
        REAL: lambda: real,
        MILD: lambda: noisy(real, MILD_SIGMA, seed),
        STRONG: lambda: noisy(real, STRONG_SIGMA, seed),
        SHUFFLED: lambda: shuffled_frames(real, seed),
        FROZEN: lambda: frozen(real),
        CAPTIONS: lambda: shuffled_captions(real, seed),
    }
    return {condition: makers[condition]() for condition in conditions}


def sensitivity_table(
    real: ClipSet,
    measures: Sequence[Measure],
    *,
    conditions: Sequence[str] = CONDITIONS,
    seed: int = 0,
    resamples: int = 60,
    on_progress: Callable[[str, str], None] | None = None,
) -> SensitivityTable:
    """Measure `real` clips under every condition by every measure.

    Args:
        real: clips that are in no measure's reference.
        measures: the metrics.
        conditions: columns of the table; "real" must be among them.
        seed: of the faults.
        resamples: subsets drawn for each interval.
        on_progress: called with the metric and the condition before each measurement.
    """
    sets = degraded(real, conditions, seed)
    rows = []
    for measure in measures:
        prepared: dict[str, Statistic] = {}
        for condition, clips in sets.items():
            if on_progress:
                on_progress(measure.name, condition)
            prepared[condition] = measure.prepare(clips)
        rows.append(_row(measure, prepared, measure.sizes(len(real)), resamples))
    noticed = {condition for row in rows for condition in row.notices}
    unnoticed = tuple(condition for condition in conditions if condition not in (REAL, *noticed))
    return SensitivityTable(rows=tuple(rows), conditions=tuple(conditions), unnoticed=unnoticed)


def _row(measure: Measure, prepared: dict[str, Statistic], sizes: list[int], resamples: int) -> SensitivityRow:
    sign = 1 if measure.better == "lower" else -1
    figures = {condition: subsampling(statistic, sizes, resamples=resamples) for condition, statistic in prepared.items()}

    def worse(condition: str) -> Statistic:
        # with the same indices on both: clips that are hard for the metric anyway drop out of the difference
        return lambda *index: sign * (prepared[condition](*index) - prepared[REAL](*index))

    excess = {condition: subsampling(worse(condition), sizes, resamples=resamples) for condition in prepared if condition != REAL}

    def rising(conditions: Sequence[str]) -> bool:
        values = [sign * figures[condition].value for condition in conditions]
        return all(a < b for a, b in zip(values, values[1:], strict=False))

    present = [condition for condition in measure.order if condition in figures]
    whole = [condition for condition in ORDER if condition in figures]
    return SensitivityRow(
        name=measure.name,
        better=measure.better,
        figures=figures,
        excess=excess,
        order=tuple(present),
        in_order=rising(present),
        whole_order=rising(whole),
        notices=tuple(condition for condition, figure in excess.items() if figure.low > 0),
    )
