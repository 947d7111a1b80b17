"""The sanity ladder: what each metric says of real clips with known faults.

A metric earns its place in a report by this table: real clips, mild noise, strong noise, shuffled frames, frozen first frame,
shuffled captions. No metric sees every fault, and none is expected to: each names the rungs that it must climb in order, and
every fault must be noticed by at least one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lutetia.models.metrics.clips import ClipSet
from lutetia.models.metrics.stats.intervals import Figure, Statistic, subsampling
from lutetia.models.metrics.validation.degradations import (
    MILD_SIGMA,
    STRONG_SIGMA,
    frozen,
    noisy,
    shuffled_captions,
    shuffled_frames,
)
from lutetia.protocol.schema.canonical import Frozen

REAL, MILD, STRONG, SHUFFLED, FROZEN, CAPTIONS = (
    "real", "mild noise", "strong noise", "shuffled frames", "frozen first frame", "shuffled captions",
)  # fmt: skip
RUNGS = (REAL, MILD, STRONG, SHUFFLED, FROZEN, CAPTIONS)
# the ladder as it is usually drawn, from best to worst; the frozen clip stands beside it
ORDER = (REAL, MILD, STRONG, SHUFFLED, CAPTIONS)


@dataclass(frozen=True)
class Measure:
    """A metric on the ladder. `climbs` are the rungs that it must put in order.

    `prepare` turns clips into a statistic of one index array over the clips, or, where the metric compares them with a reference
    of its own, of two: over `reference` clips and over the clips.
    """

    name: str
    prepare: Callable[[ClipSet], Statistic]
    better: Literal["lower", "higher"]
    climbs: tuple[str, ...]
    reference: int = 0

    def sizes(self, clips: int) -> list[int]:
        """What the statistic's index arrays range over."""
        return [self.reference, clips] if self.reference else [clips]


class SensitivityRow(Frozen):
    """One metric: its figure on every rung and how much worse that is than on the same clips without the fault (`excess`).

    `in_order`: whether `climbs` rise strictly; `whole_ladder`: whether all of `ORDER` does; `notices`: excess above 0.
    """

    name: str
    better: Literal["lower", "higher"]
    figures: dict[str, Figure]
    excess: dict[str, Figure]
    climbs: tuple[str, ...]
    in_order: bool
    whole_ladder: bool
    notices: tuple[str, ...]


class SensitivityTable(Frozen):
    """All rows. `unnoticed`: faults that no metric tells from real clips; empty means that the set of metrics is sound."""

    rows: tuple[SensitivityRow, ...]
    rungs: tuple[str, ...]
    unnoticed: tuple[str, ...]

    def markdown(self) -> str:
        """The table, with what each metric notices."""
        lines = ["| metric | " + " | ".join(self.rungs) + " | in order | notices |", "|" + "---|" * (len(self.rungs) + 3)]
        for row in self.rows:
            cells = [str(row.figures[rung]) for rung in self.rungs]
            order = f"{' → '.join(row.climbs)}: {'yes' if row.in_order else 'NO'}"
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


def degraded(real: ClipSet, rungs: Sequence[str] = RUNGS, seed: int = 0) -> dict[str, ClipSet]:
    """`real` with each fault."""
    makers: Mapping[str, Callable[[], ClipSet]] = {
        REAL: lambda: real,
        MILD: lambda: noisy(real, MILD_SIGMA, seed),
        STRONG: lambda: noisy(real, STRONG_SIGMA, seed),
        SHUFFLED: lambda: shuffled_frames(real, seed),
        FROZEN: lambda: frozen(real),
        CAPTIONS: lambda: shuffled_captions(real, seed),
    }
    return {rung: makers[rung]() for rung in rungs}


def ladder(
    real: ClipSet,
    measures: Sequence[Measure],
    *,
    rungs: Sequence[str] = RUNGS,
    seed: int = 0,
    resamples: int = 60,
    on_progress: Callable[[str, str], None] | None = None,
) -> SensitivityTable:
    """Judge `real` clips, which no measure has in its reference, with every fault by every measure. `rungs` must hold "real"."""
    sets = degraded(real, rungs, seed)
    rows = []
    for measure in measures:
        prepared: dict[str, Statistic] = {}
        for rung, clips in sets.items():
            if on_progress:
                on_progress(measure.name, rung)
            prepared[rung] = measure.prepare(clips)
        rows.append(_row(measure, prepared, measure.sizes(len(real)), resamples))
    noticed = {rung for row in rows for rung in row.notices}
    return SensitivityTable(
        rows=tuple(rows), rungs=tuple(rungs), unnoticed=tuple(rung for rung in rungs if rung != REAL and rung not in noticed)
    )


def _row(measure: Measure, prepared: dict[str, Statistic], sizes: list[int], resamples: int) -> SensitivityRow:
    sign = 1 if measure.better == "lower" else -1
    figures = {rung: subsampling(statistic, sizes, resamples=resamples) for rung, statistic in prepared.items()}

    def worse(rung: str) -> Statistic:
        # with the same indices on both: clips that are hard for the metric anyway drop out of the difference
        return lambda *index: sign * (prepared[rung](*index) - prepared[REAL](*index))

    excess = {rung: subsampling(worse(rung), sizes, resamples=resamples) for rung in prepared if rung != REAL}

    def rising(rungs: Sequence[str]) -> bool:
        values = [sign * figures[rung].value for rung in rungs]
        return all(a < b for a, b in zip(values, values[1:], strict=False))

    present = [rung for rung in measure.climbs if rung in figures]
    whole = [rung for rung in ORDER if rung in figures]
    return SensitivityRow(
        name=measure.name,
        better=measure.better,
        figures=figures,
        excess=excess,
        climbs=tuple(present),
        in_order=rising(present),
        whole_ladder=rising(whole),
        notices=tuple(rung for rung, figure in excess.items() if figure.low > 0),
    )
