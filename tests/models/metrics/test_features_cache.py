"""The cache of features: nothing is computed twice, and a damaged file is no answer."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lutetia.models.metrics.features import FeatureCache, clip_digest, set_digest
from lutetia.models.metrics.fvd import reference_statistics
from tests.models.metrics.square_clips import square_clips


class Counting:
    """An extractor that remembers how many clips it was given."""

    def __init__(self, tag: str = "means") -> None:
        self.tag, self.seen = tag, 0

    def __call__(self, clips: Tensor) -> dict[str, Tensor]:
        self.seen += len(clips)
        return {"logits": clips.float().mean(dim=(1, 2)).flatten(1)[:, :12]}


def test_a_subset_in_another_order_is_already_there(tmp_path: Path) -> None:
    clips, extractor = square_clips(10).frames, Counting()
    steps: list[tuple[int, int]] = []
    first = FeatureCache(tmp_path).extract(extractor, clips, lambda done, total: steps.append((done, total)), chunk=4)
    assert extractor.seen == 10
    assert steps == [(4, 10), (8, 10), (10, 10)]
    again = FeatureCache(tmp_path).extract(extractor, clips[[7, 2]])
    assert extractor.seen == 10
    assert torch.equal(again["logits"], first["logits"][[7, 2]])


def test_other_weights_are_not_mistaken(tmp_path: Path) -> None:
    clips, cache, other = square_clips(3).frames, FeatureCache(tmp_path), Counting("other weights")
    cache.extract(Counting(), clips)
    cache.extract(other, clips)
    assert other.seen == 3


def test_a_file_cut_short_is_computed_again(tmp_path: Path) -> None:
    clips, cache, extractor = square_clips(3).frames, FeatureCache(tmp_path), Counting()
    whole = cache.extract(extractor, clips)
    path = cache.path(extractor.tag, clip_digest(clips[1]))
    assert path is not None
    path.write_bytes(path.read_bytes()[:20])
    assert torch.equal(cache.extract(extractor, clips)["logits"], whole["logits"])
    assert extractor.seen == 4


def test_shape_and_order_count() -> None:
    flat = torch.arange(48, dtype=torch.uint8)
    assert clip_digest(flat.view(2, 2, 4, 3)) != clip_digest(flat.view(4, 2, 2, 3))
    clips = torch.stack([flat.view(2, 2, 4, 3), flat.flip(0).view(2, 2, 4, 3)])
    assert set_digest(clips) != set_digest(clips.flip(0))


def test_statistics_of_a_reference_are_kept(tmp_path: Path) -> None:
    clips, cache, extractor = square_clips(8).frames, FeatureCache(tmp_path), Counting()
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
