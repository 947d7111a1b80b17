"""The plan of a study, before anything runs: all trainings with their budgets, and all readings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast, get_args

from pydantic import Field

from lutetia.models.data.encode.latents import load_latents
from lutetia.models.data.encode.text import load_text_encoder
from lutetia.models.study.config import Arm, FramesBase, StudyConfig
from lutetia.models.study.flops import Cost, expert_cost, router_cost
from lutetia.models.study.trainings import Method, Reading, Tier, Training, WarmStart, readings_of, shared
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.system.errors import ConfigError


class StudyPlan(Frozen):
    """All trainings and all readings."""

    trainings: tuple[Training, ...] = Field(description="in the order to carry them out: the headline first")
    readings: tuple[Reading, ...] = Field(description="in the order of their trainings")

    def training(self, name: str) -> Training:
        return next(training for training in self.trainings if training.name == name)

    def readings_of(self, training: Training) -> list[Reading]:
        """The readings of a training."""
        return [reading for reading in self.readings if reading.training == training.name]

    def controls(self, config: StudyConfig) -> list[tuple[Training, Reading]]:
        """The rows of the table of controls: final readings with one N and one choice of prompts, those of both sides first."""
        share, seeds, clips = config.controls.share, config.controls.seeds, config.controls.clips
        rows = []
        for training in self.trainings:
            if training.tier == "headline" and (share != 1 or training.seed not in seeds):
                continue
            for reading in self.readings_of(training):
                if (reading.clips, reading.prompts, reading.epoch) == (clips, config.evaluation.prompts[0], training.epochs):
                    rows.append((training, reading))
        return rows

    def of(self, tier: Tier, arm: str) -> list[Training]:
        """The trainings of an arm, by seed."""
        return [training for training in self.trainings if (training.tier, training.arm) == (tier, arm)]


def planned_latent(config: StudyConfig) -> LatentSpec:
    """The shapes of the latents and texts of a build by `config.data`, without the statistics, which need the clips.

    Raises ConfigError if autoencoder or text encoder cannot be loaded, or do not take this size.
    """
    data, trained = config.data, config.autoencoder
    if trained is not None:
        channels, frames = trained.channels, data.frames
        height, width = data.height // trained.scale, data.width // trained.scale
    else:
        channels, frames, height, width = load_latents(data.latents).shape_of(data.frames, data.height, data.width)
    text = load_text_encoder(data.text, data.text_tokens or 1)
    return LatentSpec(
        channels=channels, frames=frames, height=height, width=width, vae=data.latents, pixel_frames=data.frames,
        pixel_height=data.height, pixel_width=data.width, fps=data.fps, text_encoder=text.ref, text_tokens=text.tokens,
        text_width=text.width, pooled_width=text.pooled_width,
    )  # fmt: skip


def plan_study(config: StudyConfig, latent: LatentSpec) -> StudyPlan:
    """Plan the study. No arm spends more FLOPs than the budget of its tier, nor less by more than a step per checkpoint.

    Raises ConfigError if the budget is too small.
    """
    costs = _Costs(config, latent)
    trainings = [*_base(config, latent), *_headline(config, costs), *_controls(config, costs)]
    readings = [reading for training in trainings for reading in readings_of(config, training)]
    return StudyPlan(trainings=tuple(trainings), readings=tuple(readings))


class _Costs:
    """Costs of the networks of a study; each is counted once."""

    def __init__(self, config: StudyConfig, latent: LatentSpec) -> None:
        self.config, self.latent = config, latent
        self._known: dict[str, Cost] = {}

    def expert(self, spec: ExpertSpec) -> Cost:
        key = spec.model_dump_json()
        if key not in self._known:
            self._known[key] = expert_cost(spec, self.latent)
        return self._known[key]

    def router(self, experts: int) -> tuple[int, int]:
        """FLOPs of the training of a router among `experts`, and of one forward pass; 0 for a monolith."""
        if experts == 1:
            return 0, 0
        spec = self.config.router
        cost = router_cost(spec, self.latent, experts)
        return cost.training * (spec.samples // spec.batch) * spec.batch, cost.forward

    def budget(self, tier: Tier) -> int:
        share = 1.0 if tier == "headline" else self.config.controls.share
        return round(self.config.samples * share) * self.expert(self.config.expert).training


def _training(
    costs: _Costs, tier: Tier, arm: str, seed: int, *, experts: int, batch: int, spec: ExpertSpec | None = None,
    method: Method | None = None, begin: WarmStart | None = None, learning_rate: float | None = None,
) -> Training:  # fmt: skip
    """The training that uses up the budget of its tier, rounded down to whole steps per checkpoint."""
    spec = spec or costs.config.expert
    cost, points = costs.expert(spec), costs.config.checkpoints
    router, routing = costs.router(experts)
    affordable = (costs.budget(tier) - router - (begin.flops if begin else 0)) / (experts * cost.training)
    method = method or ("random" if experts == 1 else costs.config.data.method)
    steps = int(affordable / batch / points)  # never above the budget
    if steps < 1:
        raise ConfigError(
            f"the budget of the {tier} tier leaves arm {arm} fewer than {points} steps of {batch} clips after its router; "
            "use more samples, fewer checkpoints or a smaller router"
        )
    return Training(
        name=f"{tier}-{arm}-s{seed}", tier=tier, arm=arm, seed=seed, method=method,
        experts=experts, expert=spec, batch=batch, learning_rate=learning_rate or costs.config.optimisation.learning_rate,
        samples_per_shard=steps * batch * points, checkpoint_samples=steps * batch,
        flops_per_sample=cost.training, router_flops=router, pass_flops=cost.forward + routing,
        parameters=experts * cost.parameters, active_parameters=cost.parameters, begin=begin,
    )  # fmt: skip


def _pair(config: StudyConfig, costs: _Costs, tier: Tier, seed: int, rate: float | None = None) -> Iterator[Training]:
    """Monolith and mixture, at the learning rate of the recipe or at `rate`."""
    experts, batch, suffix = config.data.experts, config.optimisation.batch, "" if rate is None else f"-rate-{rate}"
    yield _training(costs, tier, f"monolith{suffix}", seed, experts=1, batch=batch, learning_rate=rate)
    yield _training(costs, tier, f"mixture{suffix}", seed, experts=experts, batch=batch // experts, learning_rate=rate)


def _base(config: StudyConfig, latent: LatentSpec) -> Iterator[Training]:
    """The image model that all arms start from, if the study trains one."""
    if not isinstance(config.base, FramesBase):
        return
    image = latent.model_copy(update={"frames": 1, "pixel_frames": 1})
    cost, batch = expert_cost(config.expert, image), config.optimisation.batch
    samples = config.base.samples // batch * batch
    yield Training(
        name=f"base-frames-s{config.base.seed}", tier="base", arm="frames", seed=config.base.seed, method="random", experts=1,
        expert=config.expert, batch=batch, learning_rate=config.optimisation.learning_rate, samples_per_shard=samples,
        checkpoint_samples=samples, flops_per_sample=cost.training, router_flops=0, pass_flops=cost.forward,
        parameters=cost.parameters, active_parameters=cost.parameters,
    )  # fmt: skip


def _headline(config: StudyConfig, costs: _Costs) -> Iterator[Training]:
    for seed in config.seeds:
        yield from _pair(config, costs, "headline", seed)
    for arm in config.controls.full:
        for seed in config.seeds:
            yield _arm(config, costs, "headline", arm, seed)


def _controls(config: StudyConfig, costs: _Costs) -> Iterator[Training]:
    controls, experts, batch = config.controls, config.data.experts, config.optimisation.batch
    if not (controls.arms or controls.expert_counts or controls.learning_rates):
        return
    for seed in controls.seeds:
        if not shared(config, seed):
            yield from _pair(config, costs, "control", seed)
        for arm in controls.arms:
            if arm in get_args(Arm):  # the other controls are readings of the mixture, see _control_readings
                yield _arm(config, costs, "control", cast(Arm, arm), seed)
        for count in controls.expert_counts:
            if count != experts:
                yield _training(costs, "control", f"{count}-experts", seed, experts=count, batch=batch // count)
        for rate in controls.learning_rates:
            if rate != config.optimisation.learning_rate:
                yield from _pair(config, costs, "control", seed, rate)


def _arm(config: StudyConfig, costs: _Costs, tier: Tier, arm: Arm, seed: int) -> Training:
    experts, batch = config.data.experts, config.optimisation.batch
    small = batch // experts
    match arm:
        case "small-batch":
            return _training(costs, tier, arm, seed, experts=1, batch=small)
        case "root-rate":
            rate = config.optimisation.learning_rate * math.sqrt(experts)
            return _training(costs, tier, arm, seed, experts=1, batch=batch, learning_rate=rate)
        case "balanced":
            return _training(costs, tier, arm, seed, experts=1, batch=batch, method=arm)
        case "warm-start":
            return _training(
                costs, tier, arm, seed, experts=experts, batch=small, begin=_first_checkpoint(config, costs, tier, seed)
            )
        case "random" | "kinds":
            return _training(costs, tier, arm, seed, experts=experts, batch=small, method=arm)
        case "wide":
            return _training(costs, tier, arm, seed, experts=1, batch=batch, spec=config.wide)
        case "narrow":
            return _training(costs, tier, arm, seed, experts=experts, batch=small, spec=config.narrow)


def _first_checkpoint(config: StudyConfig, costs: _Costs, tier: Tier, seed: int) -> WarmStart:
    """The first checkpoint of the monolith of that tier."""
    tier = "headline" if shared(config, seed) else tier
    monolith = next(each for each in _pair(config, costs, tier, seed) if each.arm == "monolith")
    return WarmStart(training=monolith.name, epoch=1, flops=monolith.flops_at(1))
