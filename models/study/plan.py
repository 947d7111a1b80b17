"""The plan of a study, before anything runs: which trainings with which budgets, and what of them is sampled and judged.

A *training* is one run of the swarm: K shards of one way of clustering, one expert class, one batch, one budget, one seed. A
*reading* is a set of clips to judge: a training at some epoch, asked in some way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, cast, get_args

from pydantic import Field

from lutetia.models.data.encode.latents import load_latents
from lutetia.models.data.encode.text import load_text_encoder
from lutetia.models.mixture import Mode
from lutetia.models.study.config import Arm, Prompts, StudyConfig
from lutetia.models.study.flops import Cost, expert_cost, router_cost
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.manifest import ExpertSpec, LatentSpec
from lutetia.system.errors import ConfigError

Tier = Literal["headline", "control"]
Method = Literal["kmeans", "random", "kinds", "balanced"]
Route = Literal["router", "text-blind", "oracle"]


class WarmStart(Frozen):
    """A warm start from another training's `epoch`, whose `flops` count as the starter's own."""

    training: str
    epoch: int
    flops: int


class Training(Frozen):
    """One run of the swarm. `flops` is the whole: all experts' samples, the router's, and those of what it began with."""

    name: str
    tier: Tier
    arm: str
    seed: int
    method: Method
    experts: int
    expert: ExpertSpec
    batch: int
    learning_rate: float
    samples_per_shard: int
    checkpoint_samples: int
    flops_per_sample: int
    router_flops: int
    pass_flops: int = Field(description="of one top-1 step on one clip without guidance: one expert, and the router")
    parameters: int = Field(description="of all experts together, without the router")
    active_parameters: int = Field(description="of one expert: what a top-1 step runs")
    begin: WarmStart | None = None

    @property
    def data(self) -> str:
        """The name of its built data: trainings that cluster alike share them."""
        return f"{self.method}-{self.experts}"

    @property
    def epochs(self) -> int:
        return self.samples_per_shard // self.checkpoint_samples

    @property
    def flops(self) -> int:
        return self.flops_at(self.epochs)

    def flops_at(self, epoch: int) -> int:
        """Spent when every shard has `epoch` accepted checkpoints; router and beginning count in full from the start."""
        before = self.router_flops + (self.begin.flops if self.begin else 0)
        return self.experts * self.checkpoint_samples * epoch * self.flops_per_sample + before


class Reading(Frozen):
    """Clips to judge: of `training` when it had `epoch` checkpoints, routed by `route` and `mode`, or `expert` alone."""

    training: str
    epoch: int
    prompts: Prompts
    clips: int
    route: Route = "router"
    mode: Mode | None = None
    expert: int | None = None

    @property
    def name(self) -> str:
        how = self.route if self.expert is None else f"expert-{self.expert}"
        return f"{self.training}-e{self.epoch}-{how}-{self.mode or 'own'}-{self.prompts}-{self.clips}"

    @property
    def plain(self) -> bool:
        """Asked as a user would ask it: by its own router in the run's own mode."""
        return self.route == "router" and self.mode is None and self.expert is None


class StudyPlan(Frozen):
    """All trainings and all readings, in the order in which they are best carried out: what the headline needs comes first."""

    trainings: tuple[Training, ...]
    readings: tuple[Reading, ...]

    def training(self, name: str) -> Training:
        return next(training for training in self.trainings if training.name == name)

    def readings_of(self, training: Training) -> list[Reading]:
        """What of a training is judged."""
        return [reading for reading in self.readings if reading.training == training.name]

    def controls(self, config: StudyConfig) -> list[tuple[Training, Reading]]:
        """What the table of controls compares: final readings of one N and one kind of prompts, the pair's own first."""
        share, seeds, clips = config.controls.share, config.controls.seeds, config.controls.clips
        found = []
        for training in self.trainings:
            if training.tier == "headline" and (share != 1 or training.seed not in seeds):
                continue
            for reading in self.readings_of(training):
                if (reading.clips, reading.prompts, reading.epoch) == (clips, config.judging.prompts[0], training.epochs):
                    found.append((training, reading))
        return found

    def of(self, tier: Tier, arm: str) -> list[Training]:
        """The trainings of an arm, by seed."""
        return [training for training in self.trainings if (training.tier, training.arm) == (tier, arm)]


def planned_latent(config: StudyConfig) -> LatentSpec:
    """Shapes of the latents and texts that a build by `data` will give; without the statistics, which need the clips.

    Raises ConfigError where autoencoder or text encoder cannot be had.
    """
    data, own = config.data, config.autoencoder
    if own is not None:
        channels, frames, height, width = own.channels, data.frames, data.height // own.scale, data.width // own.scale
    else:
        channels, frames, height, width = load_latents(data.latents).shape_of(data.frames, data.height, data.width)
    text = load_text_encoder(data.text, data.text_tokens or 1)
    return LatentSpec(
        channels=channels, frames=frames, height=height, width=width, vae=data.latents, pixel_frames=data.frames,
        pixel_height=data.height, pixel_width=data.width, fps=data.fps, text_encoder=text.ref, text_tokens=text.tokens,
        text_width=text.width, pooled_width=text.pooled_width,
    )  # fmt: skip


