"""The compute multiplier: how many times the mixture's FLOPs another arm spends for the same quality, read off both curves.

A ratio of distances depends on how steep the curves are; the multiplier does not: ratio = multiplier ** slope, where the slope is
that of log distance in log FLOPs. Branch-Train-Merge (arXiv 2208.03306) and scaling laws compare in this way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from lutetia.models.metrics.comparison import Comparison
from lutetia.models.metrics.stats.intervals import Figure, across_seeds, plain
from lutetia.models.study.results import CurvePoint, StudyResults, curve, entry, main_distance
from lutetia.protocol.schema.canonical import Frozen

LOSS = "held-out loss"
Bound = Literal["", "at least", "at most"]
Series = Sequence[tuple[float, float]]
"""(FLOPs, distance or loss), by rising FLOPs; lower is better."""
LEAST_SLOPE = 0.01
"""A curve that falls by less than 0.7 % when the FLOPs double tells nothing of what a ratio is worth in FLOPs."""


class Multiplier(Frozen):
    """FLOPs of another arm over those of the mixture at equal quality; above 1 the mixture needs less."""

    arm: str = Field(description="name of the other arm")
    metric: str = Field(description="what is equal: a distance or the held-out loss")
    figure: Figure = Field(description="geometric mean over seeds, with its interval")
    by_seed: tuple[float, ...] = Field(description="one multiplier per seed")
    bound: Bound = Field(default="", description="at least or at most, where a curve begins too late to tell more for some seed")
    by_slope: bool = Field(default=False, description="whether it is ratio ** (1 / slope), as the other arm has no curve")


def flops_to_reach(series: Series, target: float) -> float | None:
    """FLOPs at which a curve first is at or below `target`, between its points linear in both logarithms.

    Returns the first point's FLOPs if that is below the target already, None if no point is.
    """
    previous: tuple[float, float] | None = None
    for flops, value in series:
        if value <= target:
            if previous is None or previous[1] == value:
                return flops
            share = math.log(previous[1] / target) / math.log(previous[1] / value)
            return previous[0] * (flops / previous[0]) ** share
        previous = flops, value
    return None


def multiplier_of(other: Series, mixture: Series) -> tuple[float, Bound]:
    """The multiplier of one seed, and whether it is only a bound.

    At the other arm's last quality if the mixture reaches it; else at the mixture's last quality, which the other arm reaches.
    """
    spent, quality = other[-1]
    needed = flops_to_reach(mixture, quality)
    if needed is not None:
        return spent / needed, "at least" if mixture[0][1] < quality else ""
    needed = flops_to_reach(other, mixture[-1][1])
    if needed is None:  # only if a curve holds something that is no number
        return math.nan, ""
    return needed / mixture[-1][0], "at most" if other[0][1] < mixture[-1][1] else ""


def slope(series: Series) -> float:
    """-d log value / d log FLOPs of a curve of two or more points, by least squares."""
    flops, values = np.log(np.array(series, dtype=np.float64)).T
    return -float(np.polyfit(flops, values, 1)[0])


def multiplier(results: StudyResults, arm: str, metric: str) -> Multiplier | None:
    """The multiplier of `arm` by `metric`; None if one of the two sides has no curve of two points.

    The interval of a distance covers clips and seeds: that of the ratio at the whole budget, which pairs the clips of both sides,
    to the power 1 / slope; there is none if the mixture's curve is flatter than LEAST_SLOPE. That of the loss covers seeds
    only, as both sides are scored on the same clips and noise.
    """
    first, second = (_by_seed(curve(results, side, main_distance(results)), metric) for side in (arm, "mixture"))
    pairs = list(zip(first, second, strict=False))
    if not pairs or min(len(series) for pair in pairs for series in pair) < 2:
        return None
    found = [multiplier_of(*pair) for pair in pairs]
    values = tuple(value for value, _ in found)
    bounds: list[Bound] = [bound for _, bound in found if bound]
    if not all(math.isfinite(value) and value > 0 for value in values):
        return None
    mean, seeds = math.exp(float(np.mean(np.log(values)))), _seeds(results, arm)[: len(values)]
    ratio = final_ratio(results, arm) if metric != LOSS else None
    if ratio is not None:
        steepness = slope(_mean_curve(results, metric))
        figure = _widened(mean, ratio, steepness) if steepness > LEAST_SLOPE else plain(mean, ratio.n, ratio.seeds)
    else:
        figure = _over_seeds(values, seeds, results.config["evaluation"]["curve_clips"])
    return Multiplier(arm=arm, metric=metric, figure=figure, by_seed=values, bound=bounds[0] if bounds else "")


def outside_multiplier(results: StudyResults, arm: str, metric: str) -> Multiplier | None:
    """The multiplier of an arm without a curve: final figure over the mixture's of the same seed and clips, by the slope."""
    steepness = _mean_curve(results, metric)
    ratios = outside_ratios(results, arm, metric)
    if len(steepness) < 2 or slope(steepness) <= LEAST_SLOPE or not ratios:
        return None
    values: tuple[float, ...] = tuple(_in_flops(ratio, slope(steepness)) for ratio in ratios.values())
    clips = results.config["evaluation"]["clips"]
    return Multiplier(arm=arm, metric=metric, figure=_over_seeds(values, tuple(ratios), clips), by_seed=values, by_slope=True)


