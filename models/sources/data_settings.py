"""What `data build` takes from a diffusers pipeline, checked before a clip is decoded."""

from __future__ import annotations

import logging
from typing import Any

from lutetia.models.data.build_settings import BuildSettings
from lutetia.models.data.encode.latents import load_latents
from lutetia.models.data.encode.text import load_text_encoder
from lutetia.models.data.encode.text_encoder import TextEncoder
from lutetia.models.experts.families import check_fits
from lutetia.models.sources.pipeline import PipelineSource, open_pipeline
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.protocol.schema.model.pipeline_spec import SIDES, PictureSpec, TextRecipe
from lutetia.system.errors import ConfigError

log = logging.getLogger(__name__)


def with_pipeline(settings: BuildSettings) -> tuple[BuildSettings, TextRecipe | None, PictureSpec | None]:
    """The settings with what their pipeline says, how it encodes captions, and what it takes of a clip's first picture.

    Without a pipeline: the settings, and twice None.

    Raises ConfigError: the pipeline cannot be used, a setting contradicts it, or its transformer cannot take clips of this shape.
    """
    if settings.pipeline is None:
        return settings, None, None
    source = open_pipeline(settings.pipeline)
    picture = source.picture
    more = ("image_encoder",) if picture and picture.vision_tokens else ()
    source = open_pipeline(source.model.text, weights=("vae", "text_encoder", *more))
    for name in ("latents", "text", "normalisation"):
        if name in settings.model_fields_set:
            raise ConfigError(
                f"both pipeline and {name} were set; leave {name} out to use that of the pipeline, or leave the pipeline out"
            )
    found: dict[str, Any] = {
        "pipeline": source.model.text, "latents": source.part("vae"), "text": source.model.text, "normalisation": "shipped",
    }  # fmt: skip
    if settings.text_tokens is None:
        found["text_tokens"] = source.tokens
    if "fps" not in settings.model_fields_set:
        found["fps"] = source.convention.fps
    settings = settings.model_copy(update=found)
    log.info(
        "from pipeline %s (%s): autoencoder %s, %d text tokens, %g frames per second", source.model.text, source.class_name,
        settings.latents, settings.text_tokens, settings.fps,
    )  # fmt: skip
    _check_expert(source, settings)
    if picture and any(shape.frames == 1 for shape in settings.clip_shapes):
        raise ConfigError(
            f"{source.class_name} continues pictures, so clips of one frame teach it nothing; leave out frames and buckets of 1"
        )
    return settings, source.text, picture


def check_tokenizer(encoder: TextEncoder) -> None:
    """Raises ConfigError if the tokenizer of the encoder cannot be read."""
    encoder.count(["a"])


def _check_expert(source: PipelineSource, settings: BuildSettings) -> None:
    """Raises ConfigError if the pipeline's transformers cannot take the latents and texts that would be built."""
    latents = load_latents(settings.latents)
    channels, frames, height, width = latents.shape_of(settings.frames, settings.height, settings.width)
    encoder = load_text_encoder(settings.text, settings.text_tokens or 1, source.text)
    latent = LatentSpec(
        channels=channels, frames=frames, height=height, width=width, vae=settings.latents, pixel_frames=settings.frames,
        pixel_height=settings.height, pixel_width=settings.width, fps=settings.fps, text_encoder=settings.text,
        text_tokens=encoder.tokens, text_width=encoder.width, pooled_width=encoder.pooled_width, text=source.text,
        picture=source.picture,
    )  # fmt: skip
    for side in SIDES if len(source.transformers) > 1 else (None,):
        check_fits(source.expert(settings.fps, source.noise_part(side)), latent)
