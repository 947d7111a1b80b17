"""Pictures that experts take in channels of their own, as Wan 2.1 and CogVideoX do to make clips from pictures.

Noisy latents, mask and the picture's latents are stacked: `[B, C + mask + C, F, H, W]`. Wan's picture latents are those of the
picture followed by grey frames; CogVideoX's are those of the picture alone, and zero in all other frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lutetia.protocol.schema.model.latent_spec import LatentSpec


@dataclass(frozen=True)
class Pictures:
    """The first pictures of N clips.

    Attributes:
        latents: [N, C, f, H, W], of all frames or of the first alone.
        vision: embeddings of the image encoder, [N, T, D]; None: the experts take none.
        mask: channels that say which frame is given.
    """

    latents: Tensor
    vision: Tensor | None = None
    mask: int = 0

    def each(self, change: Callable[[Tensor], Tensor]) -> Pictures:
        """The same with changed tensors, for instance some of the rows, or on another device."""
        return Pictures(change(self.latents), None if self.vision is None else change(self.vision), self.mask)

    def channels(self, x: Tensor) -> Tensor:
        """What is stacked on noisy latents `x [N, C, F, H, W]`: mask and picture, [N, mask + C, F, H, W]."""
        missing = x.shape[2] - self.latents.shape[2]
        latents = nn.functional.pad(self.latents, (0, 0, 0, 0, 0, missing)).to(x)
        mask = x.new_zeros(len(x), self.mask, *x.shape[2:])
        mask[:, :, :1] = 1
        return torch.cat([mask, latents], dim=1)


def empty_pictures(latent: LatentSpec, rows: int) -> Pictures | None:
    """Pictures of these shapes without values, to rehearse a call; None: the experts take none."""
    spec = latent.picture
    if spec is None:
        return None
    vision = torch.empty(rows, spec.vision_tokens, spec.vision_width) if spec.vision_tokens else None
    return Pictures(torch.empty(rows, *latent.picture_shape), vision, spec.mask)


def read_channels(channels: Tensor, count: int, vision: Tensor | None) -> Pictures | None:
    """The pictures in the channels of a pipeline's call; None where they are no first frames.

    Args:
        channels: all but the noisy latents, [N, mask + count, F, H, W].
        count: channels of a latent.
        vision: [N, T, D], or None.
    """
    mask, latents = channels[:, :-count], channels[:, -count:]
    if mask.shape[1] and not ((mask[:, :, :1] == 1).all() and not mask[:, :, 1:].any()):
        return None
    if not mask.shape[1]:
        if latents[:, :, 1:].any():
            return None
        latents = latents[:, :, :1]
    return Pictures(latents, vision, mask.shape[1])