def outside_ratios(results: StudyResults, arm: str, metric: str) -> dict[int, float]:
    """Seed to the final figure of `arm` over the mixture's, on the first choice of prompts."""
    prompts, distance = results.config["evaluation"]["prompts"][0], main_distance(results)
    mixture = {training.seed: training for training in results.plan.of("headline", "mixture")}
    ratios = {}
    for outside in results.outside.get(arm, ()):
        if outside.prompts != prompts or outside.seed not in mixture:
            continue
        training = mixture[outside.seed]
        for reading in results.plan.readings_of(training):
            same = (reading.epoch, reading.prompts, reading.clips) == (training.epochs, prompts, outside.clips) and reading.plain
            evaluated = results.of(reading) if same else None
            measured = entry(evaluated.entries, distance) if evaluated else None
            if evaluated and measured and "mixture" in evaluated.losses:
                own = evaluated.losses["mixture"].loss if metric == LOSS else measured.figure.value
                ratios[outside.seed] = (outside.loss if metric == LOSS else outside.distance) / own
    return ratios


def final_ratio(results: StudyResults, arm: str) -> Figure | None:
    """The main distance of `arm` over that of the mixture at the whole budget, on the first choice of prompts."""
    row = _row(_compared(results, arm), main_distance(results))
    return row.ratio if row else None


def encoded_ratio(results: StudyResults, arm: str) -> Figure | None:
    """The debiased main distance from encoded and decoded real clips, of `arm` over that of the mixture.

    Its interval is that of the paired difference over the mixture's figure, which counts as exact. None if it was not measured,
    or if the mixture's is not above 0.
    """
    prompts = results.config["evaluation"]["prompts"][0]
    measured = results.beyond if arm == "monolith" else results.rivals_beyond.get(arm, {})
    row = _row(measured.get(prompts, ()), f"{main_distance(results)}, debiased")
    if row is None or row.second.low <= 0:
        return None
    over = row.second.value
    values = {"value": row.first.value / over, "low": 1 + row.difference.low / over, "high": 1 + row.difference.high / over}
    return row.difference.model_copy(update=values)


class Isolation(Frozen):
    """What random clusters tell: experts on random parts of the data are isolated, but not specialised."""

    metric: str = Field(description="name of a distance or the held-out loss; lower is better")
    price: float = Field(description="random clusters over the monolith: what isolation costs")
    gain: float = Field(description="random clusters over the mixture: what specialisation gains")


