"""What a trainer exports while it trains, if the volunteer asked for it. A failing export never stops the training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from lutetia.models.training.optimisers import learning_rate
from lutetia.models.training.progress_clips import ProgressClips
from lutetia.models.training.trainer import ExpertTrainer
from lutetia.node.trainer.assignment import Assignment
from lutetia.node.trainer.loss_log import LossLog, open_log
from lutetia.system.errors import LutetiaError

_log = logging.getLogger(__name__)
Made = TypeVar("Made")


class TrainingExport:
    """Writes losses after every step, and clips after every few epochs, until the first failure, which is logged."""

    def __init__(self, trainer: ExpertTrainer, log: LossLog | None, clips: ProgressClips | None, every: int) -> None:
        self._trainer, self._log, self._clips, self._every = trainer, log, clips, every

    @classmethod
    def of(cls, trainer: ExpertTrainer, assignment: Assignment) -> TrainingExport:
        """As the assignment says. What cannot be opened is logged and left out; a unit of several cards samples no clips."""
        log = clips = None
        if assignment.losses is not None:
            place = assignment.losses
            log = _tried(lambda: open_log(place, trainer.manifest.run_id, trainer.shard, trainer.lane))
        if log is not None and assignment.clips_every and trainer.manifest.sampling.prompts and "+" not in assignment.device:
            clips = _tried(lambda: ProgressClips(trainer))
        return cls(trainer, log, clips, assignment.clips_every)

    def step(self, loss: float, rate: float) -> None:
        """Export the step that was just taken: its loss, learning rate and the samples per second."""
        log, trainer, manifest = self._log, self._trainer, self._trainer.manifest
        if log is None:
            return
        done = trainer.steps - 1
        total = manifest.epochs * manifest.steps_per_epoch
        figures = {
            "loss": loss,
            "learning_rate": learning_rate(manifest.optimisation, done, total),
            "samples_per_second": round(rate, 3),
            "time": round(time.time(), 3),
        }
        self._attempt(lambda: log.step(done, figures))
        if self._clips is not None and trainer.at_epoch_end and (trainer.epoch + 1) % self._every == 0:
            clips = self._clips
            self._attempt(lambda: log.clips(trainer.steps, clips.prompts, clips.sample(), clips.fps))

    def close(self) -> None:
        if self._log is not None:
            self._attempt(self._log.close)

    def _attempt(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - no error of an exporting library may end the training
            _log.warning("losses are not exported any more: %s: %s", type(error).__name__, error)
            self._log = self._clips = None


def _tried(make: Callable[[], Made]) -> Made | None:
    try:
        return make()
    except LutetiaError as error:
        _log.warning("%s", error)
        return None
