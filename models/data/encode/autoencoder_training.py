"""Train a small `AutoencoderTiny` from scratch, on frames of drawn clips (as in the demo) or of the user's own clips.

It replaces a real video autoencoder where only minutes on two cores are available: 64x64 pixels become 8x8 latents of 8 channels
(or 16x16 of fewer), frame by frame. It learns how the pictures look, but no motion and no words: those the swarm learns.
`lutetia data train-autoencoder` runs it. The result loads with `diffusers.AutoencoderTiny.from_pretrained`; the mean and
standard deviation of its latents per channel are `latents_mean` and `latents_std` in its `config.json`.
"""

import contextlib
import math
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from torch import Tensor

from lutetia.models.data.decode.pool import DecoderPool
from lutetia.models.data.decode.shape import ClipShape
from lutetia.models.data.ingest import synthetic
from lutetia.models.data.ingest.listing import ClipSource, read_listing
from lutetia.system.errors import ConfigError, DataError
from lutetia.system.files import disk_errors, fsync_folder, make_folder

WIDTH, LATENT_CHANNELS, SIZE, CLIP_FRAMES = 32, 8, 64, 8
BATCH, PEAK_RATE, WARMUP = 32, 2.5e-3, 100
LATENT_NOISE = 0.1  # in standard deviations of the latents: the decoder must tolerate small errors of an expert
TRAIN_CLIPS, TEST_CLIPS = 2400, 400
FRAMES_PER_CLIP = {"digit": 2, "shape": 2, "camera": 6}  # photographs have most detail
FRAMES_PER_USER_CLIP = 4  # of each of the user's clips
TRAIN_SEED, TEST_SEED = 0x101, 0x202  # added to the seed, so that neither set is that of the demo

Scale = Literal[4, 8]
Progress = Callable[[int, int, float], None]


def train_autoencoder(
    out: Path,
    seed: int,
    *,
    steps: int = 5000,
    channels: int = LATENT_CHANNELS,
    scale: Scale = 8,
    size: int = SIZE,
    clips: Path | None = None,
    bfloat16: bool = False,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Train an autoencoder, write its folder to `out`, and report the PSNR per kind of clip on unseen frames.

    Args:
        out: new or empty folder. It appears whole or not at all.
        seed: of weights and frames.
        steps: training steps.
        channels: channels of a latent.
        scale: side of the square that one latent stands for, px. A scale of 4 with a quarter of the channels keeps as many
            numbers, and learns details in fewer steps.
        size: height and width of the frames, px, a multiple of 8. It learns details best at the size of its later use.
        clips: folder of captioned clips; frames of the split `train` are used, except for one clip in twenty, which is kept for
            the PSNR. None: drawn clips.
        bfloat16: several times faster on processors that multiply matrices of it (AMX), slow on others.
        on_progress: called with steps done, steps and loss.

    Raises before the training: DataError (`clips` cannot be used, or `out` is not empty), DiskError (`out` cannot be created),
    ConfigError (`size`, or scikit-image is missing for drawn clips).
    """
    _require_size(size)
    if clips is None:
        synthetic.require_photographs()
    started = time.monotonic()
    with _new_folder(out) as part:
        torch.manual_seed(seed)
        model = build_autoencoder(channels, scale).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        (pictures, _), unseen = _sets(clips, seed, size)
        _fit(model, pictures, seed, steps, bfloat16, on_progress)
        model = model.to(memory_format=torch.contiguous_format).eval()  # pyright: ignore[reportCallIssue]
        mean, std = latent_statistics(model, pictures)
        model.register_to_config(latents_mean=mean, latents_std=std)
        model.save_pretrained(part, safe_serialization=True)
    return {
        "seed": seed,
        "steps": steps,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(time.monotonic() - started, 1),
        "psnr_db": reconstruction_psnr(model, *unseen),
    }


def _require_size(size: int) -> None:
    if size % 8:
        raise ConfigError(
            f"the autoencoder halves its frames up to three times, so its size cannot be {size} pixels; use a multiple of 8"
        )


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out` that becomes `out` on success. Raises DataError if `out` is not empty."""
    with disk_errors(out):
        if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
            raise DataError(f"{out} exists already and is not overwritten; name a new folder")
        home = out.absolute().parent
        make_folder(home)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=home))
    try:
        yield part
        with disk_errors(out):
            part.chmod(0o755)
            os.rename(part, out)  # fails unless `out` is absent or an empty folder
            fsync_folder(home)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _fit(
    model: AutoencoderTiny, pictures: Tensor, seed: int, steps: int, bfloat16: bool, on_progress: Progress | None
) -> None:  # fmt: skip
    """Train `model` on `pictures`, uint8 [N, 3, H, W]."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = _rate(step, steps)
        batch = _to_signal(pictures[torch.randint(len(pictures), (BATCH,), generator=generator)])
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            latents = model.encode(batch, return_dict=False)[0].float()
            noise = LATENT_NOISE * torch.randn(latents.shape, generator=generator)
            rebuilt = model.decode(latents + noise, return_dict=False)[0].float()
        loss = _loss(rebuilt - batch, latents)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if on_progress:
            on_progress(step + 1, steps, loss.item())


def sample_step(channels: int, scale: Scale, size: int, bfloat16: bool) -> Callable[[], None]:
    """A function that does one training step on random frames, to measure its time. Raises ConfigError (`size`)."""
    _require_size(size)
    model = build_autoencoder(channels, scale).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    pictures = torch.randint(0, 256, (BATCH, 3, size, size), dtype=torch.uint8)
    return lambda: _fit(model, pictures, 0, 1, bfloat16, None)


def build_autoencoder(channels: int = LATENT_CHANNELS, scale: Scale = 8) -> AutoencoderTiny:
    """An untrained autoencoder of 0.37 million parameters (0.26 at `scale` 4): scale x scale pixels to a latent of `channels`."""
    encoder = (0, 1, 2, 2) if scale == 8 else (0, 1, 2)  # no block at full resolution: it would cost as much as all others
    decoder = (2, 2, 1, 1) if scale == 8 else (2, 2, 1)
    return AutoencoderTiny(
        encoder_block_out_channels=(WIDTH,) * len(encoder),
        decoder_block_out_channels=(WIDTH,) * len(decoder),
        num_encoder_blocks=encoder,
        num_decoder_blocks=decoder,
        latent_channels=channels,
    )


@torch.no_grad()
def latent_statistics(model: AutoencoderTiny, pictures: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per latent channel over `pictures`, uint8 [N, 3, H, W]."""
    latents = torch.cat([model.encode(_to_signal(part), return_dict=False)[0] for part in pictures.split(64)])
    std, mean = torch.std_mean(latents, dim=(0, 2, 3))
    return [round(value, 5) for value in mean.tolist()], [round(value, 5) for value in std.tolist()]


