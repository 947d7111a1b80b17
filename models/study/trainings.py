"""The units of a study's plan: trainings and readings.

A *training* is one run of the swarm: K shards of one clustering, one expert network, one batch, one budget, one seed. A *reading*
is a set of clips to evaluate: sampled from a training at some epoch, with some routing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from lutetia.models.mixture import Mode
from lutetia.models.study.config import Prompts, StudyConfig
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.model.expert_spec import ExpertSpec

Tier = Literal["base", "headline", "control"]
Method = Literal["kmeans", "random", "kinds", "balanced"]
Route = Literal["router", "text-blind", "oracle"]


class WarmStart(Frozen):
    """A start from the checkpoint of another training."""

    training: str = Field(description="name of the other training")
    epoch: int = Field(description="its epoch to start from")
    flops: int = Field(description="FLOPs up to that epoch; they count for the training that starts from it, too")


class Training(Frozen):
    """One run of the swarm."""

    name: str = Field(description="tier, arm and seed")
    tier: Tier = Field(description="base (trained first, counts for no arm), headline (whole budget) or control (a share of it)")
    arm: str = Field(description="frames (of the base), monolith, mixture or the name of a control")
    seed: int = Field(description="training seed")
    method: Method = Field(description="how clips are clustered")
    experts: int = Field(description="number of shards and experts")
    expert: ExpertSpec = Field(description="network of each expert")
    batch: int = Field(description="clips per step of each expert")
    learning_rate: float = Field(description="peak learning rate")
    samples_per_shard: int = Field(description="clips each expert trains on in all")
    checkpoint_samples: int = Field(description="clips each expert trains on per epoch")
    flops_per_sample: int = Field(description="FLOPs of a training step per clip")
    router_flops: int = Field(description="FLOPs of the training of the router; 0 for a monolith")
    pass_flops: int = Field(description="FLOPs of one top-1 step on one clip without guidance: one expert, and the router")
    parameters: int = Field(description="parameters of all experts together, without the router")
    active_parameters: int = Field(description="parameters of one expert, as a top-1 step uses")
    begin: WarmStart | None = Field(default=None, description="the checkpoint it starts from; none: fresh weights")

    @property
    def data(self) -> str:
        """The name of its built data; trainings with the same clustering share them."""
        if self.tier == "base":
            return "frames"
        return f"{self.method}-{self.experts}"

    @property
    def epochs(self) -> int:
        return self.samples_per_shard // self.checkpoint_samples

    @property
    def flops(self) -> int:
        """FLOPs of the whole training: all experts, the router, and the checkpoint it starts from."""
        return self.flops_at(self.epochs)

    def flops_at(self, epoch: int) -> int:
        """FLOPs when every shard has `epoch` accepted checkpoints. The router and the warm start count in full from the start."""
        before = self.router_flops + (self.begin.flops if self.begin else 0)
        return self.experts * self.checkpoint_samples * epoch * self.flops_per_sample + before


class Reading(Frozen):
    """A set of clips to sample and evaluate."""

    training: str = Field(description="name of the training")
    epoch: int = Field(description="epoch of all its experts")
    prompts: Prompts = Field(description="choice of prompts: natural or stratified")
    clips: int = Field(description="number of clips")
    route: Route = Field(default="router", description="its own router, a router that does not see the prompt, or the clusters")
    mode: Mode | None = Field(default=None, description="sampling mode; none: that of the run")
    expert: int | None = Field(default=None, description="number of the only expert to use; none: all, by `route`")

    @property
    def name(self) -> str:
        how = self.route if self.expert is None else f"expert-{self.expert}"
        return f"{self.training}-e{self.epoch}-{how}-{self.mode or 'own'}-{self.prompts}-{self.clips}"

    @property
    def plain(self) -> bool:
        """Whether it is sampled as a user would: by its own router in the mode of the run."""
        return self.route == "router" and self.mode is None and self.expert is None


def shared(config: StudyConfig, seed: int) -> bool:
    """Whether the pair of the headline also serves the controls: the same budget and seed."""
    return config.controls.share == 1 and seed in config.seeds


def readings_of(config: StudyConfig, training: Training) -> Iterator[Reading]:
    """The readings of a training, the final ones of the headline first."""
    if training.tier == "headline":
        yield from _headline_readings(config, training)
    elif training.tier == "base":
        return
    if training.tier == "control" or (training.seed in config.controls.seeds and shared(config, training.seed)):
        yield from _control_readings(config, training)


def _headline_readings(config: StudyConfig, training: Training) -> Iterator[Reading]:
    evaluation, last = config.evaluation, training.epochs
    first, *others = evaluation.prompts
    yield Reading(training=training.name, epoch=last, prompts=first, clips=evaluation.clips)
    for prompts in others:
        yield Reading(training=training.name, epoch=last, prompts=prompts, clips=evaluation.clips)
    for epoch in range(1, last + (evaluation.curve_clips != evaluation.clips)):  # the same N along the curve
        yield Reading(training=training.name, epoch=epoch, prompts=first, clips=evaluation.curve_clips)


def _control_readings(config: StudyConfig, training: Training) -> Iterator[Reading]:
    clips, name, last, first = config.controls.clips, training.name, training.epochs, config.evaluation.prompts[0]
    if training.tier == "control" or clips not in (config.evaluation.clips, config.evaluation.curve_clips):
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
