"""Latents by reference: pixels, and diffusers autoencoders with random weights, saved in their own format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub.constants
import numpy as np
import pytest
import torch

from lutetia.models.data.encode.latents import Latents, demo_autoencoder, load_latents
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.system.errors import ConfigError

TINY: dict[str, Any] = {
    "encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8), "latent_channels": 5,
    "num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1),
}  # fmt: skip
KL: dict[str, Any] = {
    "block_out_channels": (8, 8), "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
WAN: dict[str, Any] = {
    "base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True, True],
    "latents_mean": [0.5] * 4, "latents_std": [2.0] * 4,
}  # fmt: skip
HUNYUAN: dict[str, Any] = {
    "latent_channels": 4, "block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_num_groups": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per autoencoder class."""
    folder = tmp_path_factory.mktemp("autoencoders")
    for name, config in (
        ("AutoencoderTiny", TINY), ("AutoencoderKL", KL), ("AutoencoderKLWan", WAN), ("AutoencoderKLHunyuanVideo", HUNYUAN)
    ):  # fmt: skip
        save(folder / name, name, config, seed=0)
    return folder


def save(folder: Path, name: str, config: dict[str, Any], seed: int) -> None:
    """Save a diffusers autoencoder with random weights, in the format of the hub."""
    torch.manual_seed(seed)
    getattr(diffusers, name)(**config).save_pretrained(folder)


def frames(count: int = 2, length: int = 5, height: int = 16, width: int = 24) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, length, height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("AutoencoderTiny", (5, 5, 4, 6)),
        ("AutoencoderKL", (4, 5, 8, 12)),
        ("AutoencoderKLWan", (4, 2, 2, 3)),
        ("AutoencoderKLHunyuanVideo", (4, 2, 2, 3)),
    ],
)
def test_autoencoder_from_folder_encodes_and_decodes(saved: Path, name: str, shape: tuple[int, ...]) -> None:
    latents = load_latents(str(saved / name))
    assert latents.shape_of(5, 16, 24) == shape
    encoded = latents.encode(frames())
    assert (tuple(encoded.shape), encoded.dtype) == ((2, *shape), torch.float32)
    decoded = latents.decode(encoded)
    assert (decoded.shape, decoded.dtype) == ((2, 5, 16, 24, 3), np.uint8)
    assert type(latents.module).__name__ == name


def test_latents_do_not_depend_on_other_clips(saved: Path) -> None:
    for name in ("AutoencoderTiny", "AutoencoderKLWan"):
        latents = load_latents(str(saved / name))
        torch.testing.assert_close(latents.encode(frames())[1:], latents.encode(frames()[1:]), atol=1e-5, rtol=1e-5)


def test_pixels_round_trip_exactly() -> None:
    latents = load_latents("pixels")
    encoded = latents.encode(frames())
    assert tuple(encoded.shape) == (2, 3, 5, 16, 24)
    assert (latents.decode(encoded) == frames()).all()
    assert latents.module is None


def spec(**changes: object) -> LatentSpec:
    return LatentSpec.model_validate(
        {
            "channels": 3, "frames": 5, "height": 16, "width": 24,
            "vae": "pixels", "pixel_frames": 5, "pixel_height": 16, "pixel_width": 24,
            "text_encoder": "builtin:words", "text_tokens": 4, "text_width": 64, "pooled_width": 64, **changes,
        }
    )  # fmt: skip


def test_statistics_normalise_and_decoding_undoes_it() -> None:
    raw = load_latents("pixels").encode(frames())
    mean, std = raw.mean((0, 2, 3, 4)), raw.std((0, 2, 3, 4))
    latents = load_latents("pixels", spec(mean=tuple(mean.tolist()), std=tuple(std.tolist())))
    encoded = latents.encode(frames())
    torch.testing.assert_close(encoded.std((0, 2, 3, 4)), torch.ones(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(encoded.mean((0, 2, 3, 4)), torch.zeros(3), atol=1e-3, rtol=0)
    assert (latents.decode(encoded) == frames()).all()


def test_shipped_statistics_come_from_the_config(saved: Path) -> None:
    assert load_latents(str(saved / "AutoencoderKLWan")).shipped_statistics == ((0.5,) * 4, (2.0,) * 4)
    assert load_latents(str(saved / "AutoencoderTiny")).shipped_statistics is None


def test_fingerprint_changes_with_the_weights(saved: Path, tmp_path: Path) -> None:
    save(tmp_path / "other", "AutoencoderTiny", TINY, seed=1)
    first, again, other = (
        load_latents(str(path)) for path in (saved / "AutoencoderTiny", saved / "AutoencoderTiny", tmp_path / "other")
    )
    assert first.fingerprint == again.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("AutoencoderTiny", (5, 18, 24), "multiples of 4, not 18×24"),
        ("AutoencoderKLWan", (5, 16, 20), "multiples of 8, not 16×20"),
        ("AutoencoderKLWan", (8, 16, 24), "4n\\+1 frames, not 8; use 9 frames"),
        ("AutoencoderKLHunyuanVideo", (7, 16, 24), "4n\\+1 frames, not 7"),
    ],
)
def test_sizes_that_do_not_fit_an_autoencoder_are_refused(saved: Path, name: str, size: tuple[int, int, int], words: str) -> None:
    latents: Latents = load_latents(str(saved / name))
    with pytest.raises(ConfigError, match=words):
        latents.encode(frames(1, *size))


def test_unusable_latents_are_refused_by_name(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/config.json").write_bytes((saved / "AutoencoderTiny/config.json").read_bytes())
    for ref, words in (
        ("builtin:wan", "there are no latents 'builtin:wan'"),
        (str(tmp_path / "gone"), "neither a folder nor a hub id"),
        (str(tmp_path / "empty"), "cannot load latents .*config.json.*; check the folder"),
        (str(tmp_path / "foreign"), "of class UNet2DModel, which is not supported"),
        ("nobody/nothing", "cannot load latents 'nobody/nothing': .*; check the id and the connection to the hub"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_latents(ref)
    with pytest.raises(ConfigError, match="cannot load latents"):
        load_latents(str(tmp_path / "bare")).encode(frames())


@pytest.mark.skipif(not demo_autoencoder().is_dir(), reason="weights/demo_autoencoder is not there")
def test_shipped_autoencoder_reconstructs_the_pictures() -> None:
    from tests.models.data.clip_files import look

    latents = load_latents("builtin:demo")
    clip = np.stack([look("ball", 1, size=64)])
    decoded = latents.decode(latents.encode(clip)).astype(float)
    assert np.sqrt(((decoded - clip) ** 2).mean()) < 25  # 20 dB on a clip unlike those it was trained on
