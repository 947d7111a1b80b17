"""Evaluate the readings of a study. Every arm gets the same prompts in the same order; features and samples stay on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import torch
from pydantic import Field

from lutetia.models.data.encode.latents import load_latents
from lutetia.models.metrics.clips import ClipSet, read_clips
from lutetia.models.metrics.comparison import Comparison, compare, compare_kinds, main_ratio
from lutetia.models.metrics.evaluator import Evaluator, MetricEntry
from lutetia.models.metrics.generated_clips import MixtureSampler, generate
from lutetia.models.metrics.routing import Routing, routing_figures
from lutetia.models.metrics.stats.intervals import Figure
from lutetia.models.metrics.timestep_loss import TimedLoss, flow_losses
from lutetia.models.mixing.options import SamplingOptions
from lutetia.models.study.config import Prompts, StudyConfig
from lutetia.models.study.trainings import Reading
from lutetia.protocol.schema.canonical import Frozen

PROMPT_ORDER = 0  # seed of the order of the held-out clips, the same for all arms and seeds
Progress = Callable[[str, int, int], None]


class EvaluatedReading(Frozen):
    """The figures of one reading."""

    reading: Reading = Field(description="the reading")
    entries: tuple[MetricEntry, ...] = Field(description="one line per figure")
    routing: Routing | None = Field(default=None, description="decisions of the router")
    losses: dict[str, TimedLoss] = Field(default={}, description="candidate (mixture, expert 0, …) to its held-out loss")
    values: dict[str, tuple[float, ...]] = Field(default={}, description="metric to one number per clip")
    labels: tuple[int, ...] = Field(default=(), description="cluster of the prompt of each clip")
    left_out: dict[str, str] = Field(default={}, description="metric to the reason why it was not measured")


class StudyEvaluation:
    """Samples, measures and compares readings."""

    def __init__(self, config: StudyConfig, clips: Path, cache: Path, on_progress: Progress) -> None:
        """Set up; nothing is read yet.

        Args:
            config: the study.
            clips: the folder that `split_clips` filled.
            cache: folder that keeps samples and features between calls and between studies.
            on_progress: called with stage, done and total.
        """
        self.config, self.clips, self.cache, self.on_progress = config, clips, cache, on_progress
        self.settings = config.evaluation.evaluator.model_copy(
            update={"cache": cache, "resamples": config.evaluation.resamples, "device": config.machines.device}
        )
        self.evaluator = lru_cache(maxsize=4)(self._evaluator)

    def read(self, prompts: Prompts, first: int, limit: int) -> ClipSet:
        """Held-out clips number `first` to `first + limit` (exclusive)."""
        role = self.config.evaluation.on
        return read_clips(
            self.clips / role, self.config.data.clip_shape, split="test", first=first, limit=limit, seed=PROMPT_ORDER,
            stratified=prompts == "stratified", skip_bad=self.config.data.skip_bad,
            on_progress=lambda done, total: self.on_progress("reading clips", done, total),
        )  # fmt: skip

    def _evaluator(self, prompts: Prompts, count: int) -> Evaluator:
        plan = self.config.evaluation
        held_out = self.read(prompts, 0, count + min(count, plan.spare))
        spare = held_out.take(range(count, len(held_out))) if len(held_out) >= count + 2 else None
        fit = read_clips(
            self.clips / "train", self.config.data.clip_shape, split="train", limit=plan.fit_clips, seed=PROMPT_ORDER,
            skip_bad=self.config.data.skip_bad,
            on_progress=lambda done, total: self.on_progress("reading clips to fit probes on", done, total),
        )  # fmt: skip
        return Evaluator(fit, held_out.take(range(min(count, len(held_out)))), spare, self.settings, self.on_progress)

    def sampler(self, reading: Reading, mixture: Path, labels: Mapping[str, int] | None) -> MixtureSampler:
        """A sampler of the mixture with the routing of `reading`; the oracle needs `labels` (prompt to cluster)."""
        sampling = SamplingOptions(mode=reading.mode, expert=reading.expert, batch=self.config.evaluation.batch)
        oracle = labels if reading.route == "oracle" else None
        return MixtureSampler(mixture, sampling, self.settings.device, oracle, hub=True)  # made by this study

    def sample(
        self, reading: Reading, mixture: Path, seed: int, labels: Mapping[str, int] | None
    ) -> tuple[ClipSet, EvaluatedReading]:
        """The clips of a reading (kept on disk, so a second call is cheap), and its figures so far: the routing."""
        sampler = self.sampler(reading, mixture, labels)
        prompts = self.evaluator(reading.prompts, reading.clips).reference
        clips, weights = generate(sampler, prompts, sampler.sampling, seed, self.cache, self.on_progress)
        return clips, EvaluatedReading(reading=reading, entries=(), routing=routing_figures(weights))

    def evaluate(self, reading: Reading, mixture: Path, seed: int, labels: Mapping[str, int]) -> EvaluatedReading:
        """Sample and measure a reading. `labels`: prompt to cluster."""
        evaluator = self.evaluator(reading.prompts, reading.clips)
        clips, sampled = self.sample(reading, mixture, seed, labels)
        values = {name: tuple(score(clips).tolist()) for name, score in evaluator.values.items()}
        clusters = tuple(labels[caption] for caption in clips.captions)
        losses: dict[str, TimedLoss] = {}
        if reading.plain:
            pipeline = self.sampler(reading, mixture, labels).pipeline
            count = min(self.config.evaluation.loss_clips, len(evaluator.reference))
            right = clusters[:count] if pipeline.transformer.count > 1 else None
            losses = flow_losses(
                pipeline, evaluator.reference.take(range(count)), labels=right,
                on_progress=lambda done, total: self.on_progress("loss by timestep", done, total),
            )  # fmt: skip
        entries = tuple(evaluator.evaluate(clips, (seed,)))
        figures = {"entries": entries, "losses": losses, "values": values, "labels": clusters, "left_out": evaluator.left_out}
        return sampled.model_copy(update=figures)

    def rebuilt(self, latents: str, prompts: Prompts, count: int) -> tuple[MetricEntry, ...]:
        """Measure real clips after encoding and decoding, like the clips of an arm: no arm can be expected to do better.

        These clips are not those of the reference: compared with itself, a clip would not show the bias of a small N.
        Empty if the study has no spare clips.
        """
        evaluator = self.evaluator(prompts, count)
        return tuple(evaluator.evaluate(self._through(latents, evaluator.spare))) if evaluator.spare else ()

    def _through(self, latents: str, clips: ClipSet) -> ClipSet:
        """The clips after encoding and decoding by the autoencoder `latents`."""
        codec = load_latents(latents, device=self.settings.device)
        parts = clips.frames.split(self.config.evaluation.batch)
        return clips.with_frames(torch.cat([torch.from_numpy(codec.decode(codec.encode(part))) for part in parts]))

    def compare(
        self, prompts: Prompts, count: int, first: list[ClipSet], second: list[ClipSet], seeds: tuple[int, ...]
    ) -> tuple[Comparison, ...]:
        """Compare two sides over all seeds, by every metric."""
        return compare(self.evaluator(prompts, count), first, second, seeds=seeds, resamples=self.config.evaluation.resamples)

    def compare_beyond(
        self, latents: str, prompts: Prompts, count: int, first: list[ClipSet], second: list[ClipSet], seeds: tuple[int, ...]
    ) -> tuple[Comparison, ...]:
        """Compare two sides by distance from real clips after encoding and decoding: without the blur that both sides share."""
        evaluator = self.evaluator(prompts, count)
        distances = tuple(name for name in self.settings.metrics if name in ("fvd", "motion"))
        settings = self.settings.model_copy(update={"metrics": distances})
        reference = self._through(latents, evaluator.reference)
        beyond = Evaluator(evaluator.reference, reference, evaluator.spare, settings, self.on_progress)
        return compare(beyond, first, second, seeds=seeds, resamples=self.config.evaluation.resamples)

    def compare_kinds(
        self, prompts: Prompts, count: int, first: list[ClipSet], second: list[ClipSet], seeds: tuple[int, ...]
    ) -> dict[str, tuple[Comparison, ...]]:
        """Compare two sides over all seeds kind by kind, by distance only."""
        return compare_kinds(
            self.evaluator(prompts, count), first, second, seeds=seeds, resamples=self.config.evaluation.resamples
        )

    def ratio(self, prompts: Prompts, count: int, first: ClipSet, second: ClipSet, seed: int) -> Figure | None:
        """The main distance of one arm over that of another with the same seed."""
        resamples = self.config.evaluation.resamples
        return main_ratio(self.evaluator(prompts, count), [first], [second], seeds=(seed,), resamples=resamples)


def cluster_labels(data: Path) -> dict[str, int]:
    """Prompt to cluster of the held-out clips, as the build placed them; they took no part in the clustering."""
    labels: dict[str, int] = {}
    for line in (data / "clips.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row.get("split") == "test":
            labels.setdefault(row["caption"], row["shard"])
    return labels