@torch.no_grad()
def reconstruction_psnr(model: AutoencoderTiny, pictures: Tensor, kinds: list[str]) -> dict[str, float]:
    """Mean PSNR in dB per kind over `pictures`, uint8 [N, 3, H, W], each of the kind in `kinds`."""
    ratios = []
    for part in pictures.split(64):
        signal = _to_signal(part)
        rebuilt = model.decode(model.encode(signal, return_dict=False)[0], return_dict=False)[0].clamp(-1, 1)
        ratios.append(-10 * torch.log10(((rebuilt - signal) / 2).square().mean((1, 2, 3)).clamp_min(1e-10)))
    together = torch.cat(ratios).numpy()
    return {kind: round(float(together[np.array(kinds) == kind].mean()), 2) for kind in sorted(set(kinds))}


def _frames(clips: int, seed: int, size: int) -> tuple[Tensor, list[str]]:
    """Some frames of each of `clips` drawn clips, uint8 [N, 3, size, size], and their kinds."""
    rng = np.random.default_rng(seed)
    chosen, kinds = [], []
    for clip in synthetic.plan(clips, seed):
        number = FRAMES_PER_CLIP[clip.kind]
        chosen.append(synthetic.draw(clip, CLIP_FRAMES, size)[rng.choice(CLIP_FRAMES, number, replace=False)])
        kinds += [clip.kind] * number
    return torch.from_numpy(np.concatenate(chosen)).permute(0, 3, 1, 2).contiguous(), kinds


def _sets(clips: Path | None, seed: int, size: int) -> tuple[tuple[Tensor, list[str]], tuple[Tensor, list[str]]]:
    """(Frames, kinds) to train on, and others for the PSNR."""
    if clips is None:
        return _frames(TRAIN_CLIPS, seed + TRAIN_SEED, size), _frames(TEST_CLIPS, seed + TEST_SEED, size)
    listed = [clip for clip in read_listing(clips).clips if clip.split == "train"]
    is_held_back = [zlib.crc32(clip.name.encode()) % 20 == 0 for clip in listed]
    seen, unseen = (
        [clip for clip, held_back in zip(listed, is_held_back, strict=True) if held_back is want] for want in (False, True)
    )
    if not seen or not unseen:
        raise DataError(f"{clips} has {len(listed)} clips of split train, too few for an autoencoder; use some dozens at least")
    return _frames_of(seen, seed, size), _frames_of(unseen, seed, size)


def _frames_of(clips: Sequence[ClipSource], seed: int, size: int) -> tuple[Tensor, list[str]]:
    """FRAMES_PER_USER_CLIP random frames of each clip, uint8 [N, 3, size, size], and their kinds."""
    rng = np.random.default_rng(seed)
    shape = ClipShape(frames=CLIP_FRAMES, height=size, width=size, start="whole", short="loop")
    with DecoderPool() as decoder:
        chosen = (rng.choice(CLIP_FRAMES, FRAMES_PER_USER_CLIP, replace=False) for _ in clips)
        frames = [decoder.decode(clip.path, shape)[rows] for clip, rows in zip(clips, chosen, strict=True)]
    kinds = [clip.kind for clip in clips for _ in range(FRAMES_PER_USER_CLIP)]
    return torch.from_numpy(np.concatenate(frames)).permute(0, 3, 1, 2).contiguous(), kinds


def _to_signal(pictures: Tensor) -> Tensor:
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _rate(step: int, steps: int) -> float:
    return PEAK_RATE * min(1.0, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-5


def _loss(error: Tensor, latents: Tensor) -> Tensor:
    """Absolute and squared error, absolute error of edges, and a penalty that keeps latents at zero mean and unit variance."""
    across = error[..., :, 1:] - error[..., :, :-1]
    down = error[..., 1:, :] - error[..., :-1, :]
    rebuild = error.abs().mean() + 2 * error.square().mean() + 0.5 * (across.abs().mean() + down.abs().mean())
    variance, mean = torch.var_mean(latents, dim=(0, 2, 3))
    return rebuild + 0.01 * (mean.square().mean() + (variance - 1).square().mean())
