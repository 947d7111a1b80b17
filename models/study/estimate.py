"""Estimate how long a study takes on this machine, from short measurements of its networks."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from pydantic import Field

from lutetia.models.data.encode.autoencoder_training import sample_step
from lutetia.models.experts.families import build_expert, call_expert
from lutetia.models.networks.i3d import MIN_FRAMES, I3DExtractor
from lutetia.models.study.config import StudyConfig
from lutetia.models.study.plan import StudyPlan
from lutetia.models.study.trainings import Training
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.system.errors import DataError

_PROBE_SECONDS = 1.0


class Estimate(Frozen):
    """Estimated hours of one core."""

    autoencoder: float = Field(description="training of the autoencoder, hours of one core")
    training: float = Field(description="training of all arms, hours of one core")
    sampling: float = Field(description="sampling of all clips, hours of one core")
    network: float | None = Field(description="I3D on all clips, hours of one core; none: no weights to measure it with")

    @property
    def hours(self) -> float:
        return self.autoencoder + self.training + self.sampling + (self.network or 0.0)


def estimate(config: StudyConfig, plan: StudyPlan, latent: LatentSpec) -> Estimate:
    """Measure a step of the autoencoder and of each expert and a pass of I3D, each for about a second on one core, and add up."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        specs = {training.expert.model_dump_json(): training.expert for training in plan.trainings}
        pace = {key: _expert_pace(spec, latent) for key, spec in specs.items()}
        per_clip, autoencoder = _network_pace(config), _autoencoder_seconds(config)
    finally:
        torch.set_num_threads(before)

    def pace_of(training: Training) -> tuple[float, float]:
        return pace[training.expert.model_dump_json()]

    step = sum(training.experts * training.samples_per_shard * pace_of(training)[0] for training in plan.trainings)
    passes = config.sampling.steps * (1 if config.sampling.guidance == 1 else 2)
    readings = [(reading.clips, pace_of(plan.training(reading.training))[1]) for reading in plan.readings]
    sampled = sum(clips * passes * forward for clips, forward in readings)
    evaluation = config.evaluation
    clips_measured = sum(clips for clips, _ in readings) + evaluation.clips + evaluation.spare + evaluation.fit_clips
    network = None if per_clip is None else clips_measured * per_clip / 3600
    return Estimate(autoencoder=autoencoder / 3600, training=step / 3600, sampling=sampled / 3600, network=network)


def _autoencoder_seconds(config: StudyConfig) -> float:
    """Seconds to train the autoencoder of the study; 0 if it has none."""
    autoencoder = config.autoencoder
    if autoencoder is None:
        return 0.0
    size = min(config.data.height, config.data.width)
    return autoencoder.steps * _pace(sample_step(autoencoder.channels, autoencoder.scale, size, autoencoder.bfloat16))


def _expert_pace(spec: ExpertSpec, latent: LatentSpec, rows: int = 4) -> tuple[float, float]:
    """Seconds per clip of a training step and of a forward pass."""
    model = build_expert(spec, 0)
    x, t = torch.randn(rows, *latent.shape), torch.rand(rows)
    tokens, pooled = torch.randn(rows, latent.text_tokens, latent.text_width), torch.randn(rows, latent.pooled_width)

    def step() -> None:
        call_expert(model, x, t, tokens, pooled).square().mean().backward()

    @torch.no_grad()
    def forward() -> None:
        call_expert(model, x, t, tokens, pooled)

    return _pace(step) / rows, _pace(forward) / rows


def _network_pace(config: StudyConfig) -> float | None:
    """Seconds per clip of I3D; None without its weights, or if the clips are too short for it."""
    data = config.data
    if data.frames < MIN_FRAMES or "fvd" not in config.evaluation.evaluator.metrics:
        return None
    try:
        extractor = I3DExtractor(config.evaluation.evaluator.i3d, precision=config.evaluation.evaluator.i3d_precision)
    except DataError:
        return None
    clip = torch.randint(0, 255, (1, data.frames, data.height, data.width, 3), dtype=torch.uint8)
    return _pace(lambda: extractor(clip))


def _pace(work: Callable[[], object]) -> float:
    """Processor seconds of one call, after a warm-up call. Processor time does not depend on other load on the machine."""
    work()
    started, calls = time.process_time(), 0
    while calls == 0 or time.process_time() - started < _PROBE_SECONDS:
        work()
        calls += 1
    return (time.process_time() - started) / calls
