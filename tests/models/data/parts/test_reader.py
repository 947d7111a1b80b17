"""Shards in parts: the same clips as in memory, each caption once, and nothing that contradicts the index is read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lutetia.models.data.parts.index import METADATA, ShardIndex, part_path, read_index, write_index
from lutetia.models.data.parts.reader import PartedShard, load_shard, open_shard
from lutetia.models.data.parts.writer import part_bytes, write_shard
from lutetia.models.data.shards import ClipReader, ShardData
from lutetia.models.training.batches import Batches
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.system.errors import DataError, IntegrityError
from tests.models.data.old_format import write_old_shard
from tests.models.tiny_experts import LATENT as TINY_LATENT
from tests.models.tiny_experts import tiny_data, tiny_manifest

LATENT = LatentSpec(
    channels=4, frames=3, height=2, width=2, vae="builtin:demo", pixel_frames=3, pixel_height=16, pixel_width=16,
    text_encoder="builtin:words", text_tokens=5, text_width=6, pooled_width=7, mean=(0.0,) * 4, std=(1.0,) * 4,
)  # fmt: skip


def some_data(count: int = 6, texts: int = 6) -> ShardData:
    """Clips of `texts` captions, one to five tokens long."""
    generator = torch.Generator().manual_seed(0)

    def normal(number: int, *shape: int) -> torch.Tensor:
        return torch.randn(number, *shape, generator=generator).half().float()

    tokens, pooled, of_clips = normal(texts, 5, 6), normal(texts, 7), [clip % texts for clip in range(count)]
    for text in range(texts):
        tokens[text, 1 + text % 5 :] = 0
    captions = [f"caption {text}" for text in of_clips]
    return ShardData(normal(count, 4, 3, 2, 2), tokens[of_clips], pooled[of_clips], captions, ["digit"] * count)


def written(folder: Path, data: ShardData | None = None, size: int = 400) -> Path:
    path = folder / "000.train.safetensors"
    write_shard(path, data or some_data(), LATENT, name="digits", size=size)
    return path


def test_shard_round_trips(tmp_path: Path) -> None:
    data = some_data(20, texts=7)
    path = written(tmp_path, data)
    back = load_shard(path, LATENT, batch=6)
    for name in ("latents", "tokens", "pooled"):
        assert getattr(back, name).dtype == torch.float32
        assert torch.equal(getattr(back, name), getattr(data, name))
    assert (back.captions, back.kinds) == (data.captions, data.kinds)
    assert len(read_index(path).parts) > 3


def test_rows_are_read_in_any_order_from_their_parts_alone(tmp_path: Path) -> None:
    data = some_data(20, texts=7)
    path = written(tmp_path, data)
    shard, rows = open_shard(path, LATENT), [19, 3, 3, 0]
    assert isinstance(shard, PartedShard)
    needed = set(shard.index.parts_of(np.array(rows)).flatten().tolist())
    for number, part in enumerate(shard.index.parts):
        if number not in needed:
            part_path(path, number, part.blob).unlink()
    taken = shard.take(rows)
    assert all(torch.equal(getattr(taken, name), getattr(data, name)[rows]) for name in ("latents", "tokens", "pooled"))
    assert shard.take(rows, with_tokens=False).tokens.shape == (4, 0, 6)
    absent = next(number for number in range(len(shard.index.parts)) if number not in needed)
    with pytest.raises(DataError, match=rf"part .*{absent:04d}.safetensors does not exist"):
        shard.take([int(shard.index.clip_starts[absent])])


def test_a_caption_takes_its_true_length_once(tmp_path: Path) -> None:
    """At 512 padded tokens, the text of these clips would be several times as large as their latents."""
    latent = LATENT.model_copy(update={"text_tokens": 512, "text_width": 64, "frames": 64, "height": 8, "width": 8})
    lengths, draw = [3, 20, 60], torch.Generator().manual_seed(0)
    tokens = torch.zeros(3, 512, 64)
    for text, length in enumerate(lengths):
        tokens[text, :length] = torch.randn(length, 64, generator=draw)
    of_clips = [clip % 3 for clip in range(24)]
    data = ShardData(
        torch.randn(24, *latent.shape, generator=draw), tokens[of_clips], torch.randn(3, 7, generator=draw)[of_clips],
        [f"caption {text}" for text in of_clips], [""] * 24,
    )  # fmt: skip
    found = write_shard(tmp_path / "s.safetensors", data, latent)
    real = 2 * (data.latents.numel() + sum(lengths) * 64 + 3 * 7)
    assert real < found.bytes <= 1.1 * real
    assert found.bytes == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())


def test_parts_are_about_a_thousand_and_bounded() -> None:
    assert [part_bytes(total) >> 20 for total in (1, 1 << 30, 4 << 30, 64 << 30)] == [4, 4, 4, 64]
    assert part_bytes(1 << 40) < 256_000_000


def test_equal_data_give_equal_bytes(tmp_path: Path) -> None:
    found = []
    for name in "ab":
        written(tmp_path / name)
        found.append({path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.safetensors")})
    assert found[0] == found[1]


def test_batches_are_those_of_release_0_1(tmp_path: Path) -> None:
    """Equal run, equal clips: the order, the numbers and the losses do not depend on how the shard is stored."""
    manifest, data = tiny_manifest(1), tiny_data(10)
    write_old_shard(tmp_path / "old", data, TINY_LATENT)
    write_shard(tmp_path / "new.safetensors", data, TINY_LATENT, size=3000)
    readers: list[ClipReader] = [open_shard(tmp_path / name, TINY_LATENT) for name in ("old", "new.safetensors")]
    readers.append(load_shard(tmp_path / "old", TINY_LATENT))
    for epoch, step in ((0, 0), (1, 3), (7, 5)):
        batches = [Batches(manifest, 0, reader).at(epoch, step) for reader in readers]
        for other in batches[1:]:
            for name in ("latents", "noise", "time", "tokens", "pooled"):
                assert torch.equal(getattr(batches[0], name), getattr(other, name))
    losses = [[trainer.step() for _ in range(3)] for trainer in (ExpertTrainer(manifest, 0, reader) for reader in readers)]
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"frames": 4}, "frames 3, but the run has 4"),
        ({"pixel_width": 32}, "pixel_width 16, but the run has 32"),
        ({"vae": "pixels"}, "vae builtin:demo, but the run has pixels"),
    ],
)
def test_shard_of_another_latent_is_refused(tmp_path: Path, change: dict[str, object], words: str, old: bool) -> None:
    path = tmp_path / "old" if old else written(tmp_path)
    if old:
        write_old_shard(path, some_data(), LATENT)
    with pytest.raises(IntegrityError, match=words):
        open_shard(path, LATENT.model_copy(update=change))


def test_fewer_clips_than_a_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 6 clips, fewer than a batch of 8"):
        open_shard(written(tmp_path), LATENT, batch=8)


def changed(tensors: dict[str, torch.Tensor], name: str, value: torch.Tensor | None) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in {**tensors, name: value}.items() if tensor is not None}


def test_part_that_contradicts_its_index_is_refused_by_name(tmp_path: Path) -> None:
    path = written(tmp_path, size=1 << 20)
    part = part_path(path, 0, read_index(path).parts[0].blob)
    tensors = load_file(part)
    lengths = tensors["lengths"]
    for name, value, words in (
        (
            "latents",
            tensors["latents"][:, :, :2].contiguous(),
            r"latents are F16 \[6, 4, 2, 2, 2\] instead",
        ),
        ("latents", tensors["latents"].float(), "latents are F32"),
        ("pooled", tensors["pooled"][:, :3].contiguous(), r"pooled are F16 \[6, 3\]"),
        ("pooled", None, r"holds the tensors \['latents', 'lengths', 'tokens'\]"),
        ("extra", torch.zeros(1), "instead of"),
        ("lengths", lengths + 5, "more than 5 tokens"),
        ("lengths", lengths - 2, "fewer than none"),
        ("lengths", lengths.clamp(max=1), "but 16 are there"),
    ):
        save_file(changed(tensors, name, value), part)
        with pytest.raises(IntegrityError, match=rf"part 0000.safetensors does not fit its index: .*{words}"):
            load_shard(path, LATENT)
    save_file({**tensors, "tokens": tensors["tokens"] * float("nan")}, part)
    with pytest.raises(IntegrityError, match="tokens of parts 0 are not finite"):
        load_shard(path, LATENT)
    save_file(tensors, part)
    with pytest.raises(IntegrityError, match="metadata of part 0000.safetensors are malformed"):
        load_shard(path, LATENT)
    part.write_bytes(part.read_bytes()[:-5])
    with pytest.raises(IntegrityError, match=r"0000.safetensors is not a complete safetensors file"):
        load_shard(path, LATENT)


def spoilt(index: ShardIndex, **fields: Any) -> ShardIndex:
    return replace(index, document=index.document.model_copy(update=fields))


def test_index_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    index = read_index(path)
    parts = index.parts
    few_texts = parts[0].model_copy(update={"texts": 0})
    for bad, words in (
        (spoilt(index, parts=parts[1:]), "clips, but 6 clips have texts"),
        (spoilt(index, parts=(few_texts, *parts[1:])), "a clip has a text beyond"),
        (replace(index, texts=index.texts - 1), "a clip has a text beyond"),
        (replace(index, texts=index.texts.astype(np.int64)), "not one row"),
        (replace(index, texts=index.texts[:0]), "not one row"),
    ):
        write_index(path, bad)
        with pytest.raises(IntegrityError, match=rf"000.train.safetensors contradicts itself: .*{words}"):
            read_index(path)


def test_index_beyond_its_bounds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    index = read_index(path)
    blob = index.parts[0].blob.model_copy(update={"size": 256_000_001})
    document = index.document.model_dump(mode="json")
    document["parts"][0]["blob"] = blob.model_dump()
    save_file({"texts": torch.from_numpy(index.texts)}, path, metadata={METADATA: json.dumps(document)})
    with pytest.raises(IntegrityError, match="more than 256000000"):
        read_index(path)
    document["parts"] *= 5000
    save_file({"texts": torch.from_numpy(index.texts)}, path, metadata={METADATA: json.dumps(document)})
    with pytest.raises(IntegrityError, match="parts"):
        read_index(path)
    monkeypatch.setattr("lutetia.models.data.parts.index.MAX_INDEX_BYTES", 100)
    with pytest.raises(IntegrityError, match="more than 100; refused"):
        read_index(path)


def test_file_that_is_not_a_shard_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-5])
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    for read in (lambda name: open_shard(tmp_path / name, LATENT), lambda name: read_index(tmp_path / name)):
        with pytest.raises(IntegrityError, match="not a complete safetensors file"):
            read("cut")
        with pytest.raises(IntegrityError, match="safetensors file but not a shard"):
            read("foreign")
        with pytest.raises(DataError, match="does not exist"):
            read("absent")


def test_data_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    data = some_data()
    for bad, words in (
        (replace(data, captions=[], kinds=[]), "no clips"),
        (replace(data, kinds=["digit"]), "6 captions but 1 kinds"),
        (replace(data, latents=data.latents[:, :, :2]), "wrong frame count: its latents have 2 frames instead of 3"),
        (replace(data, pooled=data.pooled[:, :3]), r"wrong shape: pooled are \[6, 3\] instead of \[6, 7\]"),
        (replace(data, latents=data.latents * 1e6), "not finite in half precision"),
    ):
        with pytest.raises(DataError, match=words):
            write_shard(tmp_path / "s", bad, LATENT)
    assert list(tmp_path.iterdir()) == []
