"""The clips of one expert's cluster as latents: drawn digits behind an autoencoder that is trained for them, kept in a folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from lutetia.models.data.encode.autoencoder_training import train_autoencoder
from lutetia.models.data.encode.features import BuiltinFeatures, Joiner
from lutetia.models.data.encode.latents import load_latents
from lutetia.models.data.encode.text import WORD_WIDTH, WordEncoder
from lutetia.models.data.ingest.synthetic import draw, plan
from lutetia.models.data.shards import ShardData
from lutetia.protocol.schema.model.latent_spec import LatentSpec

SIZE, FRAMES, CHANNELS, SCALE, TOKENS = 32, 8, 4, 4, 8
CLIPS, SEED, HELD_OUT = 12_000, 11, 128
"""Clips to draw, of which 45 % show digits; the seed of their plan; digits that are held out."""
AUTOENCODER: dict[str, Any] = {"seed": 7, "steps": 500, "channels": CHANNELS, "scale": SCALE, "size": SIZE}
LATENT = LatentSpec(
    channels=CHANNELS, frames=FRAMES, height=SIZE // SCALE, width=SIZE // SCALE, vae="autoencoder of the benchmark",
    pixel_frames=FRAMES, pixel_height=SIZE, pixel_width=SIZE, text_encoder="builtin:words", text_tokens=TOKENS,
    text_width=WORD_WIDTH, pooled_width=WORD_WIDTH,
)  # fmt: skip


@dataclass(frozen=True)
class TeamClips:
    """The clips of the benchmark.

    Attributes:
        train: digits to train on.
        held_out: digits that the losses are measured on, drawn like those.
        others: shapes and camera moves, which a base of adapters is trained on.
        features: of `train` and `held_out`, float32 [N, D], to split the cluster by.
    """

    train: ShardData
    held_out: ShardData
    others: ShardData
    features: tuple[NDArray[np.float32], NDArray[np.float32]]


def team_clips(folder: Path, count: int = CLIPS) -> TeamClips:
    """The clips in `folder`, which are drawn and encoded if they are not there yet."""
    path = folder / f"clips-{count}.safetensors"
    if not path.exists():
        if not (folder / "autoencoder").exists():
            report = train_autoencoder(folder / "autoencoder", **AUTOENCODER)
            (folder / "autoencoder.json").write_text(json.dumps(report))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_encoded(folder / "autoencoder", count), path)
    tensors = load_file(path)
    data = ShardData(tensors["latents"], tensors["tokens"], tensors["pooled"], [""] * count, [""] * count)
    of_digits = tensors["digit"].bool()
    digits, others = of_digits.nonzero().flatten(), (~of_digits).nonzero().flatten()
    held_out = min(HELD_OUT, len(digits) // 8)
    parts = digits[held_out:], digits[:held_out]
    train, kept = (data.take(rows) for rows in parts)
    features = tensors["features"].numpy()
    return TeamClips(train, kept, data.take(others), (features[parts[0].numpy()], features[parts[1].numpy()]))


def _encoded(autoencoder: Path, count: int) -> dict[str, torch.Tensor]:
    planned = plan(count, SEED)
    pixels = np.stack([draw(clip, FRAMES, SIZE) for clip in planned])
    digit = np.array([clip.kind == "digit" for clip in planned])
    tokens, pooled = WordEncoder(TOKENS).encode([clip.caption for clip in planned])
    coder = load_latents(str(autoencoder))
    raw = torch.cat([coder.encode(part) for part in torch.from_numpy(pixels).split(64)])
    std, mean = torch.std_mean(raw, dim=(0, 2, 3, 4), keepdim=True)
    latents = (raw - mean) / std
    extractor = BuiltinFeatures()
    vectors = np.stack([extractor.of(clip, one) for clip, one in zip(pixels, latents, strict=True)])
    join = Joiner([vectors[digit], pooled.numpy()[digit]])
    features = torch.from_numpy(np.asarray(join([vectors, pooled.numpy()]), dtype=np.float32))
    found = {"latents": latents, "tokens": tokens, "pooled": pooled, "features": features, "digit": torch.from_numpy(digit)}
    return {name: tensor.contiguous() for name, tensor in found.items()}
