"""The entries of a report, by the real extractors with small networks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.metrics_validation.degradations import frozen, noisy, shuffled_captions
from lutetia.models.metrics.clips import ClipSet
from lutetia.models.metrics.comparison import compare, compare_kinds, comparison_table
from lutetia.models.metrics.evaluator import Evaluator
from lutetia.models.metrics.settings import EvaluatorSettings
from lutetia.models.metrics.stats.retrieval import PROBE_NAME
from lutetia.system.errors import DataError
from tests.models.metrics.square_clips import square_clips
from tests.models.small_networks import write_assets

WORDS = ["a", "square", "moving", "red", "green", "blue", "white", "left", "right", "up", "down"]


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_assets(tmp_path_factory.mktemp("networks") / "assets", WORDS)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def evaluator(assets: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Evaluator:
    monkeypatch.setenv("LUTETIA_ASSETS", str(assets))
    settings = EvaluatorSettings(metrics=("fvd", "retrieval", "classifier"), resamples=12, cache=cache)
    return Evaluator(square_clips(60, seed=1), square_clips(30, seed=2), square_clips(30, seed=3), settings)


def test_faults_score_worse_than_real_clips(evaluator: Evaluator) -> None:
    assert evaluator.left_out == {}
    clips = square_clips(30, seed=4)
    good = {entry.name: entry for entry in evaluator.evaluate(clips, seeds=(4, 5))}
    assert len(good) == 4 + 3 + 3
    assert all(entry.figure.seeds == (4, 5) for entry in good.values())
    retrieval = good[f"{PROBE_NAME}, R@1"]
    assert "stand-in, not CLIP" in retrieval.note
    assert retrieval.real is not None
    assert retrieval.figure.value == pytest.approx(retrieval.real.value, abs=0.25)
    assert retrieval.figure.low > 0.4  # among 16 prompts
    assert good["FVD, debiased"].figure.low < 0
    noise = {entry.name: entry for entry in evaluator.evaluate(noisy(clips, 40, 0))}
    assert noise["FVD"].figure.low > good["FVD"].figure.high
    assert noise["FVD, kernel distance"].figure.low > good["FVD, kernel distance"].figure.high
    still = {entry.name: entry for entry in evaluator.evaluate(frozen(clips))}
    swapped = {entry.name: entry for entry in evaluator.evaluate(shuffled_captions(clips, 0))}
    for worse in (still, swapped):
        assert worse[f"{PROBE_NAME}, R@1"].figure.high < retrieval.figure.low
    assert swapped["FVD"].figure.value == good["FVD"].figure.value


def test_floor_without_spare_clips_has_half_the_n(evaluator: Evaluator) -> None:
    settings = EvaluatorSettings(metrics=("fvd",), resamples=12, cache=evaluator.settings.cache)
    alone = Evaluator(square_clips(60, seed=1), square_clips(30, seed=2), None, settings)
    entry = alone.evaluate(square_clips(30, seed=4))[0]
    assert entry.real is not None
    assert (entry.figure.n, entry.real.n) == (30, 15)
    paired = evaluator.evaluate(square_clips(30, seed=4))[0]
    assert paired.real is not None
    assert paired.real.n == 30


def test_short_clips_leave_fvd_out_with_a_reason(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTETIA_ASSETS", str(assets))
    short = square_clips(24, frames=8)
    other = Evaluator(short, short, None, EvaluatorSettings(metrics=("fvd",)))
    assert other.left_out["fvd"].startswith("a clip of 8 frames is too short for I3D, which needs 10")
    assert other.evaluate(short) == []


def test_compare_pairs_both_sides_by_prompt(evaluator: Evaluator) -> None:
    prompts = square_clips(30, seed=4)
    worse = [noisy(prompts, 40, seed) for seed in (0, 1)]
    better = [noisy(prompts, 15, seed) for seed in (0, 1)]
    rows = {row.name: row for row in compare(evaluator, worse, better, seeds=(0, 1), resamples=20)}
    assert rows["FVD"].ratio is not None
    assert rows["FVD"].ratio.value > 1.2
    assert rows["FVD"].ratio.method == "nested"
    assert rows["FVD"].second_is == rows["FVD, debiased"].second_is == "better"
    assert rows["FVD, debiased"].ratio is None
    same = compare(evaluator, better[:1], better[:1], seeds=(0,), resamples=12)
    assert {row.second_is for row in same} == {"not told apart"}
    still = {row.name: row for row in compare(evaluator, better[:1], [frozen(prompts)], seeds=(0,), resamples=40)}
    assert still[f"{PROBE_NAME}, R@1"].second_is == "worse"
    assert "| FVD ↓ |" in comparison_table(tuple(rows.values()), "monolith", "mixture")
    with pytest.raises(DataError, match=r"not made from the same prompts"):
        compare(evaluator, worse[:1], [square_clips(30, seed=5)], seeds=(0,))
    with pytest.raises(DataError, match=r"2 and 1 sets of clips for 2 seeds"):
        compare(evaluator, worse, better[:1], seeds=(0, 1))


def test_compare_one_more_hit_is_not_told_apart(evaluator: Evaluator) -> None:
    evaluator.views.clear()
    evaluator.values = {"hits": lambda clips: np.eye(1, len(clips))[0] * float(clips.frames.float().std() > 60)}
    prompts = square_clips(30, seed=4)
    (row,) = compare(evaluator, [noisy(prompts, 80, 0)], [prompts], seeds=(0,), resamples=12)
    assert (row.first.value, row.second.value) == (1 / 30, 0)
    assert row.difference.low < 0 < row.difference.value
    assert row.second_is == "not told apart"


def test_compare_kinds_finds_the_kind_with_the_gain(evaluator: Evaluator) -> None:
    assert (
        compare_kinds(evaluator, [evaluator.reference], [evaluator.reference], seeds=(0,), resamples=12) == {}
    )  # there is only one kind
    clips = square_clips(50, seed=2)
    kinds = ("left",) * 24 + ("right",) * 24 + ("rare",) * 2
    reference = ClipSet(clips.frames, clips.captions, kinds)
    other = Evaluator(
        square_clips(60, seed=1), reference, None, EvaluatorSettings(metrics=("fvd",), cache=evaluator.settings.cache)
    )
    prompts = square_clips(50, seed=4)
    mended = noisy(prompts, 40, 0).frames.clone()
    mended[:24] = prompts.frames[:24]
    by_kind = compare_kinds(other, [noisy(prompts, 40, 0)], [prompts.with_frames(mended)], seeds=(0,), resamples=20)
    assert {kind: [row.name for row in rows] for kind, rows in by_kind.items()} == dict.fromkeys(
        ("left", "right"), ["FVD", "FVD, debiased"]
    )
    assert [by_kind[kind][0].second_is for kind in ("left", "right")] == ["better", "not told apart"]
    assert by_kind["left"][0].first.n == 24
