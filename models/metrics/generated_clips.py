"""Sample clips from a mixture prompt by prompt, and keep them on disk, so that an interrupted run resumes where it stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lutetia.models.data.decode.shape import ClipShape
from lutetia.models.metrics.clips import ClipSet
from lutetia.models.mixing.options import SamplingOptions
from lutetia.models.mixing.sampling import initial_noise
from lutetia.models.video_files import to_uint8
from lutetia.protocol.schema.canonical import canonical, digest_of
from lutetia.system.files import atomic_path


class ClipSampler(Protocol):
    """Prompts to frames uint8 [N, F, H, W, 3] and the experts' weights [steps, N, K]. Prompt i starts from noise `seed + i`.

    `tag` must change with the mixture and with the settings of its sampling; `shape` is that of the clips.
    """

    tag: str
    shape: ClipShape

    def __call__(self, prompts: Sequence[str], seed: int) -> tuple[Tensor, Tensor]: ...


class MixtureSampler:
    """Sample from the folder of a stitched mixture. Raises ConfigError if the folder holds none, IntegrityError if it is damaged.

    With `oracle` (prompt to expert), each prompt goes to the expert of its cluster, and the router is not used. `hub` says
    whether models that the mixture names by a hub id may be downloaded.
    """

    def __init__(
        self,
        folder: Path,
        sampling: SamplingOptions,
        device: str = "cpu",
        oracle: Mapping[str, int] | None = None,
        hub: bool = False,
    ) -> None:
        from lutetia.models.mixing.description import read_mixture
        from lutetia.models.pipeline import load_pipeline

        self.tag = read_mixture(folder).mixture.digest + (f"/oracle-{digest_of(dict(oracle))}" if oracle else "")
        self.pipeline, self.sampling, self.oracle = load_pipeline(folder, device=device, hub=hub), sampling, oracle
        spec = self.pipeline.spec
        self.shape = ClipShape(frames=spec.pixel_frames, fps=spec.fps, height=spec.pixel_height, width=spec.pixel_width)

    def __call__(self, prompts: Sequence[str], seed: int) -> tuple[Tensor, Tensor]:
        seeds = list(range(seed, seed + len(prompts)))
        if self.oracle is None:
            return self._sample(prompts, seeds, self.sampling.expert)
        chosen = [self.oracle[prompt] for prompt in prompts]
        frames, routing = {}, {}
        for expert in sorted(set(chosen)):
            rows = [row for row, number in enumerate(chosen) if number == expert]
            clips, weights = self._sample([prompts[row] for row in rows], [seeds[row] for row in rows], expert)
            frames.update(zip(rows, clips, strict=True))
            routing.update(zip(rows, weights.unbind(1), strict=True))
        order = range(len(prompts))
        return torch.stack([frames[row] for row in order]), torch.stack([routing[row] for row in order], dim=1)

    def _sample(self, prompts: Sequence[str], seeds: Sequence[int], expert: int | None) -> tuple[Tensor, Tensor]:
        options = self.sampling
        output: Any = self.pipeline(
            list(prompts), options.steps, options.guidance, mode=options.mode, expert=expert, seed=seeds[0],
            latents=initial_noise(self.pipeline.spec.shape, seeds), cut_prompts=True,
        )  # fmt: skip
        return torch.from_numpy(to_uint8(output.frames)), output.routing


def generate(
    sampler: ClipSampler,
    prompts: ClipSet,
    sampling: SamplingOptions,
    seed: int,
    folder: Path | None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> tuple[ClipSet, Tensor]:
    """Sample one clip per caption of `prompts`, each from its own noise, determined by `seed` and its number.

    With a `folder`, every finished batch is kept there, under a name made of mixture, prompts, settings and seed.

    Returns the clips and the weights of the experts [steps, N, K].
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


def _path(folder: Path | None, tag: str, sampling: SamplingOptions, captions: Sequence[str], seed: int) -> Path | None:
    if folder is None:
        return None
    key = {"tag": tag, "sampling": sampling.model_dump(mode="json"), "captions": list(captions), "seed": seed}
    return folder / "generated" / f"{hashlib.sha256(canonical(key)).hexdigest()}.safetensors"


def _read(path: Path | None) -> dict[str, Tensor] | None:
    if path is None or not path.exists():
        return None
    try:
        return load_file(path)
    except SafetensorError:
        return None
