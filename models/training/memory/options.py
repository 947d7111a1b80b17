"""How a training state is kept in memory. Imports no torch: node and coordinator name these options too."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lutetia.protocol.schema.canonical import Frozen

Moments = Literal["float32", "8bit"]
Weights = Literal["float32", "bfloat16"]


class MemoryOptions(Frozen):
    """What a trainer does to need less memory. The defaults are the plain way."""

    checkpointing: bool = Field(
        default=False, description="Keep only the inputs of each block and compute the block again in the backward pass"
    )
    moments: Moments = Field(default="float32", description="Form of AdamW's moments between two steps")
    average: Literal["device", "host"] = Field(default="device", description="Where the moving average is kept")
    weights: Weights = Field(
        default="float32", description="Form of the weights; bfloat16 keeps what it rounds off in a second bfloat16 (Kahan)"
    )

    @property
    def exact(self) -> bool:
        """Whether results are those of the plain way, bit by bit on the same device."""
        return self.moments == "float32" and self.weights == "float32"


PLAIN = MemoryOptions()
