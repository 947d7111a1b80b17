"""Clips to judge, sampled from a mixture prompt by prompt and kept on disk, so that a run that was cut goes on where it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...protocol.canonical import Frozen, canonical
from ...system.files import atomic_path
from ..data.clips import ClipShape
from .clips import ClipSet


class Sampling(Frozen):
    """How clips are sampled. None: as the mixture itself says."""

    steps: int | None = Field(default=None, ge=1)
    guidance: float | None = Field(default=None, ge=0)
    mode: Literal["top1", "top2", "full", "sticky"] | None = None
    batch: int = Field(default=8, ge=1)


class Sampler(Protocol):
    """Prompts to frames uint8 [N, F, H, W, 3] and the experts' weights [steps, N, K]; prompt i starts from noise `seed + i`.

    `tag` changes with the mixture; `shape` is that of the clips.
    """

    tag: str
    shape: ClipShape

    def __call__(self, prompts: Sequence[str], seed: int) -> tuple[Tensor, Tensor]: ...


class MixtureSampler:
    """A stitched mixture folder as a sampler. Raises ConfigError when the folder holds none."""

    def __init__(self, folder: Path, sampling: Sampling, device: str = "cpu") -> None:
        from ..mixture_document import read_mixture
        from ..pipeline import load_pipeline

        self.tag = read_mixture(folder).mixture.digest
        self.pipeline, self.sampling = load_pipeline(folder, device=device), sampling
        spec = self.pipeline.spec
        self.shape = ClipShape(frames=spec.pixel_frames, fps=spec.fps, height=spec.pixel_height, width=spec.pixel_width)

    def __call__(self, prompts: Sequence[str], seed: int) -> tuple[Tensor, Tensor]:
        output: Any = self.pipeline(
            list(prompts), self.sampling.steps, self.sampling.guidance, mode=self.sampling.mode, seed=seed
        )
        return torch.from_numpy(output.frames), output.routing


def generate(
    sampler: Sampler,
    prompts: ClipSet,
    sampling: Sampling,
    seed: int,
    folder: Path | None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> tuple[ClipSet, Tensor]:
    """One clip per caption of `prompts`, with noise of its own by `seed` and number, and the routing [steps, N, K] of all.

    With a `folder`, every finished batch is kept below it under mixture, prompts, settings and seed.
    """
    frames, weights = [], []
    for start in range(0, len(prompts), sampling.batch):
        captions = prompts.captions[start : start + sampling.batch]
        first = seed * 1_000_003 + start
        path = _path(folder, sampler.tag, sampling, captions, first)
        batch = _read(path)
        if batch is None:
            clips, routing = sampler(captions, first)
            batch = {"frames": clips, "routing": routing}
            if path is not None:
                with atomic_path(path) as temporary:
                    save_file({name: value.contiguous() for name, value in batch.items()}, temporary)
        frames.append(batch["frames"])
        weights.append(batch["routing"])
        if on_progress:
            on_progress("sampling", start + len(captions), len(prompts))
    return prompts.with_frames(torch.cat(frames)), torch.cat(weights, dim=1)


def _path(folder: Path | None, tag: str, sampling: Sampling, captions: Sequence[str], seed: int) -> Path | None:
    if folder is None:
        return None
    asked = {"tag": tag, "sampling": sampling.model_dump(mode="json"), "captions": list(captions), "seed": seed}
    return folder / "generated" / f"{hashlib.sha256(canonical(asked)).hexdigest()}.safetensors"


def _read(path: Path | None) -> dict[str, Tensor] | None:
    if path is None or not path.exists():
        return None
    try:
        return load_file(path)
    except SafetensorError:
        return None
