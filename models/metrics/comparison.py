"""Two sides on the same prompts, for instance monolith and mixture over several training seeds: by how much is which better?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

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
    """One metric on both sides. `ratio` is first / second (distances only), `difference` first - second; n are prompts.

    `second_is`: "better" or "worse" where the interval of the difference leaves 0 out, else "not told apart".
    """

    name: str
    better: Literal["lower", "higher"]
    first: Figure
    second: Figure
    difference: Figure
    ratio: Figure | None = None
    second_is: Literal["better", "worse", "not told apart"]


def compare(
    judges: Evaluator, first: Sequence[ClipSet], second: Sequence[ClipSet], *, seeds: Sequence[int], resamples: int = 60
) -> tuple[Comparison, ...]:
    """All metrics of `judges` on two sides: one set of clips per training seed and side, all from the same prompts in one order.

    Clips are resampled by prompt, on both sides and for all seeds at once; with several seeds intervals hold their spread too.
    Raises DataError when the sides do not fit together.
    """
    _check(first, second, seeds)
    found = []
    for name, view in judges.views.items():
        found += _distances(name, view, first, second, seeds, resamples)
    for name, values in judges.values.items():
        a, b = (np.stack([values(clips) for clips in side]) for side in (first, second))
        found.append(_values(name, a, b, seeds))
    return tuple(found)


def compare_kinds(
    judges: Evaluator, first: Sequence[ClipSet], second: Sequence[ClipSet], *, seeds: Sequence[int], resamples: int = 60
) -> dict[str, tuple[Comparison, ...]]:
    """The first distance of `judges`, plain and debiased, within each kind of the reference that has FEWEST clips or more.

    So it can be told where a gain comes from: better clips of every kind, or of the kind that got more of the training.
    """
    _check(first, second, seeds)
    kinds = judges.reference.kinds
    if len(set(kinds)) < 2 or not judges.views:
        return {}
    name, whole = next(iter(judges.views.items()))
    found = {}
    for kind in sorted(set(kinds)):
        rows = [row for row, other in enumerate(kinds) if other == kind]
        if len(rows) >= FEWEST:
            view = FeaturePair(whole.reference[rows], lambda clips, rows=rows: whole.features(clips)[rows])
            found[kind] = tuple(_distances(name, view, first, second, seeds, resamples))
    return found


def main_ratio(
    judges: Evaluator, first: Sequence[ClipSet], second: Sequence[ClipSet], *, seeds: Sequence[int], resamples: int = 60
) -> Figure | None:
    """The first distance of `judges` to one side over that to the other; None where there is no distance."""
    _check(first, second, seeds)
    view = next(iter(judges.views.values()), None)
    if view is None:
        return None
    a, b = ([view.features(clips) for clips in side] for side in (first, second))
    return distance_ratio(view.reference, a, b, seeds=seeds, resamples=resamples)


def comparison_table(comparisons: Sequence[Comparison], first: str, second: str) -> str:
    """Markdown, with the names of the two sides."""
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
    found = []
    for label, distance, times in (
        (name, frechet_of_rows, resamples),
        (f"{name}, debiased", frechet_debiased, max(20, resamples // 3)),
    ):

        def of(rows: Array, distance: Callable[[Array, Array], float] = distance) -> Statistic:
            return lambda i, j: distance(x[i], rows[j])

        def apart(u: Array, v: Array, distance: Callable[[Array, Array], float] = distance) -> Statistic:
            return lambda i, j: distance(x[i], u[j]) - distance(x[i], v[j])

        pairs = list(zip(a, b, strict=True))
        difference = _over([apart(u, v) for u, v in pairs], sizes, seeds, times)
        # a debiased distance near 0 makes no sound denominator
        ratio = distance_ratio(x, a, b, seeds=seeds, resamples=times) if distance is frechet_of_rows else None
        sides = [_over([of(rows) for rows in side], sizes, seeds, times) for side in (a, b)]
        found.append(_comparison(label, "lower", sides[0], sides[1], difference, ratio))
    return found


def _values(name: str, a: Array, b: Array, seeds: Sequence[int]) -> Comparison:
    """Per-clip values [seeds, N] of both sides. Few subsets may all hold the one clip that hit; means are cheap, so draw many."""
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
        raise DataError(f"{len(first)} and {len(second)} sets of clips for {len(seeds)} seeds; give one of each side per seed")
    prompts = first[0].captions
    if any(clips.captions != prompts for clips in (*first, *second)):
        raise DataError("the sets of clips were not made from the same prompts in the same order; sample the missing ones")
