"""How a mixture is sampled, as settings and help texts say it. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lutetia.protocol.schema.canonical import Frozen


class SamplingOptions(Frozen):
    """How clips are sampled. Where a field is not set, the settings of the mixture apply."""

    steps: int | None = Field(default=None, ge=1, description="Steps of the ODE solver; default: the mixture's own")
    guidance: float | None = Field(
        default=None, ge=0, description="Strength of the prompt (classifier-free guidance), 1: none; default: the mixture's own"
    )
    mode: Literal["top1", "top2", "full", "sticky"] | None = Field(
        default=None, description="How experts are chosen at every step; default: the mixture's own way"
    )
    expert: int | None = Field(default=None, ge=0, description="Number of the only expert to use, without the router")
    batch: int = Field(default=8, ge=1, description="Clips sampled at once")
