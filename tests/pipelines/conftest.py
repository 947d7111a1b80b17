"""Each tiny pipeline goes the whole way once: data build, run create, an epoch of training, stitch, load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from lutetia.models.mixing.stitch import stitch
from lutetia.models.pipeline import load_pipeline
from tests.pipelines.made_pipeline import Made, train
from tests.pipelines.tiny_clips import build, create, create_by_command, write_clips
from tests.pipelines.tiny_pipelines import PIPELINES, pipeline_folder


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="session", params=sorted(PIPELINES))
def made(request: pytest.FixtureRequest, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    build(name, clips, folder)
    if name == "wan22-ti2v":
        manifest = create_by_command(name, folder / "data", folder / "run", "--first-frame", "0.5")
    else:
        manifest = create(name, folder).manifest
    train(manifest, folder)
    stitch(folder / "mixture", manifest, [folder / "weights.safetensors"], None)
    stock: Any = DiffusionPipeline.from_pretrained(pipeline_folder(name))
    stock.set_progress_bar_config(disable=True)
    stock.transformer = type(stock.transformer).from_pretrained(folder / "mixture" / "expert_000")
    generator = torch.Generator().manual_seed(5)
    if name == "ltx-i2v":  # its pipeline draws the picture's latents first, and takes no latents beside a picture
        torch.randn(1, *stock.vae.encode(torch.zeros(1, 3, 1, 32, 32)).latent_dist.mean.shape[1:], generator=generator)
    noise = torch.randn(2, *manifest.latent.shape, generator=generator)
    return Made(name, folder, manifest, stock, load_pipeline(folder / "mixture"), noise)
