"""Shard files: equal data give equal bytes; anything that does not match is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lutetia.models.data.shards import ShardData, ShardMetadata, load_shard, read_shard_metadata, write_shard
from lutetia.protocol.schema.manifest import LatentSpec
from lutetia.system.errors import DataError, IntegrityError

LATENT = LatentSpec(
    channels=4, frames=3, height=2, width=2, vae="builtin:demo", pixel_frames=3, pixel_height=16, pixel_width=16,
    text_encoder="builtin:words", text_tokens=5, text_width=6, pooled_width=7, mean=(0.0,) * 4, std=(1.0,) * 4,
)  # fmt: skip


def some_data(count: int = 6) -> ShardData:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(count, *shape, generator=generator)

    return ShardData(normal(4, 3, 2, 2), normal(5, 6), normal(7), [f"clip {i}" for i in range(count)], ["digit"] * count)


def test_shard_round_trips_in_half_precision(tmp_path: Path) -> None:
    data = some_data()
    write_shard(tmp_path / "000.train.safetensors", data, ShardMetadata(latent=LATENT, name="digits"))
    back = load_shard(tmp_path / "000.train.safetensors", LATENT, batch=6)
    assert back.latents.dtype == torch.float32
    torch.testing.assert_close(back.latents, data.latents, atol=2e-3, rtol=1e-3)
    assert (back.captions, back.kinds) == (data.captions, data.kinds)
    assert read_shard_metadata(tmp_path / "000.train.safetensors").name == "digits"


def test_equal_data_give_equal_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write_shard(tmp_path / name, some_data(), ShardMetadata(latent=LATENT))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"frames": 4}, "frames 3, but the run has 4"),
        ({"pixel_width": 32}, "pixel_width 16, but the run has 32"),
        ({"vae": "pixels"}, "vae builtin:demo, but the run has pixels"),
    ],
)
def test_shard_of_another_latent_is_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    write_shard(tmp_path / "s", some_data(), ShardMetadata(latent=LATENT))
    with pytest.raises(IntegrityError, match=words):
        load_shard(tmp_path / "s", LATENT.model_copy(update=change))


def test_tensors_that_contradict_the_metadata_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "s", some_data(), ShardMetadata(latent=LATENT))
    text = {"lutetia": read_shard_metadata(tmp_path / "s").model_copy().model_dump_json()}
    data = some_data()
    halves = {"latents": data.latents.half(), "tokens": data.tokens.half(), "pooled": data.pooled.half()}
    for change, words in (
        ({"latents": halves["latents"][:, :, :2].contiguous()}, "wrong frame count: its latents have 2 frames instead of 3"),
        ({"pooled": halves["pooled"][:, :3].contiguous()}, r"wrong shape: pooled are \[6, 3\] instead of \[6, 7\]"),
        ({"tokens": halves["tokens"] * float("nan")}, "tokens hold numbers that are not finite"),
        ({"extra": halves["tokens"].clone()}, "instead of latents, pooled, tokens"),
    ):
        save_file(halves | change, tmp_path / "bad", metadata=text)
        with pytest.raises(IntegrityError, match=words):
            load_shard(tmp_path / "bad", LATENT)


def test_file_that_is_not_a_shard_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "s", some_data(), ShardMetadata(latent=LATENT))
    (tmp_path / "cut").write_bytes((tmp_path / "s").read_bytes()[:-5])
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(IntegrityError, match="not a complete safetensors file"):
        load_shard(tmp_path / "cut", LATENT)
    with pytest.raises(IntegrityError, match="safetensors file but not a shard"):
        load_shard(tmp_path / "foreign", LATENT)
    with pytest.raises(DataError, match="does not exist"):
        load_shard(tmp_path / "absent", LATENT)


def test_fewer_clips_than_a_batch_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "s", some_data(6), ShardMetadata(latent=LATENT))
    with pytest.raises(DataError, match="has 6 clips, fewer than a batch of 8"):
        load_shard(tmp_path / "s", LATENT, batch=8)


def test_data_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    data = some_data()
    for bad, words in (
        (replace(data, captions=[], kinds=[]), "no clips"),
        (replace(data, kinds=["digit"]), "6 captions but 1 kinds"),
        (replace(data, latents=data.latents * 1e6), "not finite in half precision"),
    ):
        with pytest.raises(DataError, match=words):
            write_shard(tmp_path / "s", bad, ShardMetadata(latent=LATENT))
    assert list(tmp_path.iterdir()) == []
