"""Shapes and origin of the latents and text embeddings of a run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from lutetia.protocol.schema.canonical import WireDocument
from lutetia.protocol.schema.fields import (
    Extent,
    Label,
    Positive,
    Real,
    added,
)
from lutetia.protocol.schema.model.pipeline_spec import PictureSpec, TextRecipe


class LatentShape(WireDocument):
    """The shape of latents of a further bucket."""

    frames: Extent = Field(description="Frames of a latent")
    height: Extent = Field(description="Height of a latent, in latent pixels")
    width: Extent = Field(description="Width of a latent, in latent pixels")
    pixel_frames: Extent = Field(description="Frames of a decoded clip")
    pixel_height: Extent = Field(description="Height of a decoded clip in pixels")
    pixel_width: Extent = Field(description="Width of a decoded clip in pixels")


Buckets = Annotated[tuple[LatentShape, ...], Field(max_length=63)]


class LatentSpec(WireDocument):
    """Shape and origin of the latents and text embeddings that are trained on.

    A network's latents are (raw - mean) / std per channel, with `mean` and `std` measured on the data.
    """

    channels: Extent = Field(description="Channels of a latent")
    frames: Extent = Field(description="Frames of a latent")
    height: Extent = Field(description="Height of a latent, in latent pixels")
    width: Extent = Field(description="Width of a latent, in latent pixels")
    vae: Label = Field(description="Name of the autoencoder that made the latents")
    pixel_frames: Extent = Field(description="Frames of a decoded clip")
    pixel_height: Extent = Field(description="Height of a decoded clip in pixels")
    pixel_width: Extent = Field(description="Width of a decoded clip in pixels")
    fps: Positive = Field(default=8.0, description="Frames per second of a decoded clip")
    text_encoder: Label = Field(description="Name of the text encoder that made the embeddings")
    text_tokens: Extent = Field(description="Tokens of a text embedding")
    text_width: Extent = Field(description="Numbers per token of a text embedding")
    pooled_width: Extent = Field(description="Numbers in the pooled text embedding, which the router sees")
    mean: tuple[Real, ...] = Field(default=(), max_length=4096, description="Mean of the raw latents, per channel; empty: 0")
    std: tuple[Positive, ...] = Field(
        default=(), max_length=4096, description="Standard deviation of the raw latents, per channel; empty: 1"
    )

    text: TextRecipe | None = added(
        None, "How `text_encoder`, a pipeline, turns captions into tokens; null: it names an encoder whose tokens end in zeros"
    )

    picture: PictureSpec | None = added(None, "What shards hold of the first picture of each clip; null: nothing")

    buckets: Buckets = added((), "Shapes of the data's further buckets; the fields above are those of the first")

    @model_validator(mode="after")
    def _one_statistic_per_channel(self) -> LatentSpec:
        if len(self.mean) != len(self.std) or len(self.mean) not in (0, self.channels):
            raise ValueError("mean and std must both be empty or have one entry per channel")
        return self

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(channels, frames, height, width) of one latent."""
        return self.channels, self.frames, self.height, self.width

    @property
    def picture_shape(self) -> tuple[int, int, int, int]:
        """(channels, frames, height, width) of the latents of one picture, where shards hold them."""
        return self.channels, self.frames if self.picture and self.picture.frames == "all" else 1, self.height, self.width

    def in_bucket(self, number: int) -> LatentSpec:
        """The spec with the shape of bucket `number`, which has no further buckets; 0 is the first."""
        shape = dict(self.buckets[number - 1]) if number else {}
        return self.model_copy(update={**shape, "buckets": ()})

    @property
    def of_buckets(self) -> tuple[LatentSpec, ...]:
        """The spec of each bucket."""
        return tuple(self.in_bucket(number) for number in range(1 + len(self.buckets)))