def plan_study(config: StudyConfig, latent: LatentSpec) -> StudyPlan:
    """Budgets such that no arm spends more FLOPs than the tier's budget, nor less by more than a step per checkpoint.

    Raises ConfigError where the budget is too small for that.
    """
    costs = _Costs(config, latent)
    trainings = [*_headline(config, costs), *_controls(config, costs)]
    readings = [reading for training in trainings for reading in _readings(config, training)]
    return StudyPlan(trainings=tuple(trainings), readings=tuple(readings))


class _Costs:
    """Costs of what the study's arms are made of, each counted once."""

    def __init__(self, config: StudyConfig, latent: LatentSpec) -> None:
        self.config, self.latent = config, latent
        self._known: dict[str, Cost] = {}

    def expert(self, spec: ExpertSpec) -> Cost:
        key = spec.model_dump_json()
        if key not in self._known:
            self._known[key] = expert_cost(spec, self.latent)
        return self._known[key]

    def router(self, experts: int) -> tuple[int, int]:
        """FLOPs of training the router among `experts`, and of one of its passes; a monolith has none."""
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
    """The training whose samples use up the tier's budget, to the whole checkpoint."""
    spec = spec or costs.config.expert
    cost, points = costs.expert(spec), costs.config.checkpoints
    router, routing = costs.router(experts)
    affordable = (costs.budget(tier) - router - (begin.flops if begin else 0)) / (experts * cost.training)
    method = method or ("random" if experts == 1 else costs.config.data.method)
    steps = int(affordable / batch / points)  # never above the budget
    if steps < 1:
        raise ConfigError(
            f"the budget of the {tier} tier leaves arm {arm} fewer than {points} steps of {batch} clips beside its router; "
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
    """Both sides, at the learning rate of the recipe or at `rate`."""
    experts, batch, suffix = config.data.experts, config.optimisation.batch, "" if rate is None else f"-rate-{rate}"
    yield _training(costs, tier, f"monolith{suffix}", seed, experts=1, batch=batch, learning_rate=rate)
    yield _training(costs, tier, f"mixture{suffix}", seed, experts=experts, batch=batch // experts, learning_rate=rate)


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
            if arm in get_args(Arm):  # the others ask the control mixture in another way: see _readings
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
        case "balanced":
            return _training(costs, tier, arm, seed, experts=1, batch=batch, method=arm)
        case "warm-start":
            return _training(costs, tier, arm, seed, experts=experts, batch=small, begin=_base(config, costs, tier, seed))
        case "random" | "kinds":
            return _training(costs, tier, arm, seed, experts=experts, batch=small, method=arm)
        case "wide":
            return _training(costs, tier, arm, seed, experts=1, batch=batch, spec=config.wide)
        case "narrow":
            return _training(costs, tier, arm, seed, experts=experts, batch=small, spec=config.narrow)


def _base(config: StudyConfig, costs: _Costs, tier: Tier, seed: int) -> WarmStart:
    """The first checkpoint of the monolith of that budget."""
    tier = "headline" if shared(config, seed) else tier
    monolith = next(each for each in _pair(config, costs, tier, seed) if each.arm == "monolith")
    return WarmStart(training=monolith.name, epoch=1, flops=monolith.flops_at(1))


def shared(config: StudyConfig, seed: int) -> bool:
    """Whether the headline's own pair serves the controls too: they have its whole budget and its seed."""
    return config.controls.share == 1 and seed in config.seeds


def _readings(config: StudyConfig, training: Training) -> Iterator[Reading]:
    if training.tier == "headline":
        yield from _headline_readings(config, training)
    if training.tier == "control" or (training.seed in config.controls.seeds and shared(config, training.seed)):
        yield from _control_readings(config, training)


def _headline_readings(config: StudyConfig, training: Training) -> Iterator[Reading]:
    judging, last = config.judging, training.epochs
    first, *others = judging.prompts
    yield Reading(training=training.name, epoch=last, prompts=first, clips=judging.clips)
    for prompts in others:
        yield Reading(training=training.name, epoch=last, prompts=prompts, clips=judging.clips)
    for epoch in range(1, last + (judging.curve_clips != judging.clips)):  # of one N along the curve
        yield Reading(training=training.name, epoch=epoch, prompts=first, clips=judging.curve_clips)


def _control_readings(config: StudyConfig, training: Training) -> Iterator[Reading]:
    clips, name, last, first = config.controls.clips, training.name, training.epochs, config.judging.prompts[0]
    if training.tier == "control" or clips not in (config.judging.clips, config.judging.curve_clips):
        yield Reading(training=name, epoch=last, prompts=first, clips=clips)
    if training.arm != "mixture":
        return
    arms = config.controls.arms
    if "modes" in arms:
        modes: tuple[Mode, ...] = ("top1", "top2", "full", "sticky")
        for mode in modes:
            if mode != config.sampling.mode:
                yield Reading(training=name, epoch=last, prompts=first, clips=clips, mode=mode)
    for route in ("text-blind", "oracle"):
        if route in arms:
            yield Reading(training=name, epoch=last, prompts=first, clips=clips, route=route)
    if "experts" in arms:
        for expert in range(training.experts):
            yield Reading(training=name, epoch=last, prompts=first, clips=clips, expert=expert)
