"""Experts that are adapters: what is trained of them, and the base that they share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lutetia.protocol.schema.canonical import WireDocument
from lutetia.protocol.schema.fields import Label, Positive
from lutetia.protocol.schema.model.blob_ref import BlobRef

BaseDtype = Literal["float32", "bfloat16", "fp8", "nf4"]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,120}\.safetensors$")]
ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+){0,7}$", max_length=128)]


class BaseSpec(WireDocument):
    """The frozen model under the adapters. Whoever has files of these digests has it, wherever they come from."""

    source: Label = Field(description="Where it was published, for people and loaders: hub id `owner/name[/folder]@commit`")
    files: dict[FileName, BlobRef] = Field(
        min_length=1, max_length=256, description="Digest and size in bytes of its weights files, by their names in its folder"
    )
    dtype: BaseDtype = Field(
        default="bfloat16",
        description="Data type in which the weights of its blocks' linear layers are kept, which is part of what is trained on",
    )
    served: bool = Field(default=False, description="Whether the coordinator serves its files as blobs")

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(ref.size for ref in self.files.values())


class AdapterSpec(WireDocument):
    """A low-rank adapter (LoRA, Hu et al. 2021, arXiv 2106.09685): W + alpha / rank * B A, of which only A and B are trained."""

    rank: int = Field(default=16, ge=1, le=1024, description="Rank of B A")
    alpha: Positive = Field(default=16.0, description="B A is multiplied by alpha / rank")
    targets: tuple[ModuleName, ...] = Field(
        default=("to_q", "to_k", "to_v", "to_out.0"), min_length=1, max_length=64,
        description="Linear layers that get an adapter, by the ends of their names",
    )  # fmt: skip
    dora: bool = Field(
        default=False, description="Train the length of each row of the weight, too (DoRA, Liu et al. 2024, arXiv 2402.09353)"
    )
    base: BaseSpec = Field(description="The model that it adapts")
