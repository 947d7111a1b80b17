"""Clips that begin with a picture: which pipelines and autoencoders can, and that they are those of the stock pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from lutetia.cli.local.first_picture import read_picture
from lutetia.cli.local.sampler import MixtureLoader
from lutetia.coordinator.admin.create import create_run
from lutetia.coordinator.settings import RunSettings
from lutetia.models.data.description import DATA_FILE, read_data
from lutetia.models.data.encode.latents import load_latents
from lutetia.models.mixing.router import build_router
from lutetia.models.mixing.stitch import stitch
from lutetia.models.pipeline import load_pipeline
from lutetia.models.sources.pipeline import open_pipeline
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.capabilities import FIRST_FRAME
from lutetia.system.errors import ConfigError, UsageError
from tests.cli.command_runner import lutetia
from tests.coordinator.tiny_data import build_tiny
from tests.pipelines.made_pipeline import PICTURE, Made, apart, draw_mixture, draw_stock
from tests.pipelines.tiny_clips import STEPS, build_settings
from tests.pipelines.tiny_pipelines import PROMPTS, pipeline_folder

TINY = RunSettings(preset="tiny", addresses=("127.0.0.1:41777",))


@pytest.mark.parametrize(
    ("name", "alone"),
    [("wan21", True), ("wan22-ti2v", True), ("ltx", True), ("mochi", True), ("cogvideox-2b", False), ("hunyuan", False)],
)
def test_first_latent_frame_is_that_of_the_picture_alone(name: str, alone: bool, tmp_path: Path) -> None:
    """Bit by bit; of Mochi, whose experts take no pictures, but for rounding."""
    settings, latents = build_settings(name, tmp_path), load_latents(str(pipeline_folder(name) / "vae"))
    shape = (1, 3, settings.frames, settings.height, settings.width)
    clip = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(1)) - 1
    first, picture = latents.encode_pictures(clip)[:, :, :1], latents.encode_pictures(clip[:, :, :1])
    assert latents.begins_with_picture == alone
    apart = ((first - picture).norm() / picture.norm()).item()
    assert apart < 1e-5 if alone else apart > 1e-3
    assert torch.equal(first, picture) or name not in ("wan21", "wan22-ti2v", "ltx")


def test_image_to_video_pipelines_are_trained_with_pictures_unless_the_run_says_otherwise() -> None:
    shares = {name: open_pipeline(str(pipeline_folder(name))).expert(8).first_frame for name in ("wan22-i2v", "ltx-i2v")}
    assert shares == {"wan22-i2v": 0.9, "ltx-i2v": 0.9}
    assert open_pipeline(str(pipeline_folder("wan22-ti2v"))).expert(8).first_frame is None


def test_run_with_first_frames_on_an_autoencoder_that_mixes_frames_is_refused(tmp_path: Path) -> None:
    data, settings = build_tiny(tmp_path / "data"), TINY.model_copy(update={"first_frame": 0.5})
    manifest = create_run(data, tmp_path / "run", settings).manifest
    assert (manifest.expert.first_frame, FIRST_FRAME in manifest.needs) == (0.5, True)
    description = read_data(data)
    latent = description.latent.model_copy(update={"vae": str(pipeline_folder("cogvideox-2b") / "vae")})
    (data / DATA_FILE).write_bytes(canonical(description.model_copy(update={"latent": latent})))
    with pytest.raises(ConfigError, match="mix the first picture of a clip with later ones.*leave first_frame out, or build"):
        create_run(data, tmp_path / "other", settings)
    assert not (tmp_path / "other").exists()
    create_run(data, tmp_path / "other", TINY)


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


@pytest.mark.parametrize("made", ["wan22-ti2v", "ltx-i2v"], indirect=True)
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
