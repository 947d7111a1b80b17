"""The validation of the metrics: the faults that are put into clips, and the table of what each metric notices."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.metrics_validation import sensitivity
from benchmarks.metrics_validation.degradations import frozen, noisy, shuffled_captions, shuffled_frames
from benchmarks.metrics_validation.sensitivity import Measure, against, per_clip, sensitivity_table
from lutetia.models.metrics.clips import ClipSet
from lutetia.models.metrics.stats.frechet import frechet_of_rows
from tests.models.metrics.square_clips import square_clips


def test_degradations_change_only_what_they_name() -> None:
    clips = square_clips(12)
    assert torch.equal(noisy(clips, 10, 1).frames, noisy(clips, 10, 1).frames)
    difference = (noisy(clips, 10, 1).frames.float() - clips.frames.float()).std()
    assert 6 < difference < 10  # dark pixels are cut off at 0
    shuffled = shuffled_frames(clips, 0)
    assert not any(torch.equal(a, b) for a, b in zip(shuffled.frames, clips.frames, strict=True))
    assert torch.equal(shuffled.frames.float().mean(dim=1), clips.frames.float().mean(dim=1))
    still = frozen(clips).frames
    assert torch.equal(still[:, 5], clips.frames[:, 0])
    swapped = shuffled_captions(clips, 0)
    assert sorted(swapped.captions) == sorted(clips.captions)
    assert all(a != b for a, b in zip(swapped.captions, clips.captions, strict=True))


def test_sensitivity_table_shows_what_each_metric_notices() -> None:
    def looks(clips: ClipSet) -> np.ndarray:
        return (
            F.avg_pool2d(clips.frames.float().mean(-1).flatten(0, 1)[:, None], 8)
            .unflatten(0, clips.frames.shape[:2])
            .flatten(1)
            .numpy()
        )

    def moves(clips: ClipSet) -> np.ndarray:
        return (clips.frames[:, 1:].float() - clips.frames[:, :-1].float()).abs().mean(dim=(1, 2, 3, 4)).numpy()

    def caption_match(clips: ClipSet) -> np.ndarray:
        red = clips.frames[..., 0].float().amax(dim=(1, 2, 3)) > 180
        blue = clips.frames[..., 2].float().amax(dim=(1, 2, 3)) > 180
        named = np.array(
            [["red" in caption or "white" in caption, "blue" in caption or "white" in caption] for caption in clips.captions]
        )
        return (np.stack([red, blue], 1) == named).mean(axis=1)

    reference, real = square_clips(24, seed=1), square_clips(24, seed=2)
    measures = [
        Measure("looks", against(looks(reference), looks, frechet_of_rows), "lower", (sensitivity.REAL, sensitivity.STRONG), 24),
        Measure("moves", per_clip(moves), "lower", (sensitivity.REAL, sensitivity.SHUFFLED)),
        Measure("captions", per_clip(caption_match), "higher", (sensitivity.REAL, sensitivity.CAPTIONS)),
    ]
    table = sensitivity_table(real, measures, resamples=30)
    by_look, by_motion, by_caption = table.rows
    # a still clip has less motion than a real one, and less counts as better here
    assert table.unnoticed == (sensitivity.FROZEN,)
    assert sensitivity.CAPTIONS not in by_look.notices + by_motion.notices
    assert sensitivity.SHUFFLED in by_motion.notices
    assert sensitivity.CAPTIONS in by_caption.notices
    assert by_look.in_order
    assert by_motion.in_order
    assert by_caption.in_order
    assert not by_motion.whole_order
    assert by_caption.figures[sensitivity.REAL].value == 1
    text = table.markdown()
    assert "Faults that no metric notices: frozen first frame." in text
    assert "| captions ↑ |" in text
    one_metric = sensitivity_table(real, measures[:1], conditions=(sensitivity.REAL, sensitivity.CAPTIONS), resamples=10)
    assert one_metric.unnoticed == (sensitivity.CAPTIONS,)
