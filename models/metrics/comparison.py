"""Compare two sides on the same prompts, for instance monolith and mixture over several training seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from lutetia.models.metrics.clips import ClipSet
from lutetia.models.metrics.evaluator import Evaluator, FeaturePair
from lutetia.models.metrics.fvd import distance_ratio
from lutetia.models.metrics.stats.frechet import Array, frechet_debiased, frechet_of_rows
from lutetia.models.metrics.stats.intervals import Figure, Statistic, nested, subsampling
from lutetia.protocol.schema.canonical import Frozen
from lutetia.system.errors import DataError

MEAN_RESAMPLES = 2000
FEWEST = 20


class Comparison(Frozen):
    """One metric on both sides. The N of each figure counts prompts."""

    name: str = Field(description="name of the metric")
    better: Literal["lower", "higher"] = Field(description="which direction is better")
    first: Figure = Field(description="the metric on the first side, in its own unit")
    second: Figure = Field(description="the metric on the second side, in its own unit")
    difference: Figure = Field(description="first - second")
    ratio: Figure | None = Field(default=None, description="first / second; distances only")
    second_is: Literal["better", "worse", "not told apart"] = Field(
        description="better or worse if the interval of the difference excludes 0, else not told apart"
    )


def compare(
    evaluator: Evaluator, first: Sequence[ClipSet], second: Sequence[ClipSet], *, seeds: Sequence[int], resamples: int = 60
) -> tuple[Comparison, ...]:
    """Compare two sides by every metric of `evaluator`.

    Clips are resampled by prompt, on both sides and for all seeds at once. With several seeds, the intervals include the spread
    between seeds.

    Args:
        evaluator: the metrics and the real clips.
        first: one set of clips per training seed. All sets, of both sides, are from the same prompts in the same order.
        second: likewise for the second side.
        seeds: the training seeds.
        resamples: subsets of clips for each interval of a distance.

    Raises DataError if the sides do not fit together.
    """
    _check(first, second, seeds)
    rows = []
    for name, view in evaluator.views.items():
        rows += _distances(name, view, first, second, seeds, resamples)
    for name, values in evaluator.values.items():
        a, b = (np.stack([values(clips) for clips in side]) for side in (first, second))
        rows.append(_values(name, a, b, seeds))
    return tuple(rows)


def compare_kinds(
    evaluator: Evaluator, first: Sequence[ClipSet], second: Sequence[ClipSet], *, seeds: Sequence[int], resamples: int = 60
) -> dict[str, tuple[Comparison, ...]]:
    """Compare by the first distance of `evaluator`, plain and debiased, within each kind that has FEWEST reference clips or more.

    It shows where a gain comes from: from better clips of every kind, or of the kind that got more of the training.
    Arguments as for `compare`.
    """
    _check(first, second, seeds)
    kinds = evaluator.reference.kinds
    if len(set(kinds)) < 2 or not evaluator.views:
        return {}
    name, whole = next(iter(evaluator.views.items()))
    by_kind = {}
    for kind in sorted(set(kinds)):
        rows = [row for row, other in enumerate(kinds) if other == kind]
        if len(rows) >= FEWEST:
            view = FeaturePair(whole.reference[rows], lambda clips, rows=rows: whole.features(clips)[rows])
            by_kind[kind] = tuple(_distances(name, view, first, second, seeds, resamples))
    return by_kind


def main_ratio(
    evaluator: Evaluator, first: Sequence[ClipSet], second: Sequence[ClipSet], *, seeds: Sequence[int], resamples: int = 60
) -> Figure | None:
    """First side / second side by the first distance of `evaluator`; None if it measures no distance."""
    _check(first, second, seeds)
    view = next(iter(evaluator.views.values()), None)
    if view is None:
        return None
    a, b = ([view.features(clips) for clips in side] for side in (first, second))
    return distance_ratio(view.reference, a, b, seeds=seeds, resamples=resamples)


def comparison_table(comparisons: Sequence[Comparison], first: str, second: str) -> str:
    """A Markdown table; `first` and `second` name the two sides."""
    lines = [f"| metric | {first} | {second} | ratio | difference | {second} is |", "|---|---|---|---|---|---|"]
    for row in comparisons:
        arrow = "↓" if row.better == "lower" else "↑"
        cells = (row.first, row.second, row.ratio or "–", row.difference, row.second_is)
        lines.append(f"| {row.name} {arrow} | " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _distances(
    name: str, view: FeaturePair, first: Sequence[ClipSet], second: Sequence[ClipSet], seeds: Sequence[int], resamples: int
) -> list[Comparison]:
    x = view.reference
    a, b = ([view.features(clips) for clips in side] for side in (first, second))
    sizes = [len(x), len(a[0])]
    comparisons = []
    for label, distance, times in (
        (name, frechet_of_rows, resamples),
        (f"{name}, debiased", frechet_debiased, max(20, resamples // 3)),
    ):

        def of(rows: Array, distance: Callable[[Array, Array], float] = distance) -> Statistic:
            return lambda i, j: distance(x[i], rows[j])

        def gap(u: Array, v: Array, distance: Callable[[Array, Array], float] = distance) -> Statistic:
            return lambda i, j: distance(x[i], u[j]) - distance(x[i], v[j])

        pairs = list(zip(a, b, strict=True))
        difference = _over([gap(u, v) for u, v in pairs], sizes, seeds, times)
        # a debiased distance may be near 0, so it cannot be a denominator
        ratio = distance_ratio(x, a, b, seeds=seeds, resamples=times) if distance is frechet_of_rows else None
        sides = [_over([of(rows) for rows in side], sizes, seeds, times) for side in (a, b)]
        comparisons.append(_comparison(label, "lower", sides[0], sides[1], difference, ratio))
    return comparisons


def _values(name: str, a: Array, b: Array, seeds: Sequence[int]) -> Comparison:
    """Compare per-clip values [seeds, N]. Means are cheap, so draw many subsets: a few might all hold the only hit."""
    sizes = [a.shape[1]]

    def over(rows: Array) -> Figure:
        return _over([lambda index, row=row: float(row[index].mean()) for row in rows], sizes, seeds, MEAN_RESAMPLES)

    return _comparison(name, "higher", over(a), over(b), over(a - b), None)


def _over(statistics: Sequence[Statistic], sizes: Sequence[int], seeds: Sequence[int], resamples: int) -> Figure:
    if len(statistics) == 1:
        return subsampling(statistics[0], sizes, resamples=resamples, seeds=seeds)
    return nested(statistics, sizes, seeds=seeds, resamples=resamples)


def _comparison(
    name: str, better: Literal["lower", "higher"], first: Figure, second: Figure, difference: Figure, ratio: Figure | None
) -> Comparison:
    side: Literal["better", "worse", "not told apart"] = "not told apart"
    if difference.low > 0:
        side = "better" if better == "lower" else "worse"
    elif difference.high < 0:
        side = "worse" if better == "lower" else "better"
    return Comparison(name=name, better=better, first=first, second=second, difference=difference, ratio=ratio, second_is=side)


def _check(first: Sequence[ClipSet], second: Sequence[ClipSet], seeds: Sequence[int]) -> None:
    if not (len(first) == len(second) == len(seeds) > 0):
        raise DataError(f"{len(first)} and {len(second)} sets of clips for {len(seeds)} seeds; pass one set per side and seed")
    prompts = first[0].captions
    if any(clips.captions != prompts for clips in (*first, *second)):
        raise DataError("the sets of clips were not made from the same prompts in the same order; sample the missing clips")