def isolation(results: StudyResults) -> list[Isolation]:
    """Price of isolation and gain of specialisation at one budget, of the first seed; empty without random clusters."""
    name = main_distance(results)
    whole = results.config["controls"]["share"] == 1.0  # then the headline's arms are those of the controls, too
    for tiers in (("headline", "control"),) if whole else (("headline",), ("control",)):
        finals = {arm: [_finals(results, tier, arm) for tier in tiers] for arm in ("random", "monolith", "mixture")}
        sides = {arm: next(filter(None, found), {}) for arm, found in finals.items()}
        if all(sides.values()):
            break
    else:
        return []
    rows = []
    for metric in (name, f"{name}, debiased", LOSS):
        values = [sides[arm].get(metric) for arm in ("random", "monolith", "mixture")]
        if all(value is not None and value > 0 for value in values):
            apart, one, mixture = (float(value) for value in values if value is not None)
            rows.append(Isolation(metric=metric, price=apart / one, gain=apart / mixture))
    return rows


def floor(results: StudyResults) -> Figure | None:
    """The main distance of real clips that the autoencoder encoded and decoded: no arm can do better at this N."""
    rebuilt = entry(results.rebuilt.get(results.config["evaluation"]["prompts"][0], ()), main_distance(results))
    return rebuilt.figure if rebuilt else None


def _finals(results: StudyResults, tier: str, arm: str) -> dict[str, float]:
    """Metric to its value in the last plain reading of the first training of an arm."""
    prompts = results.config["evaluation"]["prompts"][0]
    for training in results.plan.trainings:
        if (training.tier, training.arm) != (tier, arm):
            continue
        for reading in results.plan.readings_of(training):
            evaluated = results.of(reading)
            if evaluated and reading.plain and reading.epoch == training.epochs and reading.prompts == prompts:
                values = {each.name: each.figure.value for each in evaluated.entries}
                if "mixture" in evaluated.losses:
                    values[LOSS] = evaluated.losses["mixture"].loss
                return values
    return {}


def _compared(results: StudyResults, arm: str) -> Sequence[Comparison]:
    prompts = results.config["evaluation"]["prompts"][0]
    return (results.headline if arm == "monolith" else results.rivals.get(arm, {})).get(prompts, ())


def _row(rows: Sequence[Comparison], name: str) -> Comparison | None:
    return next((row for row in rows if row.name == name), None)


def _by_seed(points: Sequence[CurvePoint], metric: str) -> list[list[tuple[float, float]]]:
    """One series per seed that every point of the curve has."""
    values = [list(point.losses) if metric == LOSS else [figure.value for figure in point.figures] for point in points]
    count = min((len(each) for each in values), default=0)
    return [[(point.flops, each[seed]) for point, each in zip(points, values, strict=True)] for seed in range(count)]


def _mean_curve(results: StudyResults, metric: str) -> list[tuple[float, float]]:
    """The mixture's curve, mean over seeds."""
    series = _by_seed(curve(results, "mixture", main_distance(results)), metric)
    return [(points[0][0], float(np.mean([value for _, value in points]))) for points in zip(*series, strict=True)]


def _over_seeds(values: Sequence[float], seeds: tuple[int, ...], clips: int) -> Figure:
    """The geometric mean, with an interval if there are two seeds or more."""
    return across_seeds(values, seeds=seeds, n=clips, ratio=True) if len(values) > 1 else plain(values[0], clips, seeds)


def _widened(value: float, ratio: Figure, steepness: float) -> Figure:
    low, high = (value * _in_flops(max(end, 1e-9) / ratio.value, steepness) for end in (ratio.low, ratio.high))
    return ratio.model_copy(update={"value": value, "low": low, "high": high})


def _in_flops(ratio: float, steepness: float) -> float:
    """ratio ** (1 / steepness); stops short of infinity, where float's own power raises."""
    return math.exp(min(math.log(ratio) / steepness, 700.0))


def _seeds(results: StudyResults, arm: str) -> tuple[int, ...]:
    return tuple(training.seed for training in results.plan.of("headline", arm))
