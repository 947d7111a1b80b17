"""How experts and router are trained, and how the mixture samples."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lutetia.protocol.schema.canonical import WireDocument
from lutetia.protocol.schema.fields import (
    Count,
    Extent,
    Positive,
    Rate,
    Real,
    Share,
    Tally,
    added,
)
from lutetia.protocol.schema.model.loss_weighting import LossWeighting
from lutetia.protocol.schema.model.pipeline_spec import SchedulerSpec

MixtureMode = Literal["top1", "top2", "full", "sticky"]
"""Which experts a mixture asks at each step."""


class TimeSampling(WireDocument):
    """How a training step draws its time: t = shift*s / (1 + (shift-1)*s), s = sigmoid(N(mean, std)).

    As in Open-Sora 2.0, with the shift of Stable Diffusion 3.
    """

    mean: Real = Field(default=0.0, description="Mean of the normal distribution before the sigmoid")
    std: Positive = Field(default=1.0, description="Standard deviation of the normal distribution before the sigmoid")
    shift: Positive = Field(default=1.0, description="Above 1: more steps at high noise; 1: no shift")


class Optimisation(WireDocument):
    """How every expert is trained."""

    optimizer: Literal["adamw", "muon"] = Field(default="adamw", description="Optimiser")
    learning_rate: Positive = Field(default=1e-3, description="Learning rate after the warm-up")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the optimiser's first moment per step")
    beta2: float = Field(default=0.99, ge=0, lt=1, description="Decay of the optimiser's second moment per step")
    weight_decay: Rate = Field(default=0.0, description="Decoupled weight decay")
    warmup_steps: Tally = Field(default=20, description="Steps over which the learning rate rises from 0")
    schedule: Literal["constant", "cosine"] = Field(
        default="cosine", description="Learning rate after the warm-up: constant, or a cosine to the end of the budget"
    )
    gradient_clip: Positive = Field(default=1.0, description="Largest norm of the gradient")
    batch: Extent = Field(default=16, description="Samples per training step")
    ema_decay: float = Field(default=0.99, ge=0, lt=1, description="Decay of the weights' moving average per step")
    text_dropout: Share = Field(default=0.1, description="Share of samples that are trained without text")
    time: TimeSampling = Field(default=TimeSampling(), description="How the time of a sample is drawn")
    weighting: LossWeighting | None = added(None, "Weights of the loss by the time of the noise; null: none")


class RouterSpec(WireDocument):
    """The router: a classifier of clusters over (noisy latent, t, pooled text), trained on the natural mixture."""

    hidden: int = Field(default=96, ge=1, le=65536, description="Width of the hidden layers")
    layers: int = Field(default=3, ge=1, le=1024, description="Number of layers")
    text_conditioned: bool = Field(default=True, description="Whether the router sees the text")
    samples: Count = Field(default=6000, description="Samples that the router is trained on")
    batch: Extent = Field(default=32, description="Samples per training step")
    learning_rate: Positive = Field(default=2e-3, description="Learning rate")


class SamplingSpec(WireDocument):
    """How the mixture generates clips, in the gallery and by default."""

    mode: MixtureMode = Field(
        default="top1", description="Experts asked per step: the likeliest, the two likeliest, all, or one drawn at the start"
    )
    steps: Count = Field(default=25, description="Denoising steps")
    guidance: Rate = Field(default=3.0, description="Scale of classifier-free guidance; 1: none")
    time_shift: Positive = Field(default=1.0, description="Shift of the sampler's time steps; above 1: more at high noise")
    prompts: tuple[Annotated[str, Field(min_length=1, max_length=400)], ...] = Field(
        default=(), max_length=64, description="Captions of the gallery's clips"
    )
    scheduler: SchedulerSpec | None = added(None, "Scheduler that gives the steps; null: Euler steps shifted by `time_shift`")
    embedded_guidance: Rate | None = added(
        None, "Guidance that experts with embedded guidance are told; null: that of their training"
    )
