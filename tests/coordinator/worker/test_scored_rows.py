"""Scoring within a time: slow experts are judged on fewer rows, and a job that is cut off goes on where it stopped."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.attacks.lab import Honest, Lab
from lutetia.coordinator.acceptance.loss_bounds import FEWEST_ROWS
from lutetia.coordinator.worker.client import WorkerFailed
from lutetia.coordinator.worker.messages import JobProgress, LossMeasured, MeasureLoss
from lutetia.coordinator.worker.scored_rows import RowScores
from lutetia.coordinator.worker.time_limits import patience_for, silence_limit
from lutetia.models.training import holdout_loss

CLIPS, NOISES = 40, 4
ROWS = CLIPS * NOISES


@dataclass
class SlowExpert:
    """The real expert, on which a clock is spent that nobody waits for: `seconds` for each row."""

    seconds: float = 1.0
    now: float = 0.0
    rows: int = 0
    call: Any = field(default=holdout_loss.call_expert)

    def __call__(self, model: Any, z: torch.Tensor, *rest: Any) -> torch.Tensor:
        self.now, self.rows = self.now + self.seconds * len(z), self.rows + len(z)
        return self.call(model, z, *rest)


async def judged(folder: Path, check_seconds: float, slow: SlowExpert, spoil: float = 1.0) -> tuple[Any, float, int]:
    """(verdict of an honest epoch whose weights are multiplied by `spoil`, seconds that its scores took, rows scored)."""
    lab = Lab(folder, Honest(seed=1, holdout=CLIPS), check_seconds, lambda: slow.now)
    result, snapshot = lab.honest(None)
    if spoil != 1.0:
        for part in (snapshot.parameters, snapshot.ema):
            for tensor in part.values():
                tensor.mul_(spoil)
        result = lab.publish(snapshot)
    before = slow.now, slow.rows
    return await lab.judged(result, None), slow.now - before[0], slow.rows - before[1]


async def test_an_expert_too_slow_for_all_rows_is_judged_within_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    slow = SlowExpert()
    monkeypatch.setattr(holdout_loss, "call_expert", slow)
    _, seconds_of_all, rows = await judged(tmp_path / "all", 2 * 3 * ROWS, slow)
    assert rows == 3 * ROWS + 1, "one row shows that all fit"
    limit = seconds_of_all / 10
    verdict, seconds, rows = await judged(tmp_path / "few", limit, slow)
    assert verdict.outcome == "valid"
    assert 3 * FEWEST_ROWS < rows <= 3 * ROWS / 10
    assert seconds <= limit
    verdict, seconds, _ = await judged(tmp_path / "bad", limit, slow, spoil=-3.0)
    assert (verdict.outcome, verdict.check) == ("invalid", "holdout")
    assert seconds <= limit


async def test_the_fewest_rows_are_scored_however_long_they_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    slow = SlowExpert(seconds=1e4)
    monkeypatch.setattr(holdout_loss, "call_expert", slow)
    verdict, _, rows = await judged(tmp_path, 1.0, slow)
    assert verdict.outcome == "valid"
    assert rows == 3 * FEWEST_ROWS


def test_rows_in_drawn_order_are_those_of_the_whole_score(tmp_path: Path):
    lab, score = Lab(tmp_path, Honest()), holdout_loss.holdout_loss
    whole = score(lab.manifest, 0, None, lab.holdout, draw="a")
    few = score(lab.manifest, 0, None, lab.holdout, draw="a", limits=holdout_loss.RowLimits(count=10, drawn=True))
    other = score(lab.manifest, 0, None, lab.holdout, draw="b", limits=holdout_loss.RowLimits(count=10, drawn=True))
    places = [min(range(len(whole.rows)), key=lambda row, loss=loss: abs(whole.rows[row] - loss)) for loss in few.rows]
    assert few.rows == pytest.approx([whole.rows[place] for place in places], rel=1e-5)
    assert len(set(places)) == 10
    assert len({place // NOISES for place in places}) > 3, "of many clips"
    assert few.rows != other.rows
    known = holdout_loss.RowLimits(count=10, drawn=True, known=few.rows[:7])
    assert score(lab.manifest, 0, None, lab.holdout, draw="a", limits=known).rows == pytest.approx(few.rows, rel=1e-5)


class CutOff:
    """A worker that is ended in its first attempt at each score, after some rows."""

    def __init__(self) -> None:
        self.asked: list[MeasureLoss] = []

    async def ask(self, job: MeasureLoss, *, limit: float) -> LossMeasured:
        self.asked.append(job)
        if not job.known:
            raise WorkerFailed("ended", JobProgress(id=1, drawn=True, rows=(1.0, 2.0)))
        return LossMeasured(
            loss=1.5, by_time=(), rows=(*job.known, *range(3, 3 + (job.count or 10) - len(job.known))), drawn=True
        )


async def test_a_score_that_was_cut_off_goes_on_after_the_rows_it_has():
    worker: Any = CutOff()
    scores, job = RowScores(worker, 90.0), MeasureLoss(shard=0, weights=None, holdout=Path("x"), draw="d")
    for part in ("parent", "averages", "raw"):
        with pytest.raises(WorkerFailed):
            await scores.measure("result", part, job, 1.0)
        rows = await scores.measure("result", part, job, 1.0)
        assert rows[:2] == (1.0, 2.0)
        assert len(rows) == 10
        assert await scores.measure("result", part, job, 1.0) == rows, "a score that is whole is not made again"
    assert len(worker.asked) == 6
    assert [job.count for job in worker.asked] == [None, None, 10, 10, 10, 10]
    assert worker.asked[1].known == (1.0, 2.0)
    assert worker.asked[2].drawn, "in the order of the parent"
    assert {job.seconds for job in worker.asked} == {30.0}
    scores.forget("result")
    with pytest.raises(WorkerFailed):
        await scores.measure("result", "parent", job, 1.0)


def test_patience_grows_with_size_and_with_what_was_seen():
    assert patience_for(0) == 300.0
    assert patience_for(56_000_000_000) > 7 * 3600, "an expert of 14 billion parameters"
    assert silence_limit(300.0, 1.0) == 300.0
    assert silence_limit(300.0, 100.0) == 2000.0
