"""Known faults put into real clips. A metric must notice them before its figures on generated clips mean anything."""

from __future__ import annotations

import torch
from torch import Tensor

from lutetia.models.metrics.clips import ClipSet

MILD_SIGMA, STRONG_SIGMA = 10.0, 40.0


def noisy(clips: ClipSet, sigma: float, seed: int) -> ClipSet:
    """Add independent Gaussian noise of `sigma` grey levels (of 255) to every pixel of every frame."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.empty_like(clips.frames)
    for number, clip in enumerate(clips.frames):  # one clip at a time: the floats of a large set would not fit
        disturbed = clip.float() + sigma * torch.randn(clip.shape, generator=generator)
        frames[number] = disturbed.round().clamp(0, 255).to(torch.uint8)
    return clips.with_frames(frames)


def shuffled_frames(clips: ClipSet, seed: int) -> ClipSet:
    """Shuffle the frames of every clip, each clip in its own random order: single frames stay real, only the motion is wrong."""
    generator = torch.Generator().manual_seed(seed)
    count = clips.frames.shape[1]
    frames = torch.stack([clip[_moved(count, generator)] for clip in clips.frames])
    return clips.with_frames(frames)


def frozen(clips: ClipSet) -> ClipSet:
    """Repeat the first frame of every clip: the content without any motion."""
    return clips.with_frames(clips.frames[:, :1].expand_as(clips.frames).contiguous())


def shuffled_captions(clips: ClipSet, seed: int) -> ClipSet:
    """Give every clip the caption of another clip, with another wording wherever one is left."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(clips), generator=generator).tolist()
    moved = order[1:] + order[:1]
    captions = list(clips.captions)
    for source, target in zip(order, moved, strict=True):
        captions[target] = clips.captions[source]
    for number, caption in enumerate(clips.captions):
        if captions[number] != caption:
            continue
        free = (n for n in range(len(captions)) if captions[n] != caption and clips.captions[n] != caption)
        other = next(free, None)
        if other is not None:
            captions[number], captions[other] = captions[other], captions[number]
    return ClipSet(clips.frames, tuple(captions), clips.kinds)


def _moved(count: int, generator: torch.Generator) -> Tensor:
    """A random permutation other than the identity."""
    order = torch.randperm(count, generator=generator)
    return order.roll(1) if count > 1 and bool((order == torch.arange(count)).all()) else order
