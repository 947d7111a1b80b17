"""The study's judges and their clips: one order of prompts for every side, features and samples kept on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import torch

from lutetia.models.data.encode.latents import load_latents
from lutetia.models.metrics.clips import ClipSet, read_clips
from lutetia.models.metrics.comparison import Comparison, compare, compare_kinds, main_ratio
from lutetia.models.metrics.evaluator import Evaluator, MetricEntry
from lutetia.models.metrics.generated_clips import MixtureSampler, SamplingOptions, generate
from lutetia.models.metrics.routing import Routing, routing_figures
from lutetia.models.metrics.stats.intervals import Figure
from lutetia.models.metrics.timestep_loss import TimedLoss, flow_losses
from lutetia.models.study.config import Prompts, StudyConfig
from lutetia.models.study.plan import Reading
from lutetia.protocol.schema.canonical import Frozen

PROMPT_ORDER = 0  # the seed by which held-out clips are put in order, the same for all arms and seeds
Progress = Callable[[str, int, int], None]


class EvaluatedReading(Frozen):
    """What was found about one reading. `values`: numbers per clip, by metric, for comparisons within it.

    `labels`: the clips' clusters. `left_out`: metric to the reason why this box cannot measure it.
    """

    reading: Reading
    entries: tuple[MetricEntry, ...]
    routing: Routing | None = None
    losses: dict[str, TimedLoss] = {}
    values: dict[str, tuple[float, ...]] = {}
    labels: tuple[int, ...] = ()
    left_out: dict[str, str] = {}


class StudyEvaluation:
    """`clips`: the folder of `split_clips`; `cache` keeps samples and features between calls and between studies."""

    def __init__(self, config: StudyConfig, clips: Path, cache: Path, on_progress: Progress) -> None:
        self.config, self.clips, self.cache, self.on_progress = config, clips, cache, on_progress
        self.settings = config.judging.judges.model_copy(
            update={"cache": cache, "resamples": config.judging.resamples, "device": config.machines.device}
        )
        self.judges = lru_cache(maxsize=4)(self._judges)

    def read(self, prompts: Prompts, first: int, limit: int) -> ClipSet:
        """Held-out clips number `first` to `first + limit`, never such as anything was trained on."""
        role = self.config.judging.on
        return read_clips(
            self.clips / role, self.config.data.clip_shape, split="test", first=first, limit=limit, seed=PROMPT_ORDER,
            stratified=prompts == "stratified", skip_bad=self.config.data.skip_bad,
            on_progress=lambda done, total: self.on_progress("reading clips", done, total),
        )  # fmt: skip

    def _judges(self, prompts: Prompts, count: int) -> Evaluator:
        judging = self.config.judging
        everything = self.read(prompts, 0, count + min(count, judging.spare))
        spare = everything.take(range(count, len(everything))) if len(everything) >= count + 2 else None
        fit = read_clips(
            self.clips / "train", self.config.data.clip_shape, split="train", limit=judging.fit_clips, seed=PROMPT_ORDER,
            skip_bad=self.config.data.skip_bad,
            on_progress=lambda done, total: self.on_progress("reading clips to fit probes on", done, total),
        )  # fmt: skip
        return Evaluator(fit, everything.take(range(min(count, len(everything)))), spare, self.settings, self.on_progress)

    def sampler(self, reading: Reading, mixture: Path, labels: Mapping[str, int] | None) -> MixtureSampler:
        """The mixture as `reading` asks it; `labels` (prompt to cluster) for the oracle."""
        sampling = SamplingOptions(mode=reading.mode, expert=reading.expert, batch=self.config.judging.batch)
        oracle = labels if reading.route == "oracle" else None
        return MixtureSampler(mixture, sampling, self.settings.device, oracle)

    def sample(
        self, reading: Reading, mixture: Path, seed: int, labels: Mapping[str, int] | None
    ) -> tuple[ClipSet, EvaluatedReading]:
        """The reading's clips (kept, so asked again they cost nothing) and, so far, only how they were routed."""
        sampler = self.sampler(reading, mixture, labels)
        prompts = self.judges(reading.prompts, reading.clips).reference
        clips, weights = generate(sampler, prompts, sampler.sampling, seed, self.cache, self.on_progress)
        return clips, EvaluatedReading(reading=reading, entries=(), routing=routing_figures(weights))

    def judge(self, reading: Reading, mixture: Path, seed: int, labels: Mapping[str, int]) -> EvaluatedReading:
        """All metrics of a reading."""
        judges = self.judges(reading.prompts, reading.clips)
        clips, found = self.sample(reading, mixture, seed, labels)
        values = {name: tuple(score(clips).tolist()) for name, score in judges.values.items()}
        known = tuple(labels[caption] for caption in clips.captions)
        losses: dict[str, TimedLoss] = {}
        if reading.plain:
            pipeline = self.sampler(reading, mixture, labels).pipeline
            count = min(self.config.judging.loss_clips, len(judges.reference))
            own = known[:count] if pipeline.transformer.count > 1 else None
            losses = flow_losses(
                pipeline, judges.reference.take(range(count)), labels=own,
                on_progress=lambda done, total: self.on_progress("loss by timestep", done, total),
            )  # fmt: skip
        entries = tuple(judges.judge(clips, (seed,)))
        more = {"entries": entries, "losses": losses, "values": values, "labels": known, "left_out": judges.left_out}
        return found.model_copy(update=more)

    def rebuilt(self, latents: str, prompts: Prompts, count: int) -> tuple[MetricEntry, ...]:
        """Real clips encoded to latents and decoded again, judged as an arm's clips are: what no arm can be expected to pass.

        They are others than the reference: a clip beside itself would hide what every other figure owes to the small N.
        Nothing where the study has no spare clips.
        """
        judges = self.judges(prompts, count)
        return tuple(judges.judge(self._through(latents, judges.spare))) if judges.spare else ()

    def _through(self, latents: str, clips: ClipSet) -> ClipSet:
        """The clips as the autoencoder gives them back."""
        codec = load_latents(latents, device=self.settings.device)
        parts = clips.frames.split(self.config.judging.batch)
        return clips.with_frames(torch.cat([torch.from_numpy(codec.decode(codec.encode(part))) for part in parts]))

    def compare(
        self, prompts: Prompts, count: int, first: list[ClipSet], second: list[ClipSet], seeds: tuple[int, ...]
    ) -> tuple[Comparison, ...]:
        """Two sides over all seeds."""
        return compare(self.judges(prompts, count), first, second, seeds=seeds, resamples=self.config.judging.resamples)

    def compare_beyond(
        self, latents: str, prompts: Prompts, count: int, first: list[ClipSet], second: list[ClipSet], seeds: tuple[int, ...]
    ) -> tuple[Comparison, ...]:
        """The distances of two sides from real clips as the autoencoder gives them: without the blur that both sides share."""
        judges = self.judges(prompts, count)
        distances = tuple(name for name in self.settings.metrics if name in ("fvd", "motion"))
        settings = self.settings.model_copy(update={"metrics": distances})
        beyond = Evaluator(judges.reference, self._through(latents, judges.reference), judges.spare, settings, self.on_progress)
        return compare(beyond, first, second, seeds=seeds, resamples=self.config.judging.resamples)

    def compare_kinds(
        self, prompts: Prompts, count: int, first: list[ClipSet], second: list[ClipSet], seeds: tuple[int, ...]
    ) -> dict[str, tuple[Comparison, ...]]:
        """The same kind by kind, distances only."""
        return compare_kinds(self.judges(prompts, count), first, second, seeds=seeds, resamples=self.config.judging.resamples)

    def ratio(self, prompts: Prompts, count: int, first: ClipSet, second: ClipSet, seed: int) -> Figure | None:
        """The main distance of one arm over that of another of the same seed."""
        resamples = self.config.judging.resamples
        return main_ratio(self.judges(prompts, count), [first], [second], seeds=(seed,), resamples=resamples)


def cluster_labels(data: Path) -> dict[str, int]:
    """Prompt to cluster of the held-out clips: where a build placed them, which did not see them when it made the clusters."""
    labels: dict[str, int] = {}
    for line in (data / "clips.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row.get("split") == "test":
            labels.setdefault(row["caption"], row["shard"])
    return labels
