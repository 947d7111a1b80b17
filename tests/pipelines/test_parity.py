"""A mixture that was made of a diffusers pipeline gives that pipeline's own latents: from the prompt, with its own scheduler.

Each pipeline goes the whole way: data build, run create, an epoch of training, stitch, load. Then the stock pipeline, with the
trained transformer, and the mixture draw from equal noise.
"""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from lutetia.models.data.parts.reader import load_shard
from lutetia.models.training.trainer import ExpertTrainer
from tests.pipelines.made_pipeline import Made, apart, draw_mixture, draw_stock
from tests.pipelines.tiny_pipelines import PROMPTS


def test_prompts_give_the_latents_of_the_stock_pipeline(made: Made) -> None:
    theirs = draw_stock(made)
    assert apart(made.noise, theirs) > 0.1, "the transformer moves the latents"
    assert apart(draw_mixture(made), theirs) < 1e-5


def test_mixture_stands_in_for_the_stock_transformer(made: Made) -> None:
    assert apart(draw_stock(made, made.mixture.transformer), draw_stock(made)) < 1e-5


def test_decoded_latents_are_those_of_the_stock_autoencoder(made: Made) -> None:
    """Statistics of the manifest undo the scaling as the pipeline does."""
    latents = made.noise[:1]
    ours = made.mixture.decode_latents(latents)
    stock, latent = made.stock, made.manifest.latent
    vae = stock.vae
    shape = (1, -1, 1, 1, 1)
    with torch.no_grad():
        match made.name.partition("-")[0]:
            case "ltx":
                raw = stock._denormalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
                pictures = vae.decode(raw, None, return_dict=False)[0]
            case "cogvideox":
                pictures = stock.decode_latents(latents.transpose(1, 2))
            case "hunyuan" | "mochi":
                raw = latents / vae.config.scaling_factor
                if vae.config.get("latents_mean"):
                    mean, std = (torch.tensor(vae.config[key]).view(shape) for key in ("latents_mean", "latents_std"))
                    raw = latents * std / vae.config.scaling_factor + mean
                pictures = vae.decode(raw, return_dict=False)[0]
            case _:
                mean, std = (torch.tensor(vae.config[key]).view(shape) for key in ("latents_mean", "latents_std"))
                pictures = vae.decode(latents * std + mean, return_dict=False)[0]
    theirs = stock.video_processor.postprocess_video(pictures, output_type="np")
    # CogVideoX's autoencoder decodes an even number of latent frames, which version 1.5 has, to four frames each
    frames = 4 * latents.shape[2] if made.name == "cogvideox-1.5-i2v" else latent.pixel_frames
    assert ours.shape == theirs.shape == (1, frames, latent.pixel_height, latent.pixel_width, 3)
    assert abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize(
    "scheduler", ["FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
)
@pytest.mark.parametrize("made", ["wan21"], indirect=True)
def test_other_schedulers_set_by_the_caller_agree_too(made: Made, scheduler: str) -> None:
    kind = getattr(diffusers, scheduler)
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    config = {"shift": 3.0} if scheduler.startswith("FlowMatch") else flow
    before = made.stock.scheduler, made.mixture.scheduler
    made.stock.scheduler, made.mixture.scheduler = kind(**config), kind(**config)
    try:
        assert apart(draw_mixture(made), draw_stock(made)) < 1e-5
    finally:
        made.stock.scheduler, made.mixture.scheduler = before


@pytest.mark.parametrize("made", ["hunyuan"], indirect=True)
def test_embedded_guidance_reaches_the_experts(made: Made) -> None:
    assert made.manifest.sampling.embedded_guidance == 6.0
    options: dict[str, Any] = {"latents": made.noise.clone(), "output_type": "latent", "return_dict": False}
    with_six, with_one = (made.mixture(PROMPTS, embedded_guidance=value, **options)[0] for value in (None, 1.0))
    assert apart(with_six, with_one) > 1e-4


@pytest.mark.parametrize("made", ["wan21"], indirect=True)
def test_dropped_texts_are_trained_with_the_null_prompt_of_the_pipeline(made: Made) -> None:
    data = load_shard(made.folder / "data" / "shards" / "000.train.safetensors", made.manifest.latent)
    assert data.null is not None
    empty = made.stock.encode_prompt("", do_classifier_free_guidance=False, max_sequence_length=512)[0][0]
    assert torch.allclose(data.null[0], empty, atol=2e-3), "in half precision"
    trainer = ExpertTrainer(made.manifest, 0, data)
    batches = [trainer._batches.take(epoch, 0) for epoch in range(32)]
    rows = [row for batch in batches for row in batch.tokens]
    dropped = [row for row in rows if torch.equal(row, data.null[0])]
    assert 0 < len(dropped) < len(rows)
