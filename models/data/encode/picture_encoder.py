"""The first picture of a clip, as experts are given it in channels of their own and as embeddings of an image encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lutetia.models.data.encode.latents import Latents
from lutetia.models.networks.model_ref import fingerprint, hub_errors, parse_ref
from lutetia.protocol.schema.model.pipeline_spec import PictureSpec

_WHAT = "image encoder"


class VisionEncoder:
    """The image encoder of a pipeline; its weights are loaded at first use.

    Args:
        pipeline: folder or hub id.
        device: where it computes.
        hub: whether it may be downloaded.

    Raises ConfigError if `pipeline` is neither a folder nor a hub id.
    """

    def __init__(self, pipeline: str, device: str = "cpu", hub: bool = True) -> None:
        ref = parse_ref(pipeline, _WHAT, (), hub)
        self._model, self._processor, self.device = ref.part("image_encoder"), ref.part("image_processor"), device

    @property
    def fingerprint(self) -> str:
        """A string that changes with the encoder."""
        return fingerprint(self._model)

    @cached_property
    def _loaded(self) -> tuple[nn.Module, Any]:
        from transformers import CLIPImageProcessor, CLIPVisionModel

        with hub_errors(_WHAT, self._model):
            processor = CLIPImageProcessor.from_pretrained(self._processor.location, **self._processor.options)
            model: Any = CLIPVisionModel.from_pretrained(
                self._model.location, use_safetensors=True, dtype=torch.float32, **self._model.options
            )
        return model.eval().requires_grad_(False).to(self.device), processor

    @torch.no_grad()
    def encode(self, images: Sequence[Any]) -> Tensor:
        """Embeddings [N, T, D] of pictures, as WanImageToVideoPipeline makes them: the last layer but one, of all patches."""
        model, processor = self._loaded
        pixels = processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.device)
        return model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]


def picture_latents(spec: PictureSpec, latents: Latents, pictures: Tensor, frames: int) -> Tensor:
    """Latents [N, C, f, h, w] of pictures [N, 3, H, W] in -1..1, at the device of `latents` and normalised as these are.

    Args:
        spec: which frames they have.
        latents: the autoencoder.
        pictures: the first frames.
        frames: pixel frames of the clips.
    """
    clip = pictures[:, :, None]
    if spec.frames == "all":
        grey = clip.new_zeros(*clip.shape[:2], frames - 1, *clip.shape[3:])
        clip = torch.cat([clip, grey], dim=2)
    return latents.encode_pictures(clip)
