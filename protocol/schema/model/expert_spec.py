"""The network of an expert, as the manifest names it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lutetia.protocol.schema.canonical import WireDocument
from lutetia.protocol.schema.fields import (
    added,
)
from lutetia.protocol.schema.model.adapter import AdapterSpec
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.model.pipeline_spec import BetaSchedule, Config, ExpertInputs, NoisePart


class ExpertSpec(WireDocument):
    """The network of one expert."""

    class_name: str = Field(
        default="WanTransformer3DModel", pattern=r"^[A-Z][A-Za-z0-9]{2,63}$", description="Class name of a diffusers transformer"
    )
    config: Config = Field(description="Its configuration, as diffusers reads it")
    prediction: Literal["velocity", "sample", "epsilon"] = Field(default="velocity", description="What it predicts")
    noise_schedule: Literal["linear", "vp_cosine"] = Field(
        default="linear", description="How data and noise are mixed over time: flow matching, or a variance-preserving cosine"
    )
    init: BlobRef | None = Field(default=None, description="Weights that training starts from; null: random ones")
    betas: BetaSchedule | None = added(
        None, "Noise path as a table, which holds in place of `noise_schedule`; null: `noise_schedule`"
    )
    inputs: ExpertInputs | None = added(None, "What the expert is given besides noisy latents and text; null: as its class needs")
    adapter: AdapterSpec | None = added(None, "The adapter that is trained on a frozen base; null: the network is trained whole")

    @property
    def first_frame(self) -> float | None:
        """Share of samples that are trained with their first frame given; None: the expert takes no first frames."""
        return self.inputs.first_frame if self.inputs else None

    @property
    def noise_part(self) -> NoisePart | None:
        """The part of the noise levels that it is trained at; None: all of them."""
        return self.inputs.noise_part if self.inputs else None
