"""Experts that take the picture in channels of their own (Wan 2.1, Wan 2.2 A14B, CogVideoX), and through an image encoder."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from lutetia.cli.local.sampler import MixtureLoader
from lutetia.models.data.decode.pool import DecoderPool
from lutetia.models.data.decode.shape import ClipShape
from lutetia.models.data.parts.reader import PartedShard, load_shard, open_shard
from lutetia.models.data.parts.writer import write_shard
from lutetia.models.experts.pictures import Pictures
from lutetia.models.mixing.router import build_router
from lutetia.models.mixing.routing.evidence import gather_evidence
from lutetia.models.mixing.stitch import stitch
from lutetia.models.pipeline import load_pipeline
from lutetia.models.training.batches import Batches
from lutetia.models.training.holdout_loss import holdout_loss
from lutetia.protocol.schema.capabilities import PICTURES
from lutetia.protocol.schema.manifest import Manifest
from lutetia.system.errors import DataError, IntegrityError, UsageError
from tests.cli.command_runner import lutetia
from tests.pipelines.made_pipeline import PICTURE, Made, apart, draw_mixture, draw_stock
from tests.pipelines.tiny_pipelines import PROMPTS

CHANNELS = ["cogvideox-i2v", "cogvideox-1.5-i2v", "wan21-i2v", "wan22-a14b-i2v"]
OTHER = Image.effect_mandelbrot((40, 40), (-1, -1, 1, 1), 50).convert("RGB")


def train_file(made: Made) -> Path:
    return made.folder / "data" / "shards" / "000.train.safetensors"


def stock_condition(made: Made, frame: Any) -> Tensor:
    """What the stock pipeline stacks on the latents of a clip that begins with a frame uint8 [H, W, 3]: [channels, F, h, w]."""
    latent, stock = made.manifest.latent, made.stock
    picture = torch.as_tensor(frame).permute(2, 0, 1)[None].float() / 127.5 - 1
    size = latent.pixel_frames, latent.pixel_height, latent.pixel_width
    if made.name.startswith("cogvideox"):
        stacked = stock.prepare_latents(picture, 1, latent.channels, *size, torch.float32, "cpu", torch.Generator())[1]
        return stacked[0].transpose(0, 1)
    frames, height, width = size
    return stock.prepare_latents(picture, 1, latent.channels, height, width, frames, torch.float32, "cpu")[1][0]


@pytest.mark.parametrize("made", CHANNELS, indirect=True)
def test_shards_hold_pictures_as_the_stock_pipeline_makes_them(made: Made, clips: Path) -> None:
    latent = made.manifest.latent
    assert PICTURES in made.manifest.needs
    data = load_shard(train_file(made), latent)
    assert data.pictures is not None
    held = data.pictures.channels(data.latents)
    shard = open_shard(train_file(made), latent)
    assert isinstance(shard, PartedShard)
    digests = shard.metadata(0).sources
    shape = ClipShape(frames=latent.pixel_frames, fps=latent.fps, height=latent.pixel_height, width=latent.pixel_width)
    with DecoderPool() as decoder:
        frames = {_digest(path): decoder.decode(path, shape) for path in clips.glob("*.mp4")}
    for row, digest in enumerate(digests):
        assert apart(held[row], stock_condition(made, frames[digest][0])) < 2e-3, "in half precision"
    if made.name == "wan21-i2v":
        images = [Image.fromarray(frames[digest][0]) for digest in digests]
        vision = made.stock.encode_image(images, "cpu")
        assert data.pictures.vision is not None
        assert apart(data.pictures.vision, vision) < 2e-3


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("made", ["wan21-i2v"], indirect=True)
def test_training_and_checks_give_each_row_its_own_picture(made: Made, tmp_path: Path) -> None:
    data = load_shard(train_file(made), made.manifest.latent)
    batch = Batches(made.manifest, 0, data).at(3, 0)
    assert batch.pictures is not None
    assert data.pictures is not None
    assert data.pictures.vision is not None
    for row in range(len(batch)):
        (place,) = [clip for clip in range(len(data)) if torch.equal(data.latents[clip], batch.latents[row])]
        half = batch.rows(row, row + 1).pictures
        assert half is not None
        assert torch.equal(half.latents[0], data.pictures.latents[place])
        assert half.vision is not None
        assert torch.equal(half.vision[0], data.pictures.vision[place])
    swapped = data.take(range(len(data)))
    swapped.pictures = data.pictures.each(lambda tensor: tensor.roll(1, 0))
    losses = [holdout_loss(made.manifest, 0, None, each, draw="secret", noises=2) for each in (data, data, swapped)]
    assert losses[0] == losses[1]
    assert all(a != b for a, b in zip(losses[0].rows, losses[2].rows, strict=True))
    weights = {0: made.folder / "weights.safetensors"}
    grams = [gather_evidence(made.manifest, weights, None, [each], draw="a", seconds=0.01).gram for each in (data, swapped)]
    assert not torch.allclose(grams[0], grams[1])
    write_shard(tmp_path / "again.safetensors", data, made.manifest.latent)
    again = load_shard(tmp_path / "again.safetensors", made.manifest.latent)
    assert again.pictures is not None
    assert torch.equal(again.pictures.latents, data.pictures.latents)


@pytest.mark.parametrize("made", ["wan21-i2v"], indirect=True)
def test_shard_without_the_pictures_that_its_index_names_is_refused(made: Made, tmp_path: Path) -> None:
    latent = made.manifest.latent
    assert latent.picture is not None
    data = load_shard(train_file(made), latent)
    with pytest.raises(DataError, match="its pictures are missing"):
        write_shard(tmp_path / "x.safetensors", replace(data, pictures=None), latent)
    other = latent.model_copy(update={"picture": latent.picture.model_copy(update={"vision_tokens": 0, "vision_width": 0})})
    with pytest.raises(IntegrityError, match="was built with picture .* but the run has"):
        load_shard(train_file(made), other)


@pytest.mark.parametrize("made", CHANNELS, indirect=True)
def test_clips_continue_the_picture_that_is_given(made: Made) -> None:
    theirs = draw_stock(made, image=OTHER)
    assert apart(draw_mixture(made, OTHER), theirs) < 1e-5
    assert apart(draw_mixture(made), theirs) > 1e-3
    with pytest.raises(UsageError, match="were trained on clips that begin with a picture; give image"):
        made.mixture(PROMPTS)


@pytest.mark.parametrize("made", ["wan21-i2v"], indirect=True)
def test_each_clip_continues_its_own_picture_by_routed_experts(made: Made, tmp_path: Path) -> None:
    """Of two clips each gets its own expert, as when each is made alone."""
    (shard,) = made.manifest.shards
    manifest = made.manifest.model_copy(update={"shards": (shard, shard.model_copy(update={"index": 1, "name": "other"}))})
    tensors = load_file(made.folder / "weights.safetensors")
    save_file({name: 0.8 * tensor for name, tensor in tensors.items()}, tmp_path / "other")
    stitch(tmp_path / "mixture", manifest, [made.folder / "weights.safetensors", tmp_path / "other"], build_router(manifest))
    routed = load_pipeline(tmp_path / "mixture")
    routed.transformer.route = lambda *_: torch.eye(2)
    options: dict[str, Any] = {"output_type": "latent", "return_dict": False}
    together = routed(PROMPTS, image=[PICTURE, OTHER], latents=made.noise.clone(), **options)[0]
    for row, picture in enumerate((PICTURE, OTHER)):
        alone = routed([PROMPTS[row]], image=picture, latents=made.noise[row : row + 1].clone(), expert=row, **options)[0]
        assert apart(together[row], alone[0]) < 1e-5


@pytest.mark.parametrize("made", ["wan21-i2v"], indirect=True)
def test_generate_command_needs_the_picture(made: Made, tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "first.png")
    options = ("--mixture", made.folder / "mixture", "--device", "cpu", "--out", tmp_path / "clip.gif")
    run = lutetia("generate", PROMPTS[0], "--image", tmp_path / "first.png", *options)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "clip.gif").stat().st_size > 100
    with pytest.raises(UsageError, match="begin with a picture; name one by --image"):
        next(MixtureLoader(made.folder / "mixture").generate(PROMPTS))


@pytest.mark.parametrize("made", ["wan21-i2v", "cogvideox-i2v"], indirect=True)
def test_stock_pipeline_that_gives_other_frames_is_refused(made: Made) -> None:
    channels = made.manifest.latent.channels
    transformer, x = made.mixture.transformer, torch.randn(1, *made.manifest.latent.shape)
    shown = Pictures(torch.randn(1, channels, 3, *x.shape[3:]), None, 4 if made.name.startswith("wan") else 0)
    stacked = torch.cat([x, shown.channels(x)], dim=1)
    stacked[:, channels : channels + 1] = 1
    given = stacked if made.name.startswith("wan") else stacked.transpose(1, 2)
    tokens = torch.zeros(1, 512 if made.name.startswith("wan") else 12, 32)
    with pytest.raises(UsageError, match="takes the first frame of a clip as a picture, and no other frames"):
        transformer(given, torch.tensor([500.0]), tokens)


@pytest.mark.parametrize("made", ["wan21-i2v"], indirect=True)
def test_model_card_says_that_a_picture_is_needed(made: Made) -> None:
    card = (made.folder / "mixture" / "README.md").read_text()
    assert "pipeline_tag: image-to-video" in card
    assert "experts for image-to-video" in card
    assert "from PIL import Image\n\nfrom lutetia" in card
    assert 'pipe(["a prompt"], image=Image.open("first.png"), seed=0)' in card


@pytest.mark.parametrize("made", ["wan21-i2v"], indirect=True)
def test_run_whose_prompts_lack_pictures_is_refused(made: Made) -> None:
    sampling = made.manifest.sampling.model_copy(update={"prompts": ("a ball",)})
    with pytest.raises(ValueError, match="begin with a picture, which sampling.prompts lack; leave the prompts out"):
        Manifest.model_validate(made.manifest.model_dump() | {"sampling": sampling.model_dump()})
    needs = [word for word in made.manifest.needs if word != PICTURES]
    with pytest.raises(ValueError, match="data with pictures need the capability pictures; add it to needs"):
        Manifest.model_validate(made.manifest.model_dump() | {"needs": needs})
