"""A mixture that was made of a diffusers pipeline gives that pipeline's own latents: from the prompt, with its own scheduler.

Each pipeline goes the whole way: data build, run create, an epoch of training, stitch, load. Then the stock pipeline, with the
trained transformer, and the mixture draw from equal noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from lutetia.cli.local.first_picture import read_picture
from lutetia.cli.local.sampler import MixtureLoader
from lutetia.coordinator.run_folder import RunFolder
from lutetia.models.data.parts.reader import load_shard
from lutetia.models.mixing.router import build_router
from lutetia.models.mixing.stitch import stitch
from lutetia.models.pipeline import load_pipeline
from lutetia.models.training.replay import ReplayEnd, ReplayParent, replay
from lutetia.models.training.trainer import ExpertTrainer, write_state, write_weights
from lutetia.protocol.blobs.store import BlobStore
from lutetia.protocol.schema.manifest import Manifest
from lutetia.system.errors import UsageError
from tests.cli.command_runner import lutetia
from tests.pipelines.tiny_clips import FPS, STEPS, build, create, create_by_command, write_clips
from tests.pipelines.tiny_pipelines import PIPELINES, PROMPTS, pipeline_folder

GUIDANCE = 3.0
WITH_PICTURE = ("wan22-ti2v", "ltx-i2v")
PICTURE = Image.effect_mandelbrot((96, 80), (-3, -2.5, 2, 2.5), 100).convert("RGB")


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"))


@dataclass
class Made:
    """A pipeline and the mixture of one expert that was trained from it."""

    name: str
    folder: Path
    manifest: Manifest
    stock: Any
    mixture: Any
    noise: Tensor


@pytest.fixture(scope="session", params=sorted(PIPELINES))
def made(request: pytest.FixtureRequest, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    build(name, clips, folder)
    by_command = name == "wan22-ti2v"
    manifest = create_by_command(name, folder, "--first-frame", "0.5") if by_command else create(name, folder).manifest
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
        case "wan22" if image:
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
    options: dict[str, Any] = {"image": PICTURE if made.name == "ltx-i2v" else image, "latents": made.noise.clone()}
    options |= {"generator": torch.Generator().manual_seed(3), "output_type": "latent", "return_dict": False}
    return made.mixture(PROMPTS, **options)[0]


def test_prompts_give_the_latents_of_the_stock_pipeline(made: Made) -> None:
    theirs = draw_stock(made)
    assert apart(made.noise, theirs) > 0.1, "the transformer moves the latents"
    assert apart(draw_mixture(made), theirs) < 1e-5


def test_mixture_stands_in_for_the_stock_transformer(made: Made) -> None:
    assert apart(draw_stock(made, made.mixture.transformer), draw_stock(made)) < 1e-5


@pytest.mark.parametrize("made", ["wan22-ti2v"], indirect=True)
def test_clips_that_begin_with_a_picture_are_those_of_the_stock_pipeline(made: Made) -> None:
    theirs = draw_stock(made, image=PICTURE)
    assert apart(draw_mixture(made, PICTURE), theirs) < 1e-5
    assert apart(draw_stock(made, made.mixture.transformer, PICTURE), theirs) < 1e-5
    assert apart(draw_mixture(made)[:, :, 1:], theirs[:, :, 1:]) > 1e-3


@pytest.mark.parametrize("made", ["wan22-ti2v"], indirect=True)
def test_experts_that_are_routed_continue_a_picture_together(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They give what stock transformers give that are weighed by the router's decisions."""
    (shard,) = made.manifest.shards
    shards = (shard, shard.model_copy(update={"index": 1, "name": "other"}))
    manifest = made.manifest.model_copy(update={"shards": shards})
    tensors = load_file(made.folder / "weights.safetensors")
    save_file({name: 0.8 * tensor for name, tensor in tensors.items()}, tmp_path / "other")
    stitch(tmp_path / "mixture", manifest, [made.folder / "weights.safetensors", tmp_path / "other"], build_router(manifest))
    routed = load_pipeline(tmp_path / "mixture")
    seen = []
    routed.transformer.router.register_forward_hook(lambda module, arguments, out: seen.append(arguments[0]))
    options: dict[str, Any] = {"image": PICTURE, "mode": "full", "output_type": "latent", "return_dict": False}
    ours, routing = routed(PROMPTS, latents=made.noise.clone(), **options)
    own = routed.encode_first_frames(routed.video_processor.preprocess(PICTURE, 64, 64))
    assert torch.equal(ours[:, :, :1], own.expand(2, -1, -1, -1, -1))
    assert apart(seen[0][:, :, :1], own.expand(2, -1, -1, -1, -1)) > 0.5, "the router sees a noisy first frame"
    assert routing.min() > 0.01, "both experts take part"
    other = type(made.stock.transformer).from_pretrained(tmp_path / "mixture" / "expert_001")
    answers, calls = made.stock.transformer.forward, iter(range(2 * STEPS))

    def weighed(*args: Any, **kwargs: Any) -> tuple[Tensor]:
        first, second = routing[next(calls) // 2].view(2, 2, 1, 1, 1, 1).unbind(1)
        return (first * answers(*args, **kwargs)[0] + second * other(*args, **kwargs)[0],)

    with monkeypatch.context() as patched:
        patched.setattr(made.stock.transformer, "forward", weighed)
        theirs = draw_stock(made, image=PICTURE)
    assert apart(ours, theirs) < 1e-5
    _, pooled, *_ = routed.encode_prompt(PROMPTS)
    inside = draw_stock(made, routed.transformer, PICTURE, attention_kwargs={"routing_text": pooled, "mode": "full"})
    assert apart(ours, inside) < 1e-5


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
    assert ours.shape == theirs.shape == (1, latent.pixel_frames, latent.pixel_height, latent.pixel_width, 3)
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


@pytest.mark.parametrize("made", WITH_PICTURE, indirect=True)
def test_generate_begins_clips_with_the_picture(made: Made, tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "first.png")
    latent = made.manifest.latent
    options: dict[str, Any] = {"seed": 3, "output_type": "latent", "return_dict": False}
    picture = read_picture(tmp_path / "first.png", latent.pixel_width, latent.pixel_height)
    with_picture, without = (made.mixture(PROMPTS, image=image, **options)[0] for image in (picture, None))
    own = made.mixture.encode_first_frames(made.mixture.video_processor.preprocess(picture))
    assert torch.equal(with_picture[:, :, :1], own.expand(2, -1, -1, -1, -1))
    assert apart(with_picture[:, :, 1:], without[:, :, 1:]) > 0.01
    frames = made.mixture.decode_latents(with_picture)
    clips = [clip.frames for clip in MixtureLoader(made.folder / "mixture").generate(PROMPTS, seed=3, image=picture)]
    assert max(abs(clip / 255 - expected).max() for clip, expected in zip(clips, frames, strict=True)) < 0.01


@pytest.mark.parametrize("made", ["wan22-ti2v"], indirect=True)
def test_generate_command_takes_a_picture(made: Made, tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "first.png")
    options = ("--mixture", made.folder / "mixture", "--seed", "3", "--device", "cpu", "--out", tmp_path / "clip.gif")
    run = lutetia("generate", PROMPTS[0], "--image", tmp_path / "first.png", *options)
    assert run.returncode == 0, run.stderr
    with Image.open(tmp_path / "clip.gif") as clip:
        shown = np.asarray(clip.convert("RGB").resize((64, 64), Image.Resampling.NEAREST), dtype=float)
    loader, picture = MixtureLoader(made.folder / "mixture"), read_picture(tmp_path / "first.png", 64, 64)
    frames = [next(loader.generate(PROMPTS[:1], seed=3, image=image)).frames[0] for image in (picture, None)]
    with_picture, without = (abs(shown - frame).mean() for frame in frames)
    assert with_picture < min(8, without / 2), "but for the colours of a GIF"


@pytest.mark.parametrize("made", ["wan21"], indirect=True)
def test_mixture_of_text_alone_refuses_pictures(made: Made, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="its experts were not trained with first frames"):
        made.mixture(PROMPTS, image=PICTURE)
    with pytest.raises(UsageError, match="were not trained with first frames; leave --image out"):
        next(MixtureLoader(made.folder / "mixture").generate(PROMPTS, image=PICTURE))
    (tmp_path / "x.png").write_text("no picture")
    with pytest.raises(UsageError, match=r"cannot read .*x.png as a picture: .*; give a PNG or JPEG file"):
        read_picture(tmp_path / "x.png", 32, 32)
