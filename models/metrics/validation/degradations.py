"""Known faults put into real clips: what a metric must notice before its figures on generated clips mean anything."""

from __future__ import annotations

import torch
from torch import Tensor

from lutetia.models.metrics.clips import ClipSet

MILD_SIGMA, STRONG_SIGMA = 10.0, 40.0


def noisy(clips: ClipSet, sigma: float, seed: int) -> ClipSet:
    """Independent Gaussian noise of `sigma` grey levels (of 255) on every pixel of every frame."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.empty_like(clips.frames)
    for number, clip in enumerate(clips.frames):  # one clip at a time: the floats of a large set would not fit
        disturbed = clip.float() + sigma * torch.randn(clip.shape, generator=generator)
        frames[number] = disturbed.round().clamp(0, 255).to(torch.uint8)
    return clips.with_frames(frames)


def shuffled_frames(clips: ClipSet, seed: int) -> ClipSet:
    """Every clip's frames in a random order of its own: each frame stays as real as it was, only the motion is wrong."""
    generator = torch.Generator().manual_seed(seed)
    count = clips.frames.shape[1]
    frames = torch.stack([clip[_moved(count, generator)] for clip in clips.frames])
    return clips.with_frames(frames)


def frozen(clips: ClipSet) -> ClipSet:
    """Every clip's first frame throughout: the content without any motion."""
    return clips.with_frames(clips.frames[:, :1].expand_as(clips.frames).contiguous())


def shuffled_captions(clips: ClipSet, seed: int) -> ClipSet:
    """The same clips, each with the caption of another clip, and of another wording wherever there is one left."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(clips), generator=generator).tolist()
    moved = order[1:] + order[:1]
    captions = list(clips.captions)
    for source, target in zip(order, moved, strict=True):
        captions[target] = clips.captions[source]
    for number, wanted in enumerate(clips.captions):
        if captions[number] != wanted:
            continue
        free = (n for n in range(len(captions)) if captions[n] != wanted and clips.captions[n] != wanted)
        other = next(free, None)
        if other is not None:
            captions[number], captions[other] = captions[other], captions[number]
    return ClipSet(clips.frames, tuple(captions), clips.kinds)


def _moved(count: int, generator: torch.Generator) -> Tensor:
    """A random permutation other than the identity."""
    order = torch.randperm(count, generator=generator)
    return order.roll(1) if count > 1 and bool((order == torch.arange(count)).all()) else order
