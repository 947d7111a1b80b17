"""A tiny pipeline that went the whole way, and the latents that it and its mixture draw from equal noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image
from torch import Tensor

from lutetia.coordinator.run_folder import RunFolder
from lutetia.models.data.parts.reader import load_shard
from lutetia.models.pipeline import load_pipeline
from lutetia.models.training.replay import ReplayEnd, ReplayParent, replay
from lutetia.models.training.trainer import ExpertTrainer, write_state, write_weights
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.manifest import Manifest
from tests.pipelines.tiny_clips import FPS, STEPS
from tests.pipelines.tiny_pipelines import PROMPTS, pipeline_folder

GUIDANCE = 3.0
PICTURE = Image.effect_mandelbrot((96, 80), (-3, -2.5, 2, 2.5), 100).convert("RGB")


@dataclass
class Made:
    """A pipeline and the mixture of one expert that was trained from it."""

    name: str
    folder: Path
    manifest: Manifest
    stock: Any
    mixture: Any
    noise: Tensor


def stitched(name: str, folder: Path, manifest: Manifest, mixture: Path) -> Made:
    """The stock pipeline with the trained transformer, and the mixture, loaded, with noise for both."""
    stock: Any = DiffusionPipeline.from_pretrained(pipeline_folder(name))
    stock.set_progress_bar_config(disable=True)
    stock.transformer = type(stock.transformer).from_pretrained(mixture / "expert_000")
    generator = torch.Generator().manual_seed(5)
    if name == "ltx-i2v":  # its pipeline draws the picture's latents first, and takes no latents beside a picture
        torch.randn(1, *stock.vae.encode(torch.zeros(1, 3, 1, 32, 32)).latent_dist.mean.shape[1:], generator=generator)
    noise = torch.randn(2, *manifest.latent.shape, generator=generator)
    return Made(name, folder, manifest, stock, load_pipeline(mixture), noise)


def train(manifest: Manifest, folder: Path) -> None:
    """An epoch from the pipeline's weights, as a node trains it and an audit replays it."""
    blobs = BlobStore(RunFolder(folder / "run").blobs)
    data = load_shard(folder / "data" / "shards" / "000.train.safetensors", manifest.latent)
    assert manifest.expert.init is not None
    first = blobs.path(manifest.expert.init.digest)
    trainer = ExpertTrainer(manifest, 0, data)
    trainer.restore(0, first)
    losses = [trainer.step() for _ in range(manifest.steps_per_epoch)]
    end = trainer.snapshot()
    write_weights(end, folder / "weights.safetensors")
    write_state(end, folder / "state.safetensors")
    author = ReplayEnd(folder / "weights.safetensors", folder / "state.safetensors")
    again = replay(manifest, 0, data, ReplayParent(0, first), manifest.steps_per_epoch, end=author)
    assert (list(again.losses), again.drift) == (losses, 0.0)
    if (share := manifest.expert.first_frame) is not None:
        batches = [trainer._batches.take(epoch, 0).given for epoch in range(16)]
        given = [row for batch in batches for row in (batch if batch is not None else [])]
        assert abs(sum(given) - 32 * share) < 9
        assert 0 < sum(given) < 32, "some are given, and some are not"


def draw_stock(made: Made, transformer: Any = None, image: Any = None, **more: Any) -> Tensor:
    """The stock pipeline's latents `[N, C, F, H, W]`, of its own transformer or of another in its place.

    With a picture those of its image-to-video pipeline, with `more` arguments.
    """
    stock, latent = made.stock, made.manifest.latent
    if image and made.name == "wan22-ti2v":
        parts = {**stock.components, "image_encoder": None, "image_processor": None}
        stock = diffusers.WanImageToVideoPipeline(**parts, expand_timesteps=True)  # pyright: ignore
        stock.set_progress_bar_config(disable=True)
    own, stock.transformer = stock.transformer, transformer or stock.transformer
    if made.manifest.latent.picture:
        image = image or PICTURE
        more = {"image": [image] * 2 if made.name.startswith("cogvideox") else image, **more}
    options: dict[str, Any] = {
        "height": latent.pixel_height, "width": latent.pixel_width, "num_frames": latent.pixel_frames,
        "num_inference_steps": STEPS, "output_type": "latent", "return_dict": False, "latents": made.noise.clone(),
        "guidance_scale": GUIDANCE, **more,
    }  # fmt: skip
    match made.name.partition("-")[0]:
        case "ltx" if made.name == "ltx-i2v":
            options |= {"image": PICTURE, "latents": None, "generator": torch.Generator().manual_seed(5), "frame_rate": FPS}
        case "ltx":
            options |= {"latents": stock._pack_latents(made.noise, 1, 1), "frame_rate": FPS}
        case "cogvideox":
            options |= {"latents": made.noise.transpose(1, 2).clone(), "max_sequence_length": latent.text_tokens}
            options |= {"generator": torch.Generator().manual_seed(3)}
        case "wan22" if image and made.name == "wan22-ti2v":
            options |= {"image": image}
        case "hunyuan":
            options |= {"guidance_scale": 6.0, "true_cfg_scale": GUIDANCE, "negative_prompt": ["", ""]}
    try:
        latents = stock(prompt=PROMPTS, **options)[0]
    finally:
        stock.transformer = own
    if made.name.startswith("ltx"):
        return stock._unpack_latents(latents, *latent.shape[1:], 1, 1)
    return latents.transpose(1, 2) if made.name.startswith("cogvideox") else latents


def apart(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def draw_mixture(made: Made, image: Any = None) -> Tensor:
    always = made.name == "ltx-i2v" or made.manifest.latent.picture
    options: dict[str, Any] = {"image": image or (PICTURE if always else None), "latents": made.noise.clone()}
    options |= {"generator": torch.Generator().manual_seed(3), "output_type": "latent", "return_dict": False}
    return made.mixture(PROMPTS, **options)[0]
