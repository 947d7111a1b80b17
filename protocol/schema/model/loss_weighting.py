"""How a run weighs its training loss by the time of the noise."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lutetia.protocol.schema.canonical import WireDocument
from lutetia.protocol.schema.fields import Positive


class LossWeighting(WireDocument):
    """Weights of the loss of each sample; held-out losses are weighted alike."""

    kind: Literal["min-snr", "sigma-sqrt", "cosmap"] = Field(
        description="min-snr: least of signal-to-noise ratio and gamma; sigma-sqrt, cosmap: those of Stable Diffusion 3"
    )
    gamma: Positive = Field(default=5.0, description="Largest weight of min-snr; 5 in its paper")
