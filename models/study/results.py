"""All that a study found, in one document; the tables and pictures are made from it alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lutetia.models.metrics.comparison import Comparison
from lutetia.models.metrics.evaluator import MetricEntry
from lutetia.models.metrics.stats.intervals import Figure, mean
from lutetia.models.study.clips import ClipCounts
from lutetia.models.study.evaluation import EvaluatedReading
from lutetia.models.study.plan import Reading, StudyPlan, Training
from lutetia.protocol.schema.canonical import Frozen

PAPER = {"FVD": (561.04, 279.01), "CLIP text-video": (0.2032, 0.2178), "aesthetic": (3.795, 3.904)}
"""Monolith and mixture of Paris 2.0 (arXiv 2605.26064): 3 experts of 11 B, 256 px, N = 2,048."""


class Trained(Frozen):
    """How a training went. `losses`: per shard (epoch, held-out loss on that shard); `router`: accuracy and calibration."""

    seconds: float
    losses: dict[int, list[tuple[int, float]]]
    router: dict[str, Any] | None = None


class Headline(Frozen):
    """Monolith (first) against mixture (second) on prompts of one kind, over the seeds that the figures name."""

    rows: tuple[Comparison, ...]


class Kinds(Frozen):
    """The headline's distance, plain and debiased, by the kind of the clips."""

    rows: dict[str, tuple[Comparison, ...]]


class Against(Frozen):
    """The main distance of one control over that of the mixture of the same budget, prompts and seed; None: no distance here."""

    ratio: Figure | None


class Rebuilt(Frozen):
    """Figures of real clips (others than the reference) after the autoencoder alone."""

    entries: tuple[MetricEntry, ...]


class StudyResults(Frozen):
    """`headline`: prompts to the comparison of monolith (first) and mixture (second). `clusters`: of each way of clustering.

    `rebuilt`: prompts to the figures of other real clips after the autoencoder alone. `kinds`: prompts to the headline's
    distance by kind. `against`: reading of a control to its distance over the mixture's.
    `beyond`: the headline's distances again, from real clips as the autoencoder gives them. `rivals`: other arms of the whole
    budget, each compared as the headline's monolith is.
    """

    name: str
    config: dict[str, Any]
    plan: StudyPlan
    clips: ClipCounts
    clusters: dict[str, dict[str, Any]]
    trainings: dict[str, Trained]
    judged: dict[str, EvaluatedReading]
    headline: dict[str, tuple[Comparison, ...]]
    hardware: str
    seconds: float
    autoencoder_psnr: dict[str, float] = {}
    rebuilt: dict[str, tuple[MetricEntry, ...]] = {}
    beyond: dict[str, tuple[Comparison, ...]] = {}
    kinds: dict[str, dict[str, tuple[Comparison, ...]]] = {}
    against: dict[str, Figure] = {}
    rivals: dict[str, dict[str, tuple[Comparison, ...]]] = {}

    def of(self, reading: Reading) -> EvaluatedReading | None:
        """What was found about a reading, None while it is not judged."""
        return self.judged.get(reading.name)


def entry(entries: Sequence[MetricEntry], name: str) -> MetricEntry | None:
    """The line of metric `name`."""
    return next((entry for entry in entries if entry.name == name), None)


def main_distance(results: StudyResults) -> str:
    """FVD, or where this box has no I3D the motion distance."""
    names = {entry.name for judged in results.judged.values() for entry in judged.entries}
    return "FVD" if "FVD" in names else "motion distance"


class CurvePoint(Frozen):
    """One side at one epoch: FLOPs spent and the figure of every seed."""

    arm: str
    epoch: int
    flops: float
    figures: tuple[Figure, ...]
    floor: Figure | None = None
    losses: tuple[float, ...] = ()

    @property
    def value(self) -> float:
        return float(np.mean([figure.value for figure in self.figures]))


def curve(results: StudyResults, arm: str, metric: str) -> list[CurvePoint]:
    """Learning curve of an arm of the headline at one N, over its seeds."""
    points: dict[int, list[tuple[Training, EvaluatedReading, MetricEntry]]] = {}
    wanted = results.config["judging"]["curve_clips"]
    for training in results.plan.of("headline", arm):
        for reading in results.plan.readings_of(training):
            judged = results.of(reading)
            along = reading.plain and reading.clips == wanted and reading.prompts == _first(results)
            found = entry(judged.entries, metric) if judged and along else None
            if judged and found:
                points.setdefault(reading.epoch, []).append((training, judged, found))
    made = []
    for epoch, parts in sorted(points.items()):
        flops = float(np.mean([training.flops_at(epoch) for training, _, _ in parts]))
        losses = tuple(judged.losses["mixture"].loss for _, judged, _ in parts if "mixture" in judged.losses)
        figures = tuple(found.figure for _, _, found in parts)
        made.append(CurvePoint(arm=arm, epoch=epoch, flops=flops, figures=figures, floor=parts[0][2].real, losses=losses))
    return made


class Specialisation(Frozen):
    """One expert alone: a metric (higher is better) on prompts of its own cluster and on all others."""

    expert: int
    metric: str
    own: Figure
    other: Figure


def specialisation(results: StudyResults) -> list[Specialisation]:
    """Of all experts that were asked alone, by every metric that has a number per clip."""
    found = []
    for judged in results.judged.values():
        expert = judged.reading.expert
        if expert is None:
            continue
        own = np.array(judged.labels) == expert
        if min(own.sum(), (~own).sum()) < 2:
            continue
        for metric, values in judged.values.items():
            numbers = np.array(values)
            pair = mean(numbers[own]), mean(numbers[~own])
            found.append(Specialisation(expert=expert, metric=metric, own=pair[0], other=pair[1]))
    return sorted(found, key=lambda row: (row.metric, row.expert))


def headline_ratio(results: StudyResults, prompts: str) -> Figure | None:
    """Distance of the monolith over distance of the mixture, with its interval over clips and seeds."""
    name = main_distance(results)
    return next((row.ratio for row in results.headline.get(prompts, ()) if row.name == name), None)


def _first(results: StudyResults) -> str:
    prompts: Sequence[str] = results.config["judging"]["prompts"]
    return prompts[0]
