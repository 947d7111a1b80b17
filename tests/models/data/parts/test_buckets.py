"""Clips of several shapes in one shard: each batch has one shape, and the order needs no memory of what was before."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from lutetia.models.data.parts.batch_order import BatchOrder, batches_of_a_cycle
from lutetia.models.data.parts.order import next_uses, parts_used
from lutetia.models.data.parts.reader import PartedShard, load_shard, open_shard
from lutetia.models.data.parts.writer import ShardWriter, text_of
from lutetia.models.mixing.router import build_router, resized
from lutetia.models.mixing.router_training import train_router
from lutetia.models.pipeline import load_pipeline
from lutetia.models.pipeline_inputs import find_size
from lutetia.models.randomness import clip_order
from lutetia.models.training.batches import Batches
from lutetia.models.training.checkpoint_io import write_state
from lutetia.models.training.holdout_loss import RowLimits, holdout_loss
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.protocol.schema.model.latent_spec import LatentShape
from lutetia.system.errors import ConfigError, DataError, UsageError
from tests.models.mixing.tiny_mixture import pixel_mixture
from tests.models.tiny_experts import LATENT, tiny_manifest

WIDE = LatentShape(frames=2, height=4, width=16, pixel_frames=2, pixel_height=4, pixel_width=16)
IMAGE = LatentShape(frames=1, height=8, width=8, pixel_frames=1, pixel_height=8, pixel_width=8)
MIXED = LATENT.model_copy(update={"buckets": (WIDE, IMAGE)})
MANIFEST = tiny_manifest(2, latent=MIXED, router={"hidden": 32, "layers": 1, "samples": 80, "batch": 16})
SIZES = (10, 6, 4)


def write_mixed(path: Path, sizes: tuple[int, ...] = SIZES, offset: float = 0.0) -> PartedShard:
    draw = torch.Generator().manual_seed(len(path.name))
    writer = ShardWriter(path, MIXED, "mixed", "train", 3000)
    for bucket, size in enumerate(sizes):
        for clip in range(size):
            latents = torch.randn(MIXED.in_bucket(bucket).shape, generator=draw) * 0.5 + offset
            text = text_of(f"clip {clip}", torch.randn(5, 16, generator=draw), torch.randn(8, generator=draw) + offset)
            writer.add(latents, text, bucket=bucket)
    writer.finish()
    shard = open_shard(path, MIXED)
    assert isinstance(shard, PartedShard)
    return shard


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> PartedShard:
    return write_mixed(tmp_path_factory.mktemp("mixed") / "s.safetensors")


# --- the order ---------------------------------------------------------------------------------------------------------------


def test_one_bucket_has_the_order_of_release_0_1() -> None:
    order = BatchOrder("run", 3, (23,), 4)
    for number in (0, 5, 6, 100):
        assert order.clips(number).tolist() == clip_order("run", 3, 23, 4 * number, 4).tolist()
    assert order.following(np.arange(5, 8)).tolist() == clip_order("run", 3, 23, 20, 12).tolist()


def test_each_batch_has_one_bucket_and_each_bucket_its_share() -> None:
    sizes, order = (50, 30, 0, 20), BatchOrder("run", 0, (50, 30, 0, 20), 5)
    seen, buckets = Counter[int](), Counter[int]()
    for number in range(200):
        clips = order.clips(number)
        (bucket,) = {int(each) for each in np.searchsorted(np.cumsum(sizes), clips, side="right")}
        buckets[bucket] += 1
        seen.update(clips.tolist())
    assert buckets == {0: 100, 1: 60, 3: 40}
    assert set(seen.values()) == {10}, "every clip as often as every other"
    assert order.following(np.arange(7, 27)).tolist() == [
        clip for number in range(7, 27) for clip in order.clips(number).tolist()
    ]


@pytest.mark.parametrize("sizes", [(1000, 2), (3, 3, 3), (7, 500, 1), (100_000, 1)])
def test_a_cycle_has_every_bucket_by_its_share(sizes: tuple[int, ...]) -> None:
    counts = batches_of_a_cycle(sizes, 16)
    assert min(counts) >= 1
    assert sum(counts) <= 4096 + len(sizes)
    for size, count in zip(sizes, counts, strict=True):
        assert count / sum(counts) == pytest.approx(size / sum(sizes), abs=1 / sum(counts))


# --- reading -----------------------------------------------------------------------------------------------------------------


def test_batches_have_the_shape_of_their_bucket(shard: PartedShard) -> None:
    assert shard.sizes == SIZES
    batches = Batches(MANIFEST, 0, shard)
    shapes = Counter(tuple(batches.at(0, step).latents.shape[1:]) for step in range(5))
    shapes += Counter(tuple(batches.at(1, step).latents.shape[1:]) for step in range(5))
    assert set(shapes) == {latent.shape for latent in MIXED.of_buckets}
    with pytest.raises(DataError, match=r"clips of buckets \[0, 1\] cannot be read at once"):
        shard.take([9, 10])
    with pytest.raises(DataError, match="cannot be read at once"):
        load_shard(shard.path, MIXED)


def test_parts_of_every_bucket_have_a_next_use(shard: PartedShard) -> None:
    for first in (0, 20, 48):
        uses = next_uses(MANIFEST, 0, shard.index, first)
        assert (uses < 2 * (len(shard) + 4)).all()
        for number in parts_used(MANIFEST, 0, shard.index, first, 4):
            assert uses[number] < 4


def test_clips_of_a_bucket_come_before_the_next(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "s.safetensors", MIXED, "mixed", "train", 3000)
    text = text_of("a", torch.ones(5, 16), torch.ones(8))
    writer.add(torch.zeros(4, 1, 8, 8), text, bucket=2)
    with pytest.raises(DataError, match="a clip of bucket 0 comes after clips of bucket 2"):
        writer.add(torch.zeros(4, 4, 8, 8), text)
    with pytest.raises(DataError, match=r"latents are \[4, 4, 8, 8\] instead of \[4, 1, 8, 8\]"):
        writer.add(torch.zeros(4, 4, 8, 8), text, bucket=2)


# --- training, checks, router, sampling --------------------------------------------------------------------------------------


def test_training_on_buckets_resumes_with_equal_losses(shard: PartedShard, tmp_path: Path) -> None:
    trainer = ExpertTrainer(MANIFEST, 0, shard)
    for _ in range(3):
        trainer.step()
    write_state(trainer.snapshot(), tmp_path / "local")
    resumed = ExpertTrainer(MANIFEST, 0, shard)
    resumed.restore(0, local=tmp_path / "local")
    assert [resumed.step() for _ in range(3)] == [trainer.step() for _ in range(3)]


def test_expert_that_does_not_fit_a_bucket_is_refused(shard: PartedShard) -> None:
    odd = MIXED.model_copy(update={"buckets": (WIDE.model_copy(update={"height": 6}), IMAGE)})
    with pytest.raises(ConfigError, match="6"):
        ExpertTrainer(MANIFEST.model_copy(update={"latent": odd}), 0, shard)


def test_held_out_loss_covers_all_buckets_in_any_order_of_rows(shard: PartedShard) -> None:
    whole = holdout_loss(MANIFEST, 0, None, shard, noises=2)
    assert len(whole.rows) == 2 * len(shard)
    few = holdout_loss(MANIFEST, 0, None, shard, noises=2, limits=RowLimits(seconds=3600, count=9, drawn=True))
    assert few.drawn
    assert len(few.rows) == 9
    assert all(min(abs(row - other) for other in whole.rows) < 1e-5 for row in few.rows), "the same rows, whatever their batch"


def test_router_learns_from_and_answers_for_every_bucket(tmp_path: Path) -> None:
    shards = [write_mixed(tmp_path / f"{number}.safetensors", offset=float(number)) for number in range(2)]
    router, report = train_router(MANIFEST, shards, seed=0, steps=12)
    assert 0 <= report.accuracy <= 1
    for latent in MIXED.of_buckets:
        assert router(torch.zeros(3, *latent.shape), torch.rand(3), torch.zeros(3, 8)).shape == (3, 2)


def test_resized_noise_keeps_its_variance() -> None:
    noise = torch.randn(64, *MIXED.in_bucket(1).shape, generator=torch.Generator().manual_seed(0))
    size = build_router(MANIFEST).latent_size
    assert resized(noise, size).std().item() == pytest.approx(1, abs=0.02)
    assert resized(noise, size).shape[2:] == LATENT.shape[1:]


def test_size_of_a_bucket_is_found_from_what_is_given() -> None:
    assert find_size(MIXED, None, None, None).shape == LATENT.shape
    assert find_size(MIXED, 1, None, None).shape == (4, 1, 8, 8)
    assert find_size(MIXED, None, 4, 16).shape == (4, 2, 4, 16)
    with pytest.raises(UsageError, match=r"num_frames=3, height=None, width=None; ask for one of 4, 8, 8; 2, 4, 16; 1, 8, 8"):
        find_size(MIXED, 3, None, None)


def test_pipeline_samples_clips_of_any_bucket(tmp_path: Path) -> None:
    pipeline = load_pipeline(pixel_mixture(tmp_path, (WIDE, IMAGE)))
    for frames, height, width in ((4, 8, 8), (2, 4, 16), (1, 8, 8)):
        clips, _ = pipeline(["a cat"], num_frames=frames, height=height, width=width, seed=0, return_dict=False)
        assert clips.shape == (1, frames, height, width, 3)
