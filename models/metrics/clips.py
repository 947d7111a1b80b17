"""Clips to judge: captioned pixels of one shape in memory, read by the same rule by which training reads them."""

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

from lutetia.models.data.ingest.listing import ClipSource, read_listing
from lutetia.models.data.ingest.video import ClipRefused, ClipShape, decode_clip
from lutetia.system.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClipSet:
    """Captioned clips of one shape: `frames` uint8 [N, F, H, W, 3]; `captions` and `kinds` have N entries, or kinds has none."""

    frames: Tensor
    captions: tuple[str, ...]
    kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape = list(self.frames.shape)
        if self.frames.dtype != torch.uint8 or len(shape) != 5 or shape[-1] != 3:
            raise DataError(f"clips must be uint8 [N, F, H, W, 3], not {self.frames.dtype} {shape}; convert them")
        if len(self.captions) != shape[0] or len(self.kinds) not in (0, shape[0]):
            raise DataError(
                f"{shape[0]} clips have {len(self.captions)} captions and {len(self.kinds)} kinds; give one of each per clip"
            )

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, rows: Sequence[int] | Tensor) -> ClipSet:
        """The clips `rows`, in that order."""
        picked = torch.as_tensor(rows, dtype=torch.long)
        captions = tuple(self.captions[i] for i in picked)
        return ClipSet(self.frames[picked], captions, tuple(self.kinds[i] for i in picked) if self.kinds else ())

    def with_frames(self, frames: Tensor) -> ClipSet:
        """Other pixels under the same captions and kinds."""
        return ClipSet(frames, self.captions, self.kinds)


def ordered(clips: Sequence[ClipSource], seed: int | None, stratified: bool = False) -> list[ClipSource]:
    """By name, or with a `seed` at random: the first n are then a sample of the natural mixture of kinds.

    `stratified`: the kinds take turns, so that the first n hold equally many of each as long as they last.
    """
    order = range(len(clips)) if seed is None else np.random.default_rng(seed).permutation(len(clips))
    mixed = [clips[i] for i in order]
    if not stratified:
        return mixed
    turn: Counter[str] = Counter()
    turns = []
    for clip in mixed:
        turns.append(turn[clip.kind])
        turn[clip.kind] += 1
    return [clip for _, clip in sorted(zip(turns, mixed, strict=True), key=lambda pair: pair[0])]


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
    """Clips number `first` to `first + limit` of a folder with captions, in the order of `ordered`; with `captions` only those.

    Raises DataError when the folder, or any clip among those asked for, cannot be used: a metric must not lose clips in silence.
    With `skip_bad` such clips are left out, the log names them, and the next ones in order take their places.
    """
    listing = read_listing(folder)
    if listing.bad and not skip_bad:
        raise DataError(f"{folder}: {listing.bad[0].reason} ({len(listing.bad)} clips have such faults)")
    wanted = [clip for clip in listing.clips if split in (None, clip.split) and (captions is None or clip.caption in captions)]
    candidates = ordered(wanted, seed, stratified)[first:]
    count = min(len(candidates), len(candidates) if limit is None else limit)
    frames, chosen = np.empty((count, shape.frames, shape.height, shape.width, 3), np.uint8), list[ClipSource]()
    for clip in candidates:
        if len(chosen) == count:
            break
        try:
            frames[len(chosen)] = decode_clip(clip.path, shape)
        except ClipRefused as error:
            if not skip_bad:
                raise
            log.warning("left out: %s", error)
            continue
        chosen.append(clip)
        if on_progress:
            on_progress(len(chosen), count)
    if not chosen:
        what = f"clips of split {split or 'any'}" + (" with the wanted captions" if captions is not None else "")
        raise DataError(f"{folder} has no {what} from number {first}; check its metadata")
    clips = torch.from_numpy(frames[: len(chosen)])
    return ClipSet(clips, tuple(clip.caption for clip in chosen), tuple(clip.kind for clip in chosen))
