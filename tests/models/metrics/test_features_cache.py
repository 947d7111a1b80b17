"""The cache of features: nothing is computed twice, and damaged files are computed again."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lutetia.models.metrics.features import FeatureCache, clip_digest, set_digest
from lutetia.models.metrics.fvd import reference_statistics
from tests.models.metrics.square_clips import square_clips


class CountingExtractor:
    """An extractor that counts its clips."""

    def __init__(self, tag: str = "means") -> None:
        self.tag, self.seen = tag, 0

    def __call__(self, clips: Tensor) -> dict[str, Tensor]:
        self.seen += len(clips)
        return {"logits": clips.float().mean(dim=(1, 2)).flatten(1)[:, :12]}


def test_cache_hits_for_a_subset_in_another_order(tmp_path: Path) -> None:
    clips, extractor = square_clips(10).frames, CountingExtractor()
    steps: list[tuple[int, int]] = []
    first = FeatureCache(tmp_path).extract(extractor, clips, lambda done, total: steps.append((done, total)), chunk=4)
    assert extractor.seen == 10
    assert steps == [(4, 10), (8, 10), (10, 10)]
    again = FeatureCache(tmp_path).extract(extractor, clips[[7, 2]])
    assert extractor.seen == 10
    assert torch.equal(again["logits"], first["logits"][[7, 2]])


def test_cache_misses_for_other_weights(tmp_path: Path) -> None:
    clips, cache, other = square_clips(3).frames, FeatureCache(tmp_path), CountingExtractor("other weights")
    cache.extract(CountingExtractor(), clips)
    cache.extract(other, clips)
    assert other.seen == 3


def test_truncated_file_is_computed_again(tmp_path: Path) -> None:
    clips, cache, extractor = square_clips(3).frames, FeatureCache(tmp_path), CountingExtractor()
    whole = cache.extract(extractor, clips)
    path = cache.path(extractor.tag, clip_digest(clips[1]))
    assert path is not None
    path.write_bytes(path.read_bytes()[:20])
    assert torch.equal(cache.extract(extractor, clips)["logits"], whole["logits"])
    assert extractor.seen == 4


def test_digests_depend_on_shape_and_order() -> None:
    flat = torch.arange(48, dtype=torch.uint8)
    assert clip_digest(flat.view(2, 2, 4, 3)) != clip_digest(flat.view(4, 2, 2, 3))
    clips = torch.stack([flat.view(2, 2, 4, 3), flat.flip(0).view(2, 2, 4, 3)])
    assert set_digest(clips) != set_digest(clips.flip(0))


def test_reference_statistics_are_kept(tmp_path: Path) -> None:
    clips, cache, extractor = square_clips(8).frames, FeatureCache(tmp_path), CountingExtractor()
    first = reference_statistics(cache, extractor, clips)
    for path in tmp_path.rglob("*.safetensors"):
        if "statistics" not in path.name:
            path.unlink()
    again = reference_statistics(cache, extractor, clips)
    assert extractor.seen == 8
    assert (again.mean == first.mean).all()
    assert (again.covariance == first.covariance).all()
    assert again.count == 8
    assert FeatureCache(None).extract(extractor, clips)["logits"].shape == (8, 12)
    assert extractor.seen == 16
