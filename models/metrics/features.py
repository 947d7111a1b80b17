"""Features of clips, computed once: a cache on disk, addressed by the pixels of the clip and the tag of the network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lutetia.system.files import atomic_path


class Extractor(Protocol):
    """Clips uint8 [N, F, H, W, 3] to named features [N, D]. `tag` must change whenever a clip could give other features."""

    tag: str

    def __call__(self, clips: Tensor) -> dict[str, Tensor]: ...


def clip_digest(clip: Tensor) -> str:
    """SHA-256 (hex) over shape and pixels of one clip uint8 [F, H, W, 3]."""
    shape = "x".join(str(length) for length in clip.shape)
    return hashlib.sha256(f"{shape}\n".encode() + clip.contiguous().numpy().tobytes()).hexdigest()


class FeatureCache:
    """One file per clip: `<folder>/<hash of the tag>/<digest[:2]>/<digest>.safetensors`, so that any subset of clips hits.

    Without a folder nothing is kept. A truncated file is computed again.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def path(self, tag: str, digest: str) -> Path | None:
        """The file with the features of the clip `digest`; None without a folder."""
        if self.folder is None:
            return None
        return self.folder / hashlib.sha256(tag.encode()).hexdigest()[:16] / digest[:2] / f"{digest}.safetensors"

    def extract(
        self, extractor: Extractor, clips: Tensor, on_progress: Callable[[int, int], None] | None = None, chunk: int = 16
    ) -> dict[str, Tensor]:
        """Features of every clip, in order. Only clips that are not in the cache go through the network.

        Args:
            extractor: the network.
            clips: uint8 [N, F, H, W, 3].
            on_progress: called with clips done and clips in all.
            chunk: clips per call of the network.
        """
        paths = [self.path(extractor.tag, clip_digest(clip)) if self.folder else None for clip in clips]
        rows = [_read(path) for path in paths]
        missing = [number for number, row in enumerate(rows) if row is None]
        for start in range(0, len(missing), chunk):
            numbers = missing[start : start + chunk]
            fresh = extractor(clips[torch.tensor(numbers)])
            for offset, number in enumerate(numbers):
                row = {name: values[offset].clone() for name, values in fresh.items()}
                rows[number] = row
                _write(paths[number], row)
            if on_progress:
                on_progress(len(clips) - len(missing) + start + len(numbers), len(clips))
        complete = [row for row in rows if row is not None]
        return {name: torch.stack([row[name] for row in complete]) for name in complete[0]} if complete else {}


def _read(path: Path | None) -> dict[str, Tensor] | None:
    if path is None or not path.exists():
        return None
    try:
        return load_file(path)
    except SafetensorError:
        return None


def _write(path: Path | None, row: dict[str, Tensor]) -> None:
    if path is not None:
        with atomic_path(path) as temporary:
            save_file(row, temporary)


def set_digest(clips: Tensor | Sequence[Tensor]) -> str:
    """SHA-256 (hex) over the digests of the clips, in order."""
    return hashlib.sha256("\n".join(clip_digest(clip) for clip in clips).encode()).hexdigest()
