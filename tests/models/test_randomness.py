"""Data order and noise are functions of their place in the run, and every clip is used equally often."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lutetia.models.randomness import clip_order, normals, stream
from lutetia.models.training.batches import Batches
from tests.models.tiny_experts import tiny_data, tiny_manifest


def test_stream_draws_pinned_numbers() -> None:
    """Fails under a numpy that draws other numbers, which would break replays."""
    draw = stream("run", 1, 2, 3, "noise")
    assert [round(x, 6) for x in draw.standard_normal(3, dtype=np.float32).tolist()] == [-0.622001, 1.773108, 1.036408]
    assert stream("run", 1, 2, 3, "order").permutation(6).tolist() == [4, 2, 5, 3, 1, 0]


def test_streams_of_other_places_or_purposes_differ() -> None:
    places = [("run", 0, 0, 0, "noise"), ("run", 0, 0, 0, "time"), ("run", 0, 0, 1, "noise"), ("run", 0, 1, 0, "noise")]
    draws = {
        tuple(normals(stream(*place), (4,)).tolist()) for place in [*places, ("run", 1, 0, 0, "noise"), ("nur", 0, 0, 0, "noise")]
    }
    assert len(draws) == 6


@given(clips=st.integers(1, 40), first=st.integers(0, 300), count=st.integers(1, 100))
@settings(max_examples=60)
def test_clip_order_is_the_same_from_any_start(clips: int, first: int, count: int) -> None:
    whole = clip_order("run", 0, clips, 0, first + count)
    assert (clip_order("run", 0, clips, first, count) == whole[first:]).all()
    seen = np.bincount(whole, minlength=clips)
    assert seen.max() - seen.min() <= 1


def test_batches_replay_and_differ_between_steps() -> None:
    manifest, data = tiny_manifest(), tiny_data()
    a, again, b = (Batches(manifest, 0, data).at(1, step) for step in (2, 2, 3))
    assert torch.equal(a.noise, again.noise)
    assert torch.equal(a.time, again.time)
    assert torch.equal(a.tokens, again.tokens)
    assert not torch.equal(a.noise, b.noise)


def test_text_dropout_zeroes_about_its_share_of_rows() -> None:
    manifest = tiny_manifest(optimisation={"text_dropout": 0.25})
    batches = [Batches(manifest, 0, tiny_data()).at(0, step) for step in range(200)]
    dropped = torch.cat([(batch.tokens == 0).flatten(1).all(1) for batch in batches])
    assert torch.equal(dropped, torch.cat([(batch.pooled == 0).all(1) for batch in batches]))
    assert 0.19 < dropped.float().mean() < 0.31


def test_times_follow_the_shifted_logit_normal() -> None:
    manifest = tiny_manifest(optimisation={"time": {"mean": 0.5, "std": 1.0, "shift": 3.0}})
    t = torch.cat([Batches(manifest, 0, tiny_data()).at(0, step).time for step in range(500)])
    median = torch.tensor(0.5).sigmoid()
    assert abs(t.median() - 3 * median / (1 + 2 * median)) < 0.02
    assert t.min() > 0
    assert t.max() < 1
