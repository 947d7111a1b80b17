"""Clips to evaluate: captioned pixels of one shape in memory, read by the same rule that training uses."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lutetia.models.data.decode.cut import ClipRefused
from lutetia.models.data.decode.pool import DecoderPool
from lutetia.models.data.decode.shape import ClipShape
from lutetia.models.data.ingest.listing import ClipSource, read_listing
from lutetia.system.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClipSet:
    """Captioned clips of one shape: `frames` uint8 [N, F, H, W, 3], N `captions`, and N `kinds` or none."""

    frames: Tensor
    captions: tuple[str, ...]
    kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape = list(self.frames.shape)
        if self.frames.dtype != torch.uint8 or len(shape) != 5 or shape[-1] != 3:
            raise DataError(f"clips must be uint8 [N, F, H, W, 3], not {self.frames.dtype} {shape}; convert them")
        if len(self.captions) != shape[0] or len(self.kinds) not in (0, shape[0]):
            raise DataError(
                f"{shape[0]} clips have {len(self.captions)} captions and {len(self.kinds)} kinds; pass one of each per clip"
            )

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, rows: Sequence[int] | Tensor) -> ClipSet:
        """The clips `rows`, in that order."""
        picked = torch.as_tensor(rows, dtype=torch.long)
        captions = tuple(self.captions[i] for i in picked)
        return ClipSet(self.frames[picked], captions, tuple(self.kinds[i] for i in picked) if self.kinds else ())

    def with_frames(self, frames: Tensor) -> ClipSet:
        """The same captions and kinds with other pixels."""
        return ClipSet(frames, self.captions, self.kinds)


def ordered(clips: Sequence[ClipSource], seed: int | None, stratified: bool = False) -> list[ClipSource]:
    """The clips in the order given, or shuffled by `seed`: the first n are then a sample of the natural mix of kinds.

    `stratified`: kinds alternate, so that the first n hold equally many of each until a kind runs out.
    """
    order = range(len(clips)) if seed is None else np.random.default_rng(seed).permutation(len(clips))
    mixed = [clips[i] for i in order]
    if not stratified:
        return mixed
    seen: Counter[str] = Counter()
    rounds = []
    for clip in mixed:
        rounds.append(seen[clip.kind])
        seen[clip.kind] += 1
    return [clip for _, clip in sorted(zip(rounds, mixed, strict=True), key=lambda pair: pair[0])]


def read_clips(
    folder: Path,
    shape: ClipShape,
    *,
    split: Literal["train", "test"] | None = None,
    captions: Container[str] | None = None,
    first: int = 0,
    limit: int | None = None,
    seed: int | None = None,
    stratified: bool = False,
    skip_bad: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> ClipSet:
    """Read clips of a folder with captions, in the order of `ordered`.

    Args:
        folder: videos with captions.
        shape: frames, frames per second and size that the clips are cut to.
        split: only clips of this split.
        captions: only clips with these captions.
        first: number of the first clip to read.
        limit: how many clips to read at most.
        seed: of the order; None: by name.
        stratified: alternate the kinds.
        skip_bad: leave out clips that cannot be used and log them; the next ones in order take their places.
        on_progress: called with clips done and clips in all.

    Raises DataError if the folder or, without `skip_bad`, any of the clips cannot be used: a metric must not lose clips silently.
    """
    listing = read_listing(folder)
    if listing.bad and not skip_bad:
        raise DataError(f"{folder}: {listing.bad[0].reason} ({len(listing.bad)} clips have faults)")
    matching = [clip for clip in listing.clips if split in (None, clip.split) and (captions is None or clip.caption in captions)]
    candidates = ordered(matching, seed, stratified)[first:]
    count = min(len(candidates), len(candidates) if limit is None else limit)
    frames, chosen = np.empty((count, shape.frames, shape.height, shape.width, 3), np.uint8), list[ClipSource]()
    with DecoderPool() as decoder:
        for clip in candidates:
            if len(chosen) == count:
                break
            try:
                frames[len(chosen)] = decoder.decode(clip.path, shape)
            except ClipRefused as error:
                if not skip_bad:
                    raise
                logger.warning("left out: %s", error)
                continue
            chosen.append(clip)
            if on_progress:
                on_progress(len(chosen), count)
    if not chosen:
        sought = f"clips of split {split or 'any'}" + (" with the given captions" if captions is not None else "")
        raise DataError(f"{folder} has no {sought} from number {first} on; check its metadata")
    clips = torch.from_numpy(frames[: len(chosen)])
    return ClipSet(clips, tuple(clip.caption for clip in chosen), tuple(clip.kind for clip in chosen))
