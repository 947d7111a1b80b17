"""Settings of `lutetia data build`. Importing this takes no torch, so that a command's help can be made from it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lutetia.models.data.decode.pool import CLIP_SECONDS
from lutetia.models.data.decode.shape import ClipShape
from lutetia.models.device import Device
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.fields import Count, Extent

MAX_FINE = 1024
MAX_TOKENS = 512
"""Tokens of a caption, at most."""


class ClusterSettings(Frozen):
    """How clips are clustered."""

    method: Literal["kmeans", "random", "kinds"] = Field(
        default="kmeans", description="kmeans: by features; random: equal shares at random; kinds: by the kinds in the metadata"
    )
    experts: Count = Field(
        default=3, description="number of shards K, one expert each; auto: chosen by silhouette, sizes of clusters and budget"
    )
    fine: int | None = Field(
        default=None, ge=1, le=MAX_FINE, description="fine centroids of the clustering; none: one per six clips, at most 1,024"
    )
    largest_share: float | None = Field(
        default=None, gt=0, le=1, description="largest share of the clips in one shard; none: 2.2/K, at most 0.9"
    )
    smallest: Count | None = Field(
        default=None, description="fewest clips in a shard; none: 24, or half of an equal share where that is fewer"
    )
    seed: int = Field(default=0, description="seed of the clustering")


class BuildSettings(ClipShape, ClusterSettings):
    """How clips become shards."""

    auto_experts: bool = Field(default=False, description="choose the number of shards by the data, as experts = auto does")
    budget: Count | None = Field(
        default=None, description="training samples of all experts together, which limits an automatic K; none: no limit"
    )
    pipeline: str | None = Field(
        default=None,
        description="diffusers pipeline whose autoencoder, text encoder, token count and frame rate are taken, a folder or a hub "
        "id owner/name@commit; none: those below",
    )
    latents: str = Field(default="builtin:demo", description="autoencoder: builtin:demo, pixels, a folder or a hub id")
    normalisation: Literal["auto", "measured", "shipped"] = Field(
        default="auto",
        description="mean and std of the latents: measured on the training clips, shipped with the autoencoder, or auto: shipped "
        "if it has them, else measured",
    )
    text: str = Field(default="builtin:words", description="text encoder: builtin:words, a folder, a hub id, or a pair A+B")
    text_tokens: int | None = Field(
        default=None,
        ge=1,
        le=MAX_TOKENS,
        description="tokens of captions and prompts; none: as many as the longest caption needs, at least 32",
    )
    features: str = Field(
        default="builtin+text",
        description="features for clustering: builtin, text, i3d, efficientnet, or a folder or hub id of a DINOv2 model, "
        "joined by +",
    )
    holdout: float = Field(default=0.1, gt=0, lt=0.5, description="share of the training clips held out for acceptance checks")
    skip_bad: bool = Field(default=False, description="leave out clips that cannot be used, instead of failing")
    workers: int = Field(
        default_factory=lambda: min(16, os.cpu_count() or 1),
        ge=1,
        le=256,
        description="threads that decode and encode clips; default: one per core, at most 16",
    )
    clip_seconds: float = Field(default=CLIP_SECONDS, ge=1, le=86_400, description="longest time to decode one clip, seconds")
    clip_memory: int | None = Field(
        default=None,
        ge=64,
        le=1 << 20,
        description="most memory to decode one clip, MiB, for each worker; none: 2048, or less where all workers together would "
        "take more than half of the machine's memory",
    )
    device: Device = Field(default="cpu", description="device of autoencoder and encoders: cpu, mps, cuda, cuda:N, xpu or xpu:N")
    cache: Path | None = Field(
        default=None, description="folder that keeps latents and embeddings between builds; none: the user's cache folder"
    )

    buckets: Annotated[tuple[tuple[Extent, Extent, Extent], ...], Field(max_length=63)] = Field(
        default=(),
        description="further shapes of clips as [frames, height, width] in px, beside `frames`, `height` and `width`; every clip "
        "goes to the shape that fits its aspect ratio and length; one frame: a still picture",
    )

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("experts") == "auto":
            return {**{key: value for key, value in values.items() if key != "experts"}, "auto_experts": True}
        return values

    @model_validator(mode="after")
    def _auto_clusters(self) -> BuildSettings:
        if self.auto_experts and self.method != "kmeans":
            raise ValueError(f"experts can be chosen by the data only with method kmeans, not {self.method}")
        return self

    @property
    def clip_shape(self) -> ClipShape:
        return ClipShape.model_validate({name: getattr(self, name) for name in ClipShape.model_fields})

    @property
    def clip_shapes(self) -> tuple[ClipShape, ...]:
        """The shape of each bucket. A still picture is as long as it is shown, so none is too short."""
        first = self.clip_shape
        further = [
            first.model_copy(update={"frames": f, "height": h, "width": w, "short": "loop" if f == 1 else first.short})
            for f, h, w in self.buckets
        ]
        return first, *further

    @property
    def clustering(self) -> ClusterSettings:
        return ClusterSettings.model_validate({name: getattr(self, name) for name in ClusterSettings.model_fields})
