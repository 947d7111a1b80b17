"""The results of a study in one document. Tables and pictures are made from it alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from lutetia.models.metrics.comparison import Comparison
from lutetia.models.metrics.evaluator import MetricEntry
from lutetia.models.metrics.stats.intervals import Figure, mean
from lutetia.models.study.clips import ClipCounts
from lutetia.models.study.evaluation import EvaluatedReading
from lutetia.models.study.plan import StudyPlan
from lutetia.models.study.trainings import Reading, Training
from lutetia.protocol.schema.canonical import Frozen

PAPER = {"FVD": (561.04, 279.01), "CLIP text-video": (0.2032, 0.2178), "aesthetic": (3.795, 3.904)}
"""Monolith and mixture of Paris 2.0 (arXiv 2605.26064): 3 experts of 11 B, 256 px, N = 2,048."""


class Trained(Frozen):
    """The course of a training."""

    seconds: float = Field(description="time that its swarm ran, seconds")
    losses: dict[int, list[tuple[int, float]]] = Field(description="shard to (epoch, held-out loss on that shard)")
    router: dict[str, Any] | None = Field(
        default=None, description="accuracy and calibration error of the router; none for a monolith"
    )


class Headline(Frozen):
    """An arm (first) against the mixture (second) on one choice of prompts, over the seeds that the figures name."""

    rows: tuple[Comparison, ...] = Field(description="one comparison per metric")


class Kinds(Frozen):
    """The headline by the kind of the clips."""

    rows: dict[str, tuple[Comparison, ...]] = Field(description="kind to the comparisons by distance, plain and debiased")


class Against(Frozen):
    """A control against the mixture of the same budget, prompts and seed."""

    ratio: Figure | None = Field(description="main distance of the control over that of the mixture; none: no distance measured")


class Rebuilt(Frozen):
    """Real clips, not those of the reference, encoded and decoded by the autoencoder."""

    entries: tuple[MetricEntry, ...] = Field(description="one line per figure")


class OutsideReading(Frozen):
    """Final figures of an arm that was carried out in a run of its own; it has no curve here."""

    seed: int = Field(description="training seed")
    prompts: str = Field(description="choice of prompts: natural or stratified")
    clips: int = Field(description="number of clips")
    distance: float = Field(description="the main distance")
    loss: float = Field(description="held-out loss")


class Specialisation(Frozen):
    """One expert alone, on prompts of its own cluster and on all others."""

    expert: int = Field(description="number of the expert")
    metric: str = Field(description="name of the metric; higher is better")
    own: Figure = Field(description="the metric on prompts of its own cluster")
    other: Figure = Field(description="the metric on all other prompts")


class StudyResults(Frozen):
    """All figures of a study, as far as it is carried out."""

    name: str = Field(description="name of the study")
    config: dict[str, Any] = Field(description="the StudyConfig as JSON")
    plan: StudyPlan = Field(description="all trainings and readings")
    clips: ClipCounts = Field(description="number of clips by role and kind")
    clusters: dict[str, dict[str, Any]] = Field(description="built data to the report on its clusters")
    trainings: dict[str, Trained] = Field(description="name to the course of each finished training")
    evaluated: dict[str, EvaluatedReading] = Field(description="name to the figures of each evaluated reading")
    headline: dict[str, tuple[Comparison, ...]] = Field(description="prompts to the comparison of monolith and mixture")
    hardware: str = Field(description="the machine, in words")
    seconds: float = Field(description="time that all swarms ran, seconds")
    autoencoder_psnr: dict[str, float] = Field(
        default={}, description="kind to the PSNR of the study's autoencoder on unseen frames, dB"
    )
    rebuilt: dict[str, tuple[MetricEntry, ...]] = Field(
        default={}, description="prompts to the figures of other real clips after encoding and decoding alone"
    )
    beyond: dict[str, tuple[Comparison, ...]] = Field(
        default={}, description="prompts to the headline by distance from real clips that were encoded and decoded"
    )
    kinds: dict[str, dict[str, tuple[Comparison, ...]]] = Field(
        default={}, description="prompts to kind to the headline by distance within that kind"
    )
    against: dict[str, Figure] = Field(
        default={}, description="reading of a control to its main distance over that of the mixture"
    )
    rivals: dict[str, dict[str, tuple[Comparison, ...]]] = Field(
        default={}, description="other arms of the whole budget to prompts to the comparison with the mixture"
    )

    rivals_beyond: dict[str, dict[str, tuple[Comparison, ...]]] = Field(
        default={}, description="other arms of the whole budget to prompts to the comparison by distance from encoded real clips"
    )
    outside: dict[str, tuple[OutsideReading, ...]] = Field(
        default={}, description="arm to its final figures, where it was carried out in runs of its own"
    )

    alone: tuple[Specialisation, ...] = Field(
        default=(), description="figures of single experts, as far as the numbers of each clip are left out above"
    )

    def of(self, reading: Reading) -> EvaluatedReading | None:
        """The figures of a reading; None if it is not evaluated yet."""
        return self.evaluated.get(reading.name)


def entry(entries: Sequence[MetricEntry], name: str) -> MetricEntry | None:
    """The entry of metric `name`; None if there is none."""
    return next((entry for entry in entries if entry.name == name), None)


def main_distance(results: StudyResults) -> str:
    """FVD, or the motion distance if FVD was not measured."""
    names = {entry.name for reading in results.evaluated.values() for entry in reading.entries}
    return "FVD" if "FVD" in names else "motion distance"


class CurvePoint(Frozen):
    """One arm at one epoch."""

    arm: str = Field(description="name of the arm")
    epoch: int = Field(description="epoch of all its experts")
    flops: float = Field(description="FLOPs spent, mean over seeds")
    figures: tuple[Figure, ...] = Field(description="the metric, one figure per seed")
    floor: Figure | None = Field(default=None, description="the metric between real clips")
    losses: tuple[float, ...] = Field(default=(), description="held-out loss of each seed")

    @property
    def value(self) -> float:
        return float(np.mean([figure.value for figure in self.figures]))


def curve(results: StudyResults, arm: str, metric: str) -> list[CurvePoint]:
    """The learning curve of an arm of the headline by one metric, over its seeds."""
    points: dict[int, list[tuple[Training, EvaluatedReading, MetricEntry]]] = {}
    clips = results.config["evaluation"]["curve_clips"]
    for training in results.plan.of("headline", arm):
        for reading in results.plan.readings_of(training):
            evaluated = results.of(reading)
            on_curve = reading.plain and reading.clips == clips and reading.prompts == _first(results)
            measured = entry(evaluated.entries, metric) if evaluated and on_curve else None
            if evaluated and measured:
                points.setdefault(reading.epoch, []).append((training, evaluated, measured))
    rows = []
    for epoch, parts in sorted(points.items()):
        flops = float(np.mean([training.flops_at(epoch) for training, _, _ in parts]))
        losses = tuple(each.losses["mixture"].loss for _, each, _ in parts if "mixture" in each.losses)
        figures = tuple(measured.figure for _, _, measured in parts)
        rows.append(CurvePoint(arm=arm, epoch=epoch, flops=flops, figures=figures, floor=parts[0][2].real, losses=losses))
    return rows


def specialisation(results: StudyResults) -> list[Specialisation]:
    """The figures of all experts that were sampled alone, by every metric of one number per clip."""
    rows = [*results.alone]
    for evaluated in results.evaluated.values():
        expert = evaluated.reading.expert
        if expert is None or results.alone:
            continue
        is_own = np.array(evaluated.labels) == expert
        if min(is_own.sum(), (~is_own).sum()) < 2:
            continue
        for metric, values in evaluated.values.items():
            numbers = np.array(values)
            pair = mean(numbers[is_own]), mean(numbers[~is_own])
            rows.append(Specialisation(expert=expert, metric=metric, own=pair[0], other=pair[1]))
    return sorted(rows, key=lambda row: (row.metric, row.expert))


def headline_ratio(results: StudyResults, prompts: str) -> Figure | None:
    """Main distance of the monolith over that of the mixture, with its interval over clips and seeds."""
    name = main_distance(results)
    return next((row.ratio for row in results.headline.get(prompts, ()) if row.name == name), None)


def _first(results: StudyResults) -> str:
    prompts: Sequence[str] = results.config["evaluation"]["prompts"]
    return prompts[0]
