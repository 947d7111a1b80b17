"""How long a study will take on this box, from a short probe of its own modules."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from lutetia.models.data.encode.autoencoder_training import sample_step
from lutetia.models.experts.families import build_expert, call_expert
from lutetia.models.networks.i3d import MIN_FRAMES, I3DExtractor
from lutetia.models.study.config import StudyConfig
from lutetia.models.study.plan import StudyPlan, Training
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.manifest import ExpertSpec, LatentSpec
from lutetia.system.errors import DataError

_PROBE_SECONDS = 1.0


class Estimate(Frozen):
    """Hours of one core, by what they are spent on. `network`: None where there are no weights of I3D to probe."""

    autoencoder: float
    training: float
    sampling: float
    network: float | None

    @property
    def hours(self) -> float:
        return self.autoencoder + self.training + self.sampling + (self.network or 0.0)


def estimate(config: StudyConfig, plan: StudyPlan, latent: LatentSpec) -> Estimate:
    """Probe the steps of autoencoder and experts and the network of FVD, each for about a second on one core, and add up."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        specs = {training.expert.model_dump_json(): training.expert for training in plan.trainings}
        pace = {key: _expert_pace(spec, latent) for key, spec in specs.items()}
        picture, own = _network_pace(config), _autoencoder_seconds(config)
    finally:
        torch.set_num_threads(before)

    def of(training: Training) -> tuple[float, float]:
        return pace[training.expert.model_dump_json()]

    step = sum(training.experts * training.samples_per_shard * of(training)[0] for training in plan.trainings)
    passes = config.sampling.steps * (1 if config.sampling.guidance == 1 else 2)
    drawn = [(reading.clips, of(plan.training(reading.training))[1]) for reading in plan.readings]
    sampled = sum(clips * passes * forward for clips, forward in drawn)
    judged = sum(clips for clips, _ in drawn) + config.judging.clips + config.judging.spare + config.judging.fit_clips
    network = None if picture is None else judged * picture / 3600
    return Estimate(autoencoder=own / 3600, training=step / 3600, sampling=sampled / 3600, network=network)


def _autoencoder_seconds(config: StudyConfig) -> float:
    """Seconds that the study's own autoencoder takes to train; 0 where it has none."""
    wanted = config.autoencoder
    if wanted is None:
        return 0.0
    size = min(config.data.height, config.data.width)
    return wanted.steps * _pace(sample_step(wanted.channels, wanted.scale, size, wanted.bfloat16))


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
    """Seconds per clip of I3D; None without its weights or for clips too short for it."""
    data = config.data
    if data.frames < MIN_FRAMES or "fvd" not in config.judging.judges.metrics:
        return None
    try:
        extractor = I3DExtractor(config.judging.judges.i3d, precision=config.judging.judges.i3d_precision)
    except DataError:
        return None
    clip = torch.randint(0, 255, (1, data.frames, data.height, data.width, 3), dtype=torch.uint8)
    return _pace(lambda: extractor(clip))


def _pace(work: Callable[[], object]) -> float:
    """Processor seconds of one call, after one that warms up: others on the machine do not enter."""
    work()
    begun, calls = time.process_time(), 0
    while calls == 0 or time.process_time() - begun < _PROBE_SECONDS:
        work()
        calls += 1
    return (time.process_time() - begun) / calls
